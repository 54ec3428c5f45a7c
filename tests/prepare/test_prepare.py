"""prepare.py: the guide's command works. Every mistake ends with one line, an exit code and an untouched
folder. What survives a kill is in test_journal.py.
"""

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prepare import prepare as room
from prepare.data import load_tokenizer, open_split, read_meta
from prepare.tokenizer import gpt2

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "prepare" / "prepare.py"


# --- what works


def test_tiny_shakespeare_has_the_known_counts(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tinyshakespeare.txt"
    assert room.main(["--src_data_path", str(source), "--output_dir", str(tmp_path)]) == 0
    splits = read_meta(tmp_path).splits
    assert (splits["train"].tokens, splits["val"].tokens) == (301_966, 36_059)
    text = source.read_text()
    border = int(0.9 * len(text))
    np.testing.assert_array_equal(open_split(tmp_path, "train"), gpt2()._encoding.encode_ordinary(text[:border]))
    np.testing.assert_array_equal(open_split(tmp_path, "val"), gpt2()._encoding.encode_ordinary(text[border:]))


@pytest.mark.parametrize("cwd", ["elsewhere", "prepare"])
def test_guides_command_works_from_another_folder(tmp_path: Path, text: Path, cwd: str) -> None:
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
def test_input_can_be_named_in_several_ways(text: Path, tmp_path: Path, flags: list[str]) -> None:
    flags = [flag.replace("FILE", str(text)) for flag in flags]
    assert room.main([*flags, "--output-dir", str(tmp_path / "a" / "b"), "--tokenizer", "byte"]) == 0
    assert load_tokenizer(tmp_path / "a" / "b").decode(open_split(tmp_path / "a" / "b", "train")) in text.read_text()


def test_sample_needs_neither_file_nor_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    assert no_network is None
    monkeypatch.chdir(tmp_path)
    assert room.main(["--sample"]) == 0
    folder = tmp_path / "data" / "sample"
    meta = read_meta(folder)
    ids = open_split(folder, "train")
    assert np.count_nonzero(ids == meta.eot_id) == meta.splits["train"].documents - 1 > 50
    assert "assert" in load_tokenizer(folder).decode(ids[:200])
    assert f"{meta.splits['val'].tokens:,}" in capsys.readouterr().out


def test_shorter_vocabulary_than_asked_for_is_said(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert room.main([str(text), "--tokenizer", "bpe", "--vocab-size", "9000"]) == 0
    learned = read_meta(text.parent).vocab_size
    assert 257 < learned < 9000
    assert f"so {learned} ids and not 9,000" in capsys.readouterr().out


def test_preparing_text_loads_no_torch() -> None:
    code = "import sys, prepare.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- mistakes


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Runs prepare, which must fail with one line. Returns it."""
    assert room.main(list(flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_output_where_nothing_can_be_written_is_refused(
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
        (["a.txt", "--vocab-size", "300"], "--tokenizer bpe and word"),
        (
            ["a.txt", "--tokenizer", "tiktoken", "--pattern", "gpt2"],
            "--tokenizer-file FILE and --pattern NAME go together",
        ),
        (["a.txt", "--pattern", "gpt2"], "go together"),
        (["a.txt", "--workers", "-1"], "--workers -1"),
        (["a.txt", "--sample-size", "lots"], "'lots' is not a size"),
        (["-", "-"], "can be read once"),
        (["a.txt", "--errors", "ignore"], "'ignore'"),
        (["a.txt", "--tokenizer", "char", "--tokenizer-file", "x"], "not for char"),
        (["a.txt", "--val-fraction", "1"], "above 0 and below 1"),
        (["a.txt", "--val-fraction", "nan"], "above 0 and below 1"),
    ],
)
def test_wrong_flag_is_explained_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        room.main(flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("engine", "status"), [("tiktoken", 2), ("fast", 0)])
def test_a_million_spaces_do_not_kill_the_run(
    text: Path, capsys: pytest.CaptureFixture[str], engine: str, status: int
) -> None:
    text.write_text("word " + " " * 1_000_000 + "\n" * 1_000_000 + "and words " * 999)
    assert room.main([str(text), "--engine", engine]) == status
    error = capsys.readouterr().err
    assert ("or use the fast engine" in error) == bool(status)
    assert "panicked" not in error


@pytest.mark.slow
def test_document_without_a_space_is_whole_or_refused(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prepare.encoder.MAX_CHUNK", 2 << 20)
    flags = [str(text), "--engine", "fast", "--val-fraction", "0.01"]
    for held in ("YWJj" * 500_000, "漢字" * 250_000, "YWJj\n" * 1_000_000):  # a third has lines to cut at
        text.write_text(held)
        assert room.main(flags) == 0
        train = held[: int(0.99 * len(held))]
        np.testing.assert_array_equal(open_split(text.parent, "train"), gpt2().encode(train))
    text.write_text("YWJj" * 1_000_000)
    assert "bytes without an ASCII word followed by a space, nor a line of text, from 'YWJj" in fails(capsys, *flags)
    assert room.main([str(text), "--tokenizer", "char"]) == 0


def test_write_that_the_system_refuses_is_one_line(text: Path) -> None:
    """A real refusal, in a process of its own: files may not grow beyond 64 kB."""
    text.write_text(text.read_text() * 200)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(text), "--tokenizer", "byte"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert run.returncode == 1
    assert re.search(r"^error: .*File too large$", run.stderr, re.MULTILINE)
    assert "Traceback" not in run.stderr
    assert list(text.parent.iterdir()) == [text]


def test_examples_of_help_are_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        room.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    commands = re.findall(r"^  (?:zcat dump.gz \| )?prepare\.py (.*?)(?:   .*)?$", out, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        room._parse(shlex.split(command), "prepare.py")


def test_verify_reads_again_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("To be, or not to be: that is the question.\n" * 200)
    words = [str(tmp_path / "a.txt"), "--tokenizer", "char", "--output_dir", str(tmp_path / "data"), "--verify"]
    assert room.main(words) == 0
    assert "is in order" in capsys.readouterr().out
