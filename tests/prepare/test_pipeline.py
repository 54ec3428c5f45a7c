"""pipeline.py: the files are whole or absent, and depend on text and settings alone."""

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from prepare import pipeline
from prepare import prepare as room
from prepare.data import load_tokenizer, open_split, read_meta
from prepare.encoder import Coder
from prepare.plan import Settings
from prepare.sources import sample_texts
from tests.prepare.test_prepare import fails
from tests.prepare.test_sources import lines


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_second_run_is_equal_to_the_first(text: Path) -> None:
    flags = [str(text), "--tokenizer", "bpe", "--vocab-size", "300"]
    assert room.main(flags) == 0
    first = contents(text.parent)
    assert room.main(flags) == 0
    assert contents(text.parent) == first


@pytest.mark.parametrize("name", ["char", "byte", "gpt2"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, name: str) -> None:
    """Memory as Python counts it; benchmarks/preparation.py measures the process."""
    text = tmp_path / "a.txt"
    text.write_text("Sixty-four characters that come again and again, to be counted.\n" * (8192 * 64))
    tracemalloc.start()
    try:
        meta = pipeline.prepare(
            [str(text)], tmp_path, Settings(tokenizer=name), engine_name="fast" if name == "gpt2" else "auto"
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta.inputs[0].bytes == 32 << 20
    assert peak < (100 << 20 if name == "gpt2" else 40 << 20)


@pytest.mark.parametrize("engine", ["fast", "tiktoken"])
def test_workers_and_engine_do_not_change_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr("prepare.encoder.CHUNK", 5000)
    texts = sample_texts()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 2))
    (tmp_path / "b.txt").write_text("\n".join(texts))
    flags = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), "--output_dir"]
    assert room.main([*flags, str(tmp_path / "one"), "--engine", "tiktoken", "--workers", "1"]) == 0
    assert room.main([*flags, str(tmp_path / "two"), "--engine", engine, "--workers", "2"]) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name != "meta.json")
    assert read_meta(tmp_path / "one").splits == read_meta(tmp_path / "two").splits


def test_standard_input_is_read_like_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stdin:
        buffer = io.BytesIO(b"one|two " * 40)

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert room.main(["-", "--separator", "|", "--output_dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "meta.json", "tokenizer"}
    meta = read_meta(tmp_path)
    assert (meta.inputs[0].name, meta.inputs[0].documents) == ("standard input", 41)
    assert "choose where to write" in fails(capsys, "-")


@pytest.mark.parametrize("errors", ["replace", "skip"])
def test_repaired_text_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], errors: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait " * 40)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half a \\ud800 character"}\n{"text": "and \xff"}\n')
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    for name in ("gpt2", "char"):
        assert room.main([*files, "--errors", errors, "--tokenizer", name]) == 0
        assert "note: 44 places were not UTF-8" in capsys.readouterr().out
        meta = read_meta(tmp_path)
        assert [source.repaired for source in meta.inputs] == [40, 4]
        text = load_tokenizer(tmp_path).decode(open_split(tmp_path, "train"))
        assert text.startswith("caf\ufffd au lait caf" if errors == "replace" else "caf au lait caf")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9 " * 50, "is not UTF-8"),
        ("zipped.bin", b"\x1f\x8b\x08\x00", "cannot be unpacked"),
        ("half.gz", gzip.compress(b"text " * 99, mtime=0)[:-5], "cannot be unpacked"),
        ("bad.jsonl", b'{"text": "caf\xe9"}', "line 1 has 0xe9"),
        ("one.jsonl", b'{"body": "caf"}', "has no field 'text'"),
        ("short.txt", b"Hi", "too little text"),
        ("train.bin", b"text " * 50, "would be overwritten"),
        ("blanks.txt", b" " * 1_000_000 + b"text", "blanks or newlines in a row"),
    ],
)
def test_unusable_file_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    error = fails(capsys, str(tmp_path / name))
    assert message in error
    assert name in error or message in ("too little text", "blanks or newlines in a row")
    assert contents(tmp_path) == before
    assert not (tmp_path / ".prepare").exists()


@pytest.mark.parametrize("fraction", ["0.0001", "0.9999"])
def test_side_without_tokens_is_refused(text: Path, capsys: pytest.CaptureFixture[str], fraction: str) -> None:
    assert "too little text" in fails(capsys, str(text), "--val-fraction", fraction)
    assert list(text.parent.iterdir()) == [text]


def test_engine_that_errs_leaves_nothing(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Coder.__call__

    def erring(coder: Coder, chunk, number=0):  # type: ignore[no-untyped-def]
        if number == 8:
            monkeypatch.setattr(
                type(coder.engine), "__call__", lambda _, texts: [np.zeros(9, dtype=np.uint32)] * len(texts)
            )
        return real(coder, chunk, number)

    monkeypatch.setattr("prepare.encoder.CHUNK", 5000)
    monkeypatch.setattr("prepare.corpus.PIECE_BYTES", 2000)
    monkeypatch.setattr(Coder, "__call__", erring)
    text.write_text(text.read_text() * 60)
    assert "fastokens does not give tiktoken's ids" in fails(capsys, str(text), "--engine", "fast", "--workers", "1")
    assert list(text.parent.iterdir()) == [text]


@pytest.mark.parametrize(
    ("name", "flags", "note"),
    [
        ("a.jsonl", ["--separator", r"\n\n"], "--separator has no effect: the input is jsonl"),
        ("a.txt", ["--text-field", "body"], "--text-field body has no effect: the input is text"),
        ("a.txt", ["--sample-size", "5MB"], "--sample-size has no effect: it is for --tokenizer bpe, and this is byte"),
        ("a.txt", ["--seed", "7"], "--seed 7 has no effect: val is the tail of the text"),
        ("a.txt", [], ""),
    ],
)
def test_setting_without_effect_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: list[str], note: str
) -> None:
    path = tmp_path / name
    path.write_bytes(lines(*["some text"] * 9) if name == "a.jsonl" else b"A line of text that is here.\n" * 30)
    assert room.main([str(path), "--tokenizer", "byte", "--output-dir", str(tmp_path / "out"), *flags]) == 0
    notes = [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(note)
    assert not note or notes[0].startswith(note)


@pytest.mark.parametrize("place", [".prepare/a.txt", "tokenizer/a.txt", "train.bin", "meta.json"])
def test_input_in_the_outputs_place_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("some text that is long enough\n" * 20)
    assert room.main([str(path), "--output-dir", str(tmp_path)]) == 2
    assert path.exists()
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 2), ("max 100000", 8), (None, 8)])
def test_a_container_has_as_many_workers_as_its_limit_has_cores(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, cores: int
) -> None:
    def read(path: Path) -> str:
        if limit is None:
            raise FileNotFoundError(path)
        return limit

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", read)
    assert pipeline._cores() == cores
