"""tokens.py: the files are what meta.json says, or there is no meta.json."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from prepare import tokens
from prepare.prepare import main
from prepare.tokens import DataError, fingerprint, open_split, read_meta

OLD = "old " * 100
NEW = "new " * 100  # as long as the old: sizes cannot tell a mixed folder


def prepared(folder: Path, text: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text)
    return main([str(folder / "text.txt"), "--tokenizer", "char"])


def is_whole(folder: Path) -> bool:
    """Whether every file that meta.json names is the one that it was written for."""
    meta = read_meta(folder)
    named = [(split.file, split.sha256) for split in meta.splits.values()]
    named.append((str(meta.tokenizer.file), str(meta.tokenizer.sha256)))
    return all(hashlib.sha256((folder / file).read_bytes()).hexdigest() == sha256 for file, sha256 in named)


def test_files_break_the_contract(tmp_path: Path) -> None:
    assert prepared(tmp_path, OLD) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "train.bin", "val.bin", "meta.json", "tokenizer"}
    fields = json.loads((tmp_path / "meta.json").read_text())
    architecture = "format_version dtype vocab_size tokenizer eot_id splits inputs split tools"
    assert list(fields) == architecture.split()
    assert set(fields["tokenizer"]) == {"kind", "name", "pattern", "file", "sha256", "specials"}
    assert set(fields["splits"]["train"]) == {"file", "tokens", "documents", "bytes_in", "sha256"}
    assert fields["split"] == {"method": "tail", "seed": None, "fraction": 0.1}

    meta = read_meta(tmp_path)
    assert json.loads(json.dumps(asdict(meta))) == fields
    assert is_whole(tmp_path)
    assert (meta.vocab_size, meta.dtype, meta.eot_id) == (4, "uint16", None)
    assert (meta.splits["train"].tokens, meta.splits["val"].tokens) == (360, 40)
    raw = np.frombuffer((tmp_path / "train.bin").read_bytes(), dtype="<u2")
    np.testing.assert_array_equal(open_split(tmp_path, "train"), raw)
    assert raw[:4].tolist() == [3, 2, 1, 0]  # "old " in sorted code points


def test_opened_ids_can_be_written(tmp_path: Path) -> None:
    prepared(tmp_path, OLD)
    ids = open_split(tmp_path, "val")
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_overflow_their_type(tmp_path: Path, size: int, dtype: str) -> None:
    assert tokens.dtype_for(size) == dtype
    with tokens.TokenWriter(tmp_path / "a.bin", dtype) as writer:
        writer.write(np.array([0, size - 1], dtype=np.uint32))
    assert np.fromfile(tmp_path / "a.bin", dtype="<u2" if dtype == "uint16" else "<u4").tolist() == [0, size - 1]
    assert writer.sha256 == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("change", [-2, -1, 2])
def test_file_of_another_size_is_opened(tmp_path: Path, change: int) -> None:
    prepared(tmp_path, OLD)
    os.truncate(tmp_path / "train.bin", 720 + change)
    with pytest.raises(DataError, match=rf"train\.bin has {720 + change} bytes, meta\.json says 720"):
        open_split(tmp_path, "train")
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin is missing"):
        open_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"no split 'test', it has train, val"):
        open_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prepare the data first"),
        ("{half", "is not JSON"),
        ("[]", "format_version None"),
        ('{"format_version": 99}', "format_version 99, this program reads 1"),
        ('{"format_version": 1, "dtype": "uint16"}', "is not as prepare writes it"),
    ],
)
def test_folder_without_a_readable_meta_ends_in_a_traceback(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_split(tmp_path, "train")


def test_fingerprint_sees_the_folder_or_misses_the_ids(tmp_path: Path) -> None:
    for name, text in (("one", OLD), ("same", OLD), ("other", NEW)):
        prepared(tmp_path / name, text)
    one, same, other = (read_meta(tmp_path / name) for name in ("one", "same", "other"))
    assert one.inputs != same.inputs
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(replace(one, dtype="uint32"))


def test_stop_while_publishing_leaves_a_mixed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stops at the first, second, third ... change of the folder, until one run gets through."""
    real = {name: getattr(os, name) for name in ("replace", "unlink", "fsync")}
    calls_left = 0

    def stopping(name: str):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                raise KeyboardInterrupt
            return real[name](*args, **kwargs)

        return call

    folder = tmp_path / "data"
    outcomes = []
    for last in range(1, 100):
        monkeypatch.undo()
        assert prepared(folder, OLD) == 0
        for name in real:
            monkeypatch.setattr(os, name, stopping(name))
        calls_left = last
        status = prepared(folder, NEW)
        monkeypatch.undo()
        assert not list(folder.glob(".prepare-*"))
        if (folder / "meta.json").exists():
            assert is_whole(folder)
            outcomes.append(read_meta(folder).inputs[0].sha256)
        else:
            with pytest.raises(DataError, match="prepare the data first"):
                open_split(folder, "train")
            outcomes.append("nothing")
        if status == 0:
            break
        assert status == 130
        assert "stopped" in capsys.readouterr().err
    old, new = (hashlib.sha256(text.encode()).hexdigest() for text in (OLD, NEW))
    # The old data while files are written, nothing while they are moved, and then the new: never another order.
    assert outcomes == sorted(outcomes, key=[old, "nothing", new].index)
    assert set(outcomes) == {old, "nothing", new}
    assert outcomes.count("nothing") >= 4
