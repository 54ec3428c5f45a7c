"""journal.py: a run that was killed at any moment goes on to the same bytes, and stale work is not used."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prepare import journal
from prepare import prepare as room
from prepare.data import open_split, read_meta
from prepare.encoder import Chunk, Coded, Part
from prepare.journal import STAGE, Changed, Journal
from prepare.tokens import DataError
from tests.conftest import PATIENCE, until
from tests.prepare.test_formats import PACK

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "prepare" / "prepare.py"


def files(folder: Path) -> dict[str, bytes]:
    """What a finished run wrote, without what names the tools."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != "meta.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prepare.encoder.CHUNK", 5000)
    monkeypatch.setattr("prepare.corpus.PIECE_BYTES", 2000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 chunks of 5,000 bytes."""
    path = tmp_path / "in" / "a.txt"
    path.parent.mkdir()
    path.write_text("".join(f"Line {number} of the text, which goes on.\n" for number in range(4000)))
    return path


class Killed(BaseException):
    """What kill -9 does, for a test in one process: nothing tidies up."""


def killed_after(writes: int, monkeypatch: pytest.MonkeyPatch, *, torn: bool = False) -> Callable[[], None]:
    """Lets so many writes through (two a chunk, and its line) and kills at the next, in the middle of it if `torn`."""
    real, left = journal._write, writes

    def write(file, data):  # type: ignore[no-untyped-def]
        nonlocal left
        left -= 1
        if left < 0:
            if torn:
                real(file, data[: len(data) // 2])
            raise Killed
        real(file, data)

    monkeypatch.setattr(journal, "_write", write)
    return lambda: monkeypatch.setattr(journal, "_write", real)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "flags", [[], ["--tokenizer", "char"], ["--separator", r"\n"], ["--tokenizer", "word", "--vocab-size", "900"]]
)
@pytest.mark.parametrize("torn", [False, True])
def test_killed_run_goes_on_to_the_same_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], torn: bool
) -> None:
    assert room.main([str(source), "--output_dir", str(tmp_path / "whole"), *flags]) == 0
    encoded = []
    monkeypatch.setattr(
        Journal, "add", lambda self, chunk, coded, add=Journal.add: (encoded.append(chunk), add(self, chunk, coded))
    )
    for writes in (0, 1, 2, 3, 40, 41, 42):
        out = tmp_path / f"out{writes}"
        revive = killed_after(writes, monkeypatch, torn=torn)
        with pytest.raises(Killed):
            room.main([str(source), "--output_dir", str(out), *flags])
        done = len((out / STAGE / "journal.jsonl").read_bytes().splitlines()) if writes > 2 else 0
        revive()
        encoded.clear()
        assert room.main([str(source), "--output_dir", str(out), *flags]) == 0
        assert files(out) == files(tmp_path / "whole")
        assert read_meta(out) == read_meta(tmp_path / "whole")
        assert 25 < len(encoded) + writes // 3 < 45
        assert done in (writes // 3, writes // 3 + 1)
        assert not (out / STAGE).exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["a.json", "a.csv.gz", "a.jsonl.bz2", "a.txt.xz", "-"])
def test_killed_run_goes_on_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = [f"Record {number} of many, which goes on and on." for number in range(3000)]
    data = json.dumps([{"text": text} for text in texts])
    if ".csv" in name:
        data = "text\n" + "".join(f'"{text}"\n' for text in texts)
    elif ".jsonl" in name:
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    packed = PACK.get(Path(name).suffix, bytes)(data.encode())
    (tmp_path / name).write_bytes(packed)
    encoded = []
    monkeypatch.setattr(
        Journal, "add", lambda self, chunk, coded, add=Journal.add: (encoded.append(chunk), add(self, chunk, coded))
    )

    def run(out: str) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(packed)))
        return room.main([name if name == "-" else str(tmp_path / name), "--output_dir", str(tmp_path / out)])

    assert run("whole") == 0
    chunks = len(encoded)
    revive = killed_after(chunks * 2, monkeypatch)
    with pytest.raises(Killed):
        run("out")
    revive()
    encoded.clear()
    assert run("out") == 0
    assert len(encoded) < chunks
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert read_meta(tmp_path / "out") == read_meta(tmp_path / "whole")


@pytest.mark.usefixtures("small_chunks")
def test_work_on_another_format_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(json.dumps({"text": f"line {number} of it"}) + "\n" for number in range(3000)))
    command = [str(path), "--output_dir", str(tmp_path / "out")]
    revive = killed_after(20, monkeypatch)
    with pytest.raises(Killed):
        room.main([*command, "--format", "text"])
    revive()
    assert room.main(command) == 0
    assert "other settings (format was 'text', now it is 'auto'): starting afresh" in capsys.readouterr().err
    assert read_meta(tmp_path / "out").inputs[0].documents == 3000


@pytest.mark.parametrize("engine", ["fast", "tiktoken"])
def test_two_kills_do_not_change_the_files(tmp_path: Path, engine: str) -> None:
    """Real ones, kill -9 at two moments, with two workers."""
    source = tmp_path / "a.txt"
    with source.open("w") as file:
        for number in range(100_000 if engine == "tiktoken" else 800_000):
            file.write(f"{number} sheep went over the {number * 7919 % 1013}th hill, and {number} came back.\n")
    command = [sys.executable, str(SCRIPT), str(source), "--engine", engine, "--workers", "2", "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "out"
    lines = out / STAGE / "journal.jsonl"
    before = 0
    for _ in range(2):
        run = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not lines.exists() or lines.read_bytes().count(b"\n") <= before:
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        run.kill()
        run.wait()
        before = lines.read_bytes().count(b"\n")
    last = subprocess.run([*command, str(out)], check=True, capture_output=True, text=True)
    assert "going on after" in last.stderr
    assert files(out) == files(tmp_path / "whole")
    assert read_meta(out) == read_meta(tmp_path / "whole")


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("Some words to encode again and again. " * 600_000)
    command = [sys.executable, str(SCRIPT), str(source), "--engine", "tiktoken", "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, process_group=0)
    while not (tmp_path / STAGE / "journal.jsonl").exists() or not (tmp_path / STAGE / "journal.jsonl").stat().st_size:
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()

    def gone() -> bool:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        until(gone, "processes are left")
    finally:
        if not gone():
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_signal_leaves_the_old_data_and_is_explained(
    tmp_path: Path, sent: signal.Signals, status: int, workers: str
) -> None:
    old, big = tmp_path / "old.txt", tmp_path / "big.txt"
    old.write_text("old text " * 99)
    assert room.main([str(old)]) == 0
    before = files(tmp_path)
    big.write_text("Some words to encode again and again. " * 600_000)
    command = [sys.executable, str(SCRIPT), str(big), "--engine", "tiktoken", "--workers", workers]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    lines = tmp_path / STAGE / "journal.jsonl"
    while not lines.exists() or not lines.stat().st_size:
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, sent) if sent == signal.SIGINT else run.send_signal(sent)  # a terminal tells the workers too
    rest = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == status
    assert rest.splitlines()[-1] == "prepare.py: stopped; the same command goes on from here"
    assert "Traceback" not in rest
    kept = {name: data for name, data in files(tmp_path).items() if not name.startswith(STAGE)}
    big_text = kept.pop("big.txt")
    assert kept == before
    assert room.main([str(big), "--engine", "fast"]) == 0
    assert read_meta(tmp_path).inputs[0].bytes == len(big_text)


def test_ctrl_c_while_the_workers_start_prints_no_traceback(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("Some words to encode again and again. " * 600_000)
    command = [sys.executable, str(SCRIPT), str(source), "--engine", "tiktoken", "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)

    def starting() -> bool:
        return any("spawn_main" in " ".join(child.cmdline()) for child in psutil.Process(run.pid).children())

    while not starting():
        assert run.poll() is None
    time.sleep(0.1)  # it imports now
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=PATIENCE)[1].splitlines()[2:] == [
        "prepare.py: stopped; nothing half-written is left"
    ]
    assert run.returncode == 130


def unfinished(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    revive = killed_after(30, monkeypatch)
    with pytest.raises(Killed):
        room.main([str(source), "--output_dir", str(out), *flags])
    revive()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--val-fraction", "0.2"], "val_fraction was 0.1, now it is 0.2"),
        (["--tokenizer", "byte"], "tokenizer was 'gpt2', now it is 'byte'"),
        (["--separator", "x"], "separator was '', now it is 'x'"),
    ],
)
def test_other_settings_start_afresh(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    named: str,
) -> None:
    unfinished(source, tmp_path / "out", monkeypatch)
    assert room.main([str(source), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    assert re.search(
        rf"note: the unfinished work in .* was for other settings \({named}\): starting afresh", capsys.readouterr().err
    )
    assert room.main([str(source), "--output_dir", str(tmp_path / "whole"), *flags]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["grown", "edited", "renamed", "edited in secret"])
def test_changed_input_starts_afresh(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    unfinished(source, tmp_path / "out", monkeypatch)
    before = source.stat()
    text = source.read_text()
    source.write_text(text + "more" if how == "grown" else text.replace("Line 300 ", "Lyne 300 "))
    if how == "edited in secret":
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    if how == "renamed":
        source = source.rename(source.parent / "b.txt")
    assert room.main([str(source), "--output_dir", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "starting afresh" in error
    if how == "edited in secret":
        assert "the text is not the one that the unfinished work" in error
    else:
        assert re.search(r"was for other inputs \(.*a\.txt", error)
    assert room.main([str(source), "--output_dir", str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_chunks")
def test_bad_byte_far_in_does_not_cost_what_was_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = source.read_bytes()
    source.write_bytes(data.replace(b"Line 3000", b"Line\xff3000"))
    at = data.index(b"Line 3000") + 4
    flags = [str(source), "--output_dir", str(tmp_path / "out")]
    assert room.main([*flags, "--workers", "1"]) == 2
    assert f"a.txt is not UTF-8 text: byte {at:,} has 0xff" in capsys.readouterr().err
    assert room.main([*flags, "--errors", "replace"]) == 0
    assert "going on after" in capsys.readouterr().err
    assert read_meta(tmp_path / "out").inputs[0].repaired == 1
    assert room.main([str(source), "--output_dir", str(tmp_path / "whole"), "--errors", "replace"]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "damage", ["train.bin", "journal.jsonl", "tokenizer/ranks.tiktoken", "plan.json", "train.bin gone"]
)
def test_damaged_stage_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    unfinished(source, tmp_path / "out", monkeypatch)
    path = tmp_path / "out" / STAGE / damage.removesuffix(" gone")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if damage.endswith("gone"):
        path.unlink()
    assert room.main([str(source), "--output_dir", str(tmp_path / "out")]) == 0
    assert room.main([str(source), "--output_dir", str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_chunks")
def test_full_disk_costs_neither_old_data_nor_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "old.txt").write_text("old text " * 99)
    assert room.main([str(tmp_path / "old.txt"), "--output_dir", str(out)]) == 0
    before = files(out)
    real, left = journal._write, 31

    def full(file, data):  # type: ignore[no-untyped-def]
        nonlocal left
        left -= 1
        if left < 0:
            real(file, data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    monkeypatch.setattr(journal, "_write", full)
    assert room.main([str(source), "--output_dir", str(out)]) == 1
    assert re.search(
        r"error: no room left in .* free\): make room and run the same command again", capsys.readouterr().err
    )
    assert {name: data for name, data in files(out).items() if not name.startswith(STAGE)} == before
    monkeypatch.setattr(journal, "_write", real)
    assert room.main([str(source), "--output_dir", str(out)]) == 0
    assert "going on after" in capsys.readouterr().err
    assert room.main([str(source), "--output_dir", str(tmp_path / "whole")]) == 0
    assert files(out) == files(tmp_path / "whole")


def test_really_full_disk_is_one_line(tmp_path: Path) -> None:
    """On a file system of 1 MB, where one may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        (tmp_path / "a.txt").write_text("word " * 400_000)
        command = [
            sys.executable,
            str(SCRIPT),
            str(tmp_path / "a.txt"),
            "--tokenizer",
            "byte",
            "--output_dir",
            str(disk),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert re.search(
            r"^error: no room left in .*make room and run the same command again", run.stderr, re.MULTILINE
        )
        assert "Traceback" not in run.stderr
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        assert len(open_split(disk, "train")) == 1_800_000
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text " * 99)
    with journal.stage(tmp_path):
        assert room.main([str(tmp_path / "a.txt")]) == 2
    assert f"error: another prepare is at work in {tmp_path}: wait for it" in capsys.readouterr().err
    assert room.main([str(tmp_path / "a.txt")]) == 0


def test_journal_knows_its_chunks(tmp_path: Path) -> None:
    chunks = [Chunk([Part(number % 2, number > 1, 0, 0, 0, b"text %d" % number)]) for number in range(4)]
    first = Journal(tmp_path)
    for number, chunk in enumerate(chunks[:3]):
        assert not first.is_done(number, chunk)
        first.add(chunk, Coded([b"ab", b"cdef"], {0: 2}, 1))
    first.close()
    second = Journal(tmp_path)
    assert [second.is_done(number, chunk) for number, chunk in enumerate(chunks)] == [True, True, True, False]
    assert (second.bytes, second.repaired, second.unknown) == ([6, 12], {0: 6}, 3)
    assert second.finish() == [hashlib.sha256(data * 3).hexdigest() for data in (b"ab", b"cdef")]
    with pytest.raises(Changed):
        second.is_done(0, chunks[1])
    second.close()


def test_line_without_its_end_does_not_count(tmp_path: Path) -> None:
    """The next line would be written behind it."""
    chunk = Chunk([Part(0, False, 0, 0, 0, b"text")])
    first = Journal(tmp_path)
    first.add(chunk, Coded([b"ab", b""]))
    first.close()
    lines = tmp_path / "journal.jsonl"
    os.truncate(lines, lines.stat().st_size - 1)
    second = Journal(tmp_path)
    assert not second.is_done(0, chunk)
    assert (second.bytes, lines.stat().st_size, (tmp_path / "train.bin").stat().st_size) == ([0, 0], 0, 0)
    second.close()


def test_stage_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot write to .*file"), journal.stage(tmp_path / "file"):
        pass


def test_plan_of_another_version_is_not_used(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / STAGE).mkdir(parents=True)
    (out / STAGE / "plan.json").write_text(json.dumps({"unheard": "of"}))
    assert room.main([str(source), "--output_dir", str(out)]) == 0
