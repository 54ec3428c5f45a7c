"""tokens.py: the files are as meta.json says, or there is no meta.json."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prepare import tokens
from prepare.data import open_split, read_meta
from prepare.prepare import main
from prepare.tokens import DataError, blocks, document_lengths, fingerprint, own_version

OLD = "old " * 100
NEW = "new " * 100  # as long as the old: sizes cannot tell a mixed folder


def prepared(folder: Path, text: str, tokenizer: str = "char") -> int:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text)
    return main([str(folder / "text.txt"), "--tokenizer", tokenizer])


def is_whole(folder: Path) -> bool:
    """Whether every file that meta.json names is the one that it was written for."""
    meta = read_meta(folder)
    named = [(split.file, split.sha256) for split in meta.splits.values()]
    if meta.tokenizer.file:
        named.append((meta.tokenizer.file, str(meta.tokenizer.sha256)))
    return all(hashlib.sha256((folder / file).read_bytes()).hexdigest() == sha256 for file, sha256 in named)


def test_files_keep_the_contract(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_fit_their_type(size: int, dtype: str) -> None:
    assert tokens.dtype_for(size) == dtype
    assert np.iinfo(dtype).max >= size - 1


def test_new_folder_says_which_version_reads_it(tmp_path: Path) -> None:
    prepared(tmp_path, OLD)
    assert read_meta(tmp_path).tools["elastic-gpt"] == own_version()


def test_fingerprint_is_that_of_the_ids_alone(tmp_path: Path) -> None:
    for name, text in (("one", OLD), ("same", OLD), ("other", NEW)):
        prepared(tmp_path / name, text)
    one, same, other = (read_meta(tmp_path / name) for name in ("one", "same", "other"))
    assert one.inputs != same.inputs
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(replace(one, dtype="uint32"))


@pytest.mark.parametrize("tokenizer", ["char", "byte"])  # byte: no folder that tells ours from nanoGPT's
@pytest.mark.parametrize("over_old_data", [True, False])
def test_stop_while_publishing_leaves_old_new_or_unfinished(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    over_old_data: bool,
    tokenizer: str,
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

    outcomes = []
    for last in range(1, 100):
        monkeypatch.undo()
        folder = tmp_path / f"data{last}"
        if over_old_data:
            assert prepared(folder, OLD, tokenizer) == 0
        for name in real:
            monkeypatch.setattr(os, name, stopping(name))
        calls_left = last
        status = prepared(folder, NEW, tokenizer)
        monkeypatch.undo()
        try:
            outcomes.append(read_meta(folder).inputs[0].sha256)
        except DataError as err:
            outcomes.append("half" if "is half-written, prepare was stopped there" in str(err) else "nothing")
        else:
            assert is_whole(folder)
        if status == 0:
            break
        assert status == 130
        assert "stopped" in capsys.readouterr().err
    old, new = (hashlib.sha256(text.encode()).hexdigest() for text in (OLD, NEW))
    # The old data while files are written, none while they are moved, and then the new: never another order.
    before = old if over_old_data else "nothing"
    assert outcomes == sorted(outcomes, key=[before, "half", new].index)
    assert set(outcomes) == {before, "half", new}
    assert outcomes.count("half") >= 4


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_blocks_hold_each_id_once(tmp_path: Path, size: int) -> None:
    prepared(tmp_path, OLD)
    ids = open_split(tmp_path, "train")
    for start, stop in ((0, None), (5, 17), (0, 0), (350, 360)):
        np.testing.assert_array_equal(np.concatenate([ids[:0], *blocks(ids, start, stop, size)]), ids[start:stop])


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 7))
def test_documents_are_not_cut_where_blocks_are(ids: list[int], size: int) -> None:
    parts = [np.array(ids[at : at + size]) for at in range(0, len(ids), size)]
    lengths = [int(n) for part in document_lengths(parts, 2) for n in part]
    texts = "".join(map(str, ids)).split("2")
    assert lengths == [len(text) for text in texts if text]
    assert sum(int(n) for part in document_lengths(parts, None) for n in part) == len(ids)
