"""look.py: `elastic-gpt inspect` shows what the data holds."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prepare import look
from prepare.data import open_split
from prepare.frontdoor import install
from prepare.look import main
from prepare.prepare import main as prepare
from prepare.tokens import META
from tests.prepare.conftest import ENGLISH
from tests.prepare.test_interop import characters_as_dlrover, write


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten documents of 1 to 512 times the same four tokens."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(10):
        (texts / f"{number}.txt").write_text("a b c d " * 2**number)
    inputs = [str(texts / f"{number}.txt") for number in range(10)]
    assert prepare([*inputs, "--val-fraction", "0.4", "--output-dir", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def cells(out: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_the_table_is_of_the_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    train, val = (np.array(open_split(folder, split)) for split in ("train", "val"))
    table = cells(out)
    assert table["tokens"] == [f"{len(train):,}", f"{len(val):,}"]
    assert table["documents"] == ["10", "1"]
    assert table["ids that occur"] == [str(len(np.unique(train))), str(len(np.unique(val)))]
    longest = max(len(part[part != 50256]) for part in np.split(train, np.flatnonzero(train == 50256)))
    assert table["longest document, tokens"] == [f"{longest:,}", f"{len(val):,}"]
    meta = json.loads((folder / META).read_text())
    size = [meta["splits"][split]["bytes_in"] for split in ("train", "val")]
    assert table["bytes per token"] == [f"{size[0] / len(train):.2f}", f"{size[1] / len(val):.2f}"]
    ids, counts = np.unique(np.concatenate([train, val]), return_counts=True)
    assert str(ids[counts.argmax()]) in [row[0] for row in table.values() if row]
    assert table["' b'"] == ["275", *(f"{(side == 275).mean():.2%}" for side in (train, val))]
    for fact in (
        "gpt2 tokenizer, vocabulary 50,257, uint16",
        "split: tail",
        "fingerprint: ",
        "2.txt and 7 more",
        "a b c d",
    ):
        assert fact in out


def test_bytes_per_token_of_a_foreign_folder_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20
    assert main([str(characters_as_dlrover(tmp_path / "data", text))]) == 0
    table = cells(capsys.readouterr().out)
    border = int(len(text) * 0.9)
    shares = [f"{len(side.encode()) / len(side):.2f}" for side in (text[:border], text[border:])]
    assert table["bytes per token"] == shares
    assert shares != ["1.00", "1.00"]
    assert "documents" not in table


def test_unknown_and_stray_ids_are_shown_as_ids(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        write(tmp_path / "llama" / f"{split}.bin", [128_000, 1, 70_000], (20240801, 7), "<u4")
    assert main([str(tmp_path / "llama")]) == 0
    assert "128000 1 70000" in capsys.readouterr().out

    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    ids[5] = 60_000
    ids.tofile(folder / "train.bin")
    assert main([str(folder)]) == 0
    assert "1 ids are not in the vocabulary" in capsys.readouterr().out
    assert main([str(folder), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "WRONG  train.bin: token 5 is 60000, and ids go from 0 to 50256" in out
    assert f"{folder} is not what it says it is" in out


def test_verify_ends_well_on_good_data_and_badly_on_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--verify"]) == 0
    assert f"{folder} is in order" in capsys.readouterr().out
    for wrong in ({}, {"splits": 3}):
        (folder / META).write_text(json.dumps(wrong))
        assert main([str(folder), "--verify"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_control_characters_of_the_text_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\x1b]0;owned\x07 [red]a[/red] [/] \x1b[2J" + ENGLISH)
    assert prepare([str(tmp_path / "text.txt"), "--tokenizer", "byte"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]a[/red] [/]" in out


def test_the_histogram_counts_every_document(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    counts = look.count(open_split(folder, "train"), 50257, 50256, lambda _: None)
    assert counts.lengths.sum() == counts.documents == 10
    # 4 tokens and the last blank of the line; bins are tenths of a decade.
    assert np.flatnonzero(counts.lengths)[0] == int(10 * np.log10(5))
    assert main([str(folder), "--histogram", str(tmp_path / "lengths.png")]) == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([str(folder), "--histogram", "lengths.doc"])
    assert "--histogram lengths.doc: name a .png, .svg or .pdf file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(folder), "--histgram", "lengths.png"])
    assert capsys.readouterr().err.startswith(
        "error: unrecognized arguments: --histgram lengths.png: did you mean --histogram?"
    )


@pytest.mark.parametrize(("name", "told"), [("nowhere/x.png", "would lie in a folder"), ("folder.png", "is a folder")])
def test_a_picture_that_cannot_be_written_is_told_before_the_data_are_read(
    name: str,
    told: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(look, "count", None)
    assert main([str(folder), "--histogram", str(tmp_path / name)]) == 2
    assert f"--histogram {tmp_path / name} {told}" in capsys.readouterr().err


def test_a_histogram_without_documents_or_matplotlib_is_an_error_in_one_line(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    characters = characters_as_dlrover(tmp_path / "characters")
    assert main([str(characters), "--histogram", str(tmp_path / "x.png")]) == 2
    assert "the char tokenizer puts nothing between documents" in capsys.readouterr().err
    real = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([str(folder), "--histogram", str(tmp_path / "x.png")]) == 2
    assert install("plot") in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--verify")])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Peak memory for 2 MB and for 200 MB of ids."""
    measured = []
    for size in (1_000_000, 100_000_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        block = np.tile(np.array([464, 2068, 7586, 21831, 50256], dtype="<u2"), 200_000)
        for split in ("train", "val"):
            with (folder / f"{split}.bin").open("wb") as file:
                for _ in range(size // 1_000_000 if split == "train" else 1):
                    file.write(block)
        code = (
            "import resource, sys; from prepare.look import main; main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code, *words[1:], str(folder)], capture_output=True, text=True)
        measured.append(int(done.stderr.split()[-1]) / 1024)
        (folder / "train.bin").unlink()
    assert measured[1] < measured[0] + 40, measured  # MiB
