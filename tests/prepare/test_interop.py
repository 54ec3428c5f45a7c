"""interop.py: files of nanoGPT, DLRover and llm.c are read as they are, and no code in them is run."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from prepare import interop, tokens
from prepare.data import find_tokenizer, load_tokenizer, open_split, read_meta, save_tokenizer
from prepare.interop import read_meta_pkl
from prepare.prepare import main
from prepare.tokenizer import gpt2
from prepare.tokens import DataError, fingerprint

TEXT = "To be, or not to be: that is the question. " * 30


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    interop._say.cache_clear()
    return tmp_path / "cache" / "elastic-gpt"


def write(path: Path, ids: list[int], header: tuple[int, int] | None = None, dtype: str = "<u2") -> None:
    start = np.zeros(256, dtype="<i4")
    start[:3] = (*header, len(ids)) if header else 0
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((start.tobytes() if header else b"") + np.array(ids, dtype=dtype).tobytes())


def characters_as_dlrover(folder: Path, text: str = TEXT) -> Path:
    """What DLRover's prepare.py, and nanoGPT's for characters, leaves behind."""
    characters = sorted(set(text))
    stoi = {character: i for i, character in enumerate(characters)}
    border = int(len(text) * 0.9)
    write(folder / "train.bin", [stoi[character] for character in text[:border]])
    write(folder / "val.bin", [stoi[character] for character in text[border:]])
    fields = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(fields))
    return folder


def ours(folder: Path, tokenizer: str) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    assert main([str(folder / "text.txt"), "--tokenizer", tokenizer]) == 0
    return folder


def test_dlrovers_characters_are_read_and_decoded_as_ours(tmp_path: Path) -> None:
    folder = characters_as_dlrover(tmp_path / "dlrover")
    same = ours(tmp_path / "ours", "char")
    meta = read_meta(folder)
    assert fingerprint(meta) == fingerprint(read_meta(same))
    assert (meta.vocab_size, meta.dtype, meta.eot_id) == (len(set(TEXT)), "uint16", None)
    for split in ("train", "val"):
        np.testing.assert_array_equal(open_split(folder, split), open_split(same, split))
        assert meta.splits[split].tokens == read_meta(same).splits[split].tokens
    tokenizer = find_tokenizer(folder)
    assert tokenizer
    assert tokenizer.decode(open_split(folder, "train")) == TEXT[: int(len(TEXT) * 0.9)]


def test_nanogpts_headerless_files_are_taken_for_gpt2_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = gpt2().encode(TEXT).tolist()
    for split in ("train", "val"):
        write(tmp_path / "data" / f"{split}.bin", [*ids, 50256, 50256, *ids, 50256])
    meta = read_meta(tmp_path / "data")
    read_meta(tmp_path / "data")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "taken for nanoGPT's files with GPT-2's 50,257 ids" in said
    assert (meta.vocab_size, meta.eot_id, meta.splits["val"].documents) == (50257, 50256, 2)
    tokenizer = find_tokenizer(tmp_path / "data")
    assert tokenizer
    assert tokenizer.decode(open_split(tmp_path / "data", "val")[: len(ids)]) == TEXT


@pytest.mark.parametrize("names", ["{}", "tiny_shakespeare_{}", "fineweb_{}_000001"])
def test_llmcs_header_is_not_read_as_ids(tmp_path: Path, names: str) -> None:
    same = ours(tmp_path / "ours", "gpt2")
    for split in ("train", "val"):
        path = tmp_path / "llmc" / f"{names.format(split)}.bin"
        write(path, open_split(same, split).tolist(), (20240520, 1))
    ids = open_split(tmp_path / "llmc", "train")
    assert isinstance(ids, np.memmap)
    np.testing.assert_array_equal(ids, open_split(same, "train"))
    assert fingerprint(read_meta(tmp_path / "llmc")) == fingerprint(read_meta(same))


def test_llama_ids_of_llmc_are_uint32(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / f"{split}.bin", [128_000, 1, 70_000], (20240801, 7), "<u4")
    meta = read_meta(tmp_path)
    assert (meta.dtype, meta.vocab_size, meta.eot_id, meta.tokenizer.kind) == ("uint32", 128_256, 128_000, "unknown")
    assert open_split(tmp_path, "val").tolist() == [128_000, 1, 70_000]
    assert find_tokenizer(tmp_path) is None


def test_damaged_or_mixed_files_of_others_are_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_split(tmp_path, "train")

    write(tmp_path / "train.bin", [1, 2, 3])
    refused(r"has train tokens only")
    write(tmp_path / "val.bin", [1, 2, 3], (20240520, 1))
    refused("different formats")
    write(tmp_path / "val.bin", [1, 50_257])
    refused(r"val.bin has the id 50257, and the vocabulary of gpt2 ends at 50256")
    (tmp_path / "val.bin").write_bytes(b"odd")
    refused("3 bytes, not a whole number of uint16 ids")
    (tmp_path / "val.bin").write_bytes(b"")
    refused("0 bytes")
    write(tmp_path / "val.bin", [1, 2, 3], (20240520, 2))
    refused("llm.c's version 2, this program reads 1")
    write(tmp_path / "val.bin", [1, 2, 3], (20240520, 1))
    os.truncate(tmp_path / "val.bin", 1024 + 4)
    refused(r"has 1,028 bytes, its header says 1,030")
    (tmp_path / "val.bin").unlink()
    for number in range(2):
        write(tmp_path / f"x_val_{number:06d}.bin", [1], (20240520, 1))
    refused(r"2 files for val: join them, elastic-gpt convert .* --format nanogpt")


def test_our_own_folder_that_lost_its_meta_is_not_taken_for_nanogpts(tmp_path: Path) -> None:
    folder = ours(tmp_path / "ours", "gpt2")
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match=r"no meta.json"):
        read_meta(folder)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_no_program(tmp_path: Path, protocol: int) -> None:
    folder = characters_as_dlrover(tmp_path / "data")
    fields = {"vocab_size": 26, "itos": {}, "stoi": {}, "more": Evil(tmp_path / "owned")}
    (folder / "meta.pkl").write_bytes(pickle.dumps(fields, protocol))
    with pytest.raises(DataError, match=r"meta.pkl asks for (posix|nt).mkdir, which no vocabulary needs: do not trust"):
        open_split(folder, "train")
    assert not (tmp_path / "owned").exists()
    pickle.loads((folder / "meta.pkl").read_bytes())
    assert (tmp_path / "owned").exists()  # so it was not the pickle that failed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a pickle"),
        (b"garbage", "is not a pickle"),
        (pickle.dumps({"vocab_size": 65})[:-3], "is not a pickle"),
        (pickle.dumps([65]), "has no vocab_size"),
        (pickle.dumps({"vocab_size": "65"}), "has no vocab_size .* but '65'"),
        (pickle.dumps({"vocab_size": True}), "but True"),
        (pickle.dumps({"vocab_size": 1 << 20}), "but 1048576"),
        (pickle.dumps({"vocab_size": np.int64(65)}), r"asks for numpy"),
    ],
)
def test_a_meta_pkl_that_is_something_else_is_an_error_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_meta_pkl(tmp_path / "meta.pkl")


@pytest.mark.parametrize("itos", [None, {}, {0: "b", 1: "a"}, {0: "a", 1: "a"}, {0: "a", 1: "word"}, {0: 1, 1: 2}, [3]])
def test_a_vocabulary_that_is_not_of_sorted_characters_is_not_decoded(tmp_path: Path, itos: object) -> None:
    for split in ("train", "val"):
        write(tmp_path / f"{split}.bin", [0, 1])
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": itos}))
    assert read_meta(tmp_path).tokenizer.kind == "unknown"
    assert find_tokenizer(tmp_path) is None
    assert open_split(tmp_path, "train").tolist() == [0, 1]


def test_a_foreign_folder_is_read_once_and_never_written_to(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = characters_as_dlrover(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    first = read_meta(folder)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
    assert len(list(cache.iterdir())) == 2

    interop._scan_or_recall.cache_clear()
    scans = []
    real = interop._scan
    monkeypatch.setattr(interop, "_scan", lambda *args: scans.append(args) or real(*args))
    assert read_meta(folder) == first
    assert not scans

    data = bytearray((folder / "val.bin").read_bytes())
    data[0] ^= 1
    (folder / "val.bin").write_bytes(data)
    os.utime(folder / "val.bin", ns=(before[folder / "val.bin"],) * 2)  # as a copy that keeps times does
    assert fingerprint(read_meta(folder)) != fingerprint(first)
    assert len(scans) == 1


@pytest.mark.parametrize("content", ["", "{", '{"sha256": 1}', "[]"])
def test_a_damaged_cache_is_not_believed(tmp_path: Path, cache: Path, content: str) -> None:
    folder = characters_as_dlrover(tmp_path / "data")
    first = read_meta(folder)
    for path in cache.iterdir():
        path.write_text(content)
    interop._scan_or_recall.cache_clear()
    assert read_meta(folder) == first


def test_reading_needs_no_home_to_remember_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = characters_as_dlrover(tmp_path / "data")
    assert read_meta(folder).vocab_size == len(set(TEXT))


@pytest.mark.parametrize("kind", ["dlrover", "nanogpt", "gpt2", "char", "byte"])
def test_the_tokenizer_travels_with_the_model(tmp_path: Path, kind: str) -> None:
    if kind == "dlrover":
        folder = characters_as_dlrover(tmp_path / "data")
    else:
        folder = ours(tmp_path / "data", "gpt2" if kind == "nanogpt" else kind)
        if kind == "nanogpt":
            (folder / "meta.json").unlink()
            shutil.rmtree(folder / "tokenizer")
    target = tmp_path / "run"
    target.mkdir()
    save_tokenizer(folder, target)
    start = open_split(folder, "train")[:100]
    shutil.move(folder, tmp_path / "gone")
    assert load_tokenizer(target).decode(start) == TEXT[: len(load_tokenizer(target).decode(start))]
    assert json.loads((target / "meta.json").read_text())["format_version"] == tokens.FORMAT_VERSION
