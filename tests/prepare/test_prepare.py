"""prepare.py: the guide's command works, and every mistake ends in one line, a status and an untouched folder."""

import errno
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prepare import corpus
from prepare import prepare as room
from prepare.corpus import Source
from prepare.tokenizer import gpt2, load
from prepare.tokens import Input, TokenWriter, open_split, read_meta

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "prepare" / "prepare.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the way that should work


def test_tiny_shakespeare_has_other_counts(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tinyshakespeare.txt"
    assert room.main(["--src_data_path", str(source), "--output_dir", str(tmp_path)]) == 0
    splits = read_meta(tmp_path).splits
    assert (splits["train"].tokens, splits["val"].tokens) == (301_966, 36_059)
    text = source.read_text()
    border = int(0.9 * len(text))
    np.testing.assert_array_equal(open_split(tmp_path, "train"), gpt2()._encoding.encode_ordinary(text[:border]))
    np.testing.assert_array_equal(open_split(tmp_path, "val"), gpt2()._encoding.encode_ordinary(text[border:]))


@pytest.mark.parametrize("cwd", ["elsewhere", "prepare"])
def test_guides_command_fails_from_another_folder(tmp_path: Path, text: Path, cwd: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--src_data_path", str(text)],
        cwd=tmp_path / "elsewhere" if cwd == "elsewhere" else SCRIPT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"train.bin", "val.bin", "meta.json", "tokenizer"} < {path.name for path in text.parent.iterdir()}
    assert read_meta(text.parent).tokenizer.name == "gpt2"
    tokens = read_meta(text.parent).splits["train"].tokens
    assert re.search(rf"train +{tokens} .*train\.bin", run.stdout)
    assert "\r" not in run.stderr  # no progress bar in a log


@pytest.mark.parametrize("flags", [["FILE"], ["--src-data-path", "FILE"], ["--src_data_path=FILE"]])
def test_input_can_be_named_in_one_way_only(text: Path, tmp_path: Path, flags: list[str]) -> None:
    flags = [flag.replace("FILE", str(text)) for flag in flags]
    assert room.main([*flags, "--output-dir", str(tmp_path / "a" / "b"), "--tokenizer", "byte"]) == 0
    assert load(tmp_path / "a" / "b").decode(open_split(tmp_path / "a" / "b", "train")) in text.read_text()


def test_sample_needs_a_file_or_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    assert no_network is None
    monkeypatch.chdir(tmp_path)
    assert room.main(["--sample"]) == 0
    folder = tmp_path / "data" / "sample"
    meta = read_meta(folder)
    ids = open_split(folder, "train")
    assert np.count_nonzero(ids == meta.eot_id) == meta.splits["train"].documents - 1 > 50
    assert "assert" in load(folder).decode(ids[:200])
    assert f"{meta.splits['val'].tokens:,}" in capsys.readouterr().out


def test_second_run_differs_from_the_first(text: Path) -> None:
    flags = [str(text), "--tokenizer", "bpe", "--vocab-size", "300"]
    assert room.main(flags) == 0
    first = contents(text.parent)
    assert room.main(flags) == 0
    assert contents(text.parent) == first


def test_shorter_vocabulary_than_asked_for_is_not_said(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert room.main([str(text), "--tokenizer", "bpe", "--vocab-size", "9000"]) == 0
    learned = read_meta(text.parent).vocab_size
    assert 257 < learned < 9000
    assert f"so {learned} ids and not 9,000" in capsys.readouterr().out


def test_memory_grows_with_the_text(tmp_path: Path) -> None:
    piece = "Sixty-four characters that come again and again, to be counted.\n" * 8192

    def documents() -> Iterator[Iterator[str]]:
        yield (piece for _ in range(64))

    tracemalloc.start()
    try:
        meta = room.prepare([Source("32 MiB", documents)], tmp_path, name="char", phase=room._lines)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta.inputs[0].bytes == 32 << 20
    assert peak < 20 << 20


def test_preparing_text_loads_torch() -> None:
    code = "import sys, prepare.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- mistakes


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Runs prepare, which must fail with one line. Returns it."""
    assert room.main(list(flags)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9 " * 50, "is not UTF-8"),
        ("zipped.gz", b"\x1f\x8b\x08\x00", "unpack it"),
        ("short.txt", b"Hi", "too little text"),
        ("train.bin", b"text " * 50, "would be overwritten"),
        ("blanks.txt", b"text" + b" " * 1_000_000 + b"text", "blanks or newlines in a row"),
    ],
)
def test_unusable_file_leaves_something_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    error = fails(capsys, str(tmp_path / name))
    assert message in error
    assert name in error or message in ("too little text", "blanks or newlines in a row")
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".prepare-*"))


@pytest.mark.parametrize("fraction", ["0.0001", "0.9999"])
def test_one_side_gets_no_tokens(text: Path, capsys: pytest.CaptureFixture[str], fraction: str) -> None:
    assert "too little text" in fails(capsys, str(text), "--val-fraction", fraction)
    assert list(text.parent.iterdir()) == [text]


def test_output_where_nothing_can_be_written_ends_in_a_traceback(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, str(text), "--output_dir", str(text))
    assert f"cannot write to {text}" in error
    assert "choose another --output_dir" in error
    other = tmp_path / "other.txt"
    other.write_text("text")
    assert "choose where to write" in fails(capsys, str(text), str(other))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenzier", "char", "a.txt"], "did you mean --tokenizer?"),
        (["--src_data_pth=a.txt"], "did you mean --src_data_path?"),
        (["--tokenizer", "gpt3", "a.txt"], "'gpt3'"),
        ([], "or --sample"),
        (["a.txt", "--sample"], "not both"),
        (["a.txt", "--tokenizer", "bpe"], "--vocab-size N"),
        (["a.txt", "--vocab-size", "300"], "--tokenizer bpe"),
        (["a.txt", "--tokenizer", "char", "--tokenizer-file", "x"], "not for char"),
        (["a.txt", "--val-fraction", "1"], "above 0 and below 1"),
        (["a.txt", "--val-fraction", "nan"], "above 0 and below 1"),
    ],
)
def test_wrong_flag_is_not_explained(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        room.main(flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_file_that_changes_between_the_readings_is_mixed(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = corpus.measure

    def measure_then_edit(source: Source, advance: room.Advance) -> Input:
        seen = real(source, advance)
        text.write_text(text.read_text().replace("quick", "quack"))
        return seen

    monkeypatch.setattr(corpus, "measure", measure_then_edit)
    assert "changed while it was being read" in fails(capsys, str(text))
    assert list(text.parent.iterdir()) == [text]


def test_full_disk_harms_the_old_data_or_hides_the_need(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room.main([str(text)]) == 0
    before = contents(text.parent)

    def full(_writer: TokenWriter, _ids: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TokenWriter, "write", full)
    error = fails(capsys, str(text))
    assert re.search(r"no room left in .*: the tokens need 4\.2 kB at most, .* is free; make room", error)
    assert contents(text.parent) == before


def test_write_that_the_system_refuses_ends_in_a_traceback(text: Path) -> None:
    """A real refusal, in a process of its own: files may not grow beyond 64 kB."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from prepare.prepare import main; sys.exit(main())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(text)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"^error: .*File too large$", run.stderr, re.MULTILINE)
    assert "Traceback" not in run.stderr
    assert list(text.parent.iterdir()) == [text]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_something_half_written(text: Path, sent: signal.Signals, status: int) -> None:
    assert room.main([str(text)]) == 0
    before = contents(text.parent)
    big = text.parent / "big.txt"
    big.write_text(text.read_text() * 10_000)  # 20 MB: two seconds of encoding
    run = subprocess.Popen([sys.executable, str(SCRIPT), str(big)], stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    while not run.stderr.readline().startswith("encoding"):
        assert run.poll() is None
    while not any(file.stat().st_size for file in text.parent.glob(".prepare-*/train.bin")):
        assert run.poll() is None
    run.send_signal(sent)
    rest = run.communicate(timeout=20)[1]
    assert run.returncode == status
    assert rest == "prepare.py: stopped; nothing half-written is left\n"
    big.unlink()
    assert contents(text.parent) == before
    assert not list(text.parent.glob(".prepare-*"))
