"""convert.py: other trainers get files like those that they write themselves."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from prepare.convert import llmc_header, main, meta_pkl, write_llmc, write_nanogpt
from prepare.data import open_split, read_meta
from prepare.prepare import main as prepare
from prepare.tokens import DataError, fingerprint
from tests.prepare.conftest import ENGLISH
from tests.prepare.test_interop import characters_as_dlrover, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepared(folder: Path, tokenizer: str, text: str = ENGLISH) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    assert prepare([str(folder / "text.txt"), "--tokenizer", tokenizer]) == 0
    return folder


def test_meta_pkl_is_the_one_that_dlrover_writes(tmp_path: Path) -> None:
    theirs = characters_as_dlrover(tmp_path / "theirs", ENGLISH)
    write_nanogpt(prepared(tmp_path / "ours", "char"), tmp_path / "out")
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (theirs / name).read_bytes()
    fields = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())  # as they do
    assert fields == pickle.loads((theirs / "meta.pkl").read_bytes())
    assert list(fields) == ["vocab_size", "itos", "stoi"]
    assert pickle.loads(meta_pkl(2, "ab")) == {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}


@pytest.mark.parametrize(("tokenizer", "size"), [("gpt2", None), ("byte", 256)])
def test_nanogpt_is_told_every_vocabulary_that_is_not_gpt2s(tmp_path: Path, tokenizer: str, size: int | None) -> None:
    write_nanogpt(prepared(tmp_path / "ours", tokenizer), tmp_path / "out")
    path = tmp_path / "out" / "meta.pkl"
    assert (pickle.loads(path.read_bytes())["vocab_size"] if path.exists() else None) == size


def test_the_header_passes_llmcs_checks(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "ours", "gpt2")
    write_llmc(folder, tmp_path / "out")
    ids = open_split(folder, "train")
    data = (tmp_path / "out" / "train.bin").read_bytes()
    assert struct.unpack("<256i", data[:1024]) == (20240520, 1, len(ids), *[0] * 253)
    assert data[1024:] == ids.tobytes()
    assert struct.unpack("<256i", llmc_header("uint32", 5)) == (20240801, 7, 5, *[0] * 253)
    assert fingerprint(read_meta(tmp_path / "out")) == fingerprint(read_meta(folder))


def test_shards_hold_all_tokens_in_order(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "ours", "gpt2")
    ids = open_split(folder, "train")
    names = [path.name for path in write_llmc(folder, tmp_path / "shards", shard_tokens=100)]
    assert names[:2] == ["train_000000.bin", "train_000001.bin"]
    assert sum(name.startswith("train") for name in names) == -(-len(ids) // 100)
    with pytest.raises(DataError, match="join them"):
        open_split(tmp_path / "shards", "train")
    write_nanogpt(tmp_path / "shards", tmp_path / "joined")
    for split in ("train", "val"):
        np.testing.assert_array_equal(open_split(tmp_path / "joined", split), open_split(folder, split))


def test_ids_that_do_not_fit_and_folders_that_hold_data_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        write(tmp_path / "llama" / f"{split}.bin", [70_000], (20240801, 7), "<u4")
    assert main([str(tmp_path / "llama"), str(tmp_path / "out"), "--format", "nanogpt"]) == 2
    assert "ids of uint32, and nanoGPT reads uint16" in capsys.readouterr().err
    assert main([str(tmp_path / "llama"), str(tmp_path / "out"), "--format", "llm.c"]) == 0
    assert "1,028 bytes" in capsys.readouterr().out
    before = (tmp_path / "out" / "train.bin").stat()
    for target in ("out", "llama"):
        assert main([str(tmp_path / "llama"), str(tmp_path / target), "--format", "llm.c"]) == 2
        assert "holds data already" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.bin").stat() == before
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new"), "--format", "llm.c"]) == 2
    assert "prepare the data first" in capsys.readouterr().err


def test_a_stopped_conversion_leaves_nothing_that_passes_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops at each write and each rename; then the same command goes through, over what a kill left."""
    folder = prepared(tmp_path / "ours", "char")
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    calls_left = 0

    def stopping(name: str):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                raise KeyboardInterrupt
            return real[name](*args)

        return call

    for last in range(1, 7):
        target = tmp_path / f"out{last}"
        for name in real:
            monkeypatch.setattr(os, name, stopping(name))
        calls_left = last
        with pytest.raises(KeyboardInterrupt):
            write_nanogpt(folder, target)
        monkeypatch.undo()
        with pytest.raises(DataError):
            read_meta(target)
        for path in target.iterdir():
            path.unlink()
        (target / ".unfinished").mkdir()
        (target / ".unfinished" / "old.bin").write_text("left by kill -9")
        assert [path.name for path in write_nanogpt(folder, target)] == ["meta.pkl", "train.bin", "val.bin"]
        assert not (target / ".unfinished").exists()
