"""verify.py: what is wrong is found and named, and what is right is never called wrong."""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prepare import verify as module
from prepare.data import load_tokenizer, open_split
from prepare.prepare import main
from prepare.tokenizer import gpt2
from prepare.tokens import META
from prepare.verify import Vocabulary, encoded_again, verify
from tests.prepare.conftest import ENGLISH
from tests.prepare.test_interop import write

MIXED = ENGLISH + "Größe 漢字仮名交じり文。" * 50 + "    indented\n\n\tcode(x) = 'it\\'s'  \n" * 50 + "🙂 é̂  \r\n" * 50


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Path]:
    def call(tokenizer: str = "gpt2", *texts: str) -> Path:
        folder = tmp_path / tokenizer
        folder.mkdir()
        for number, text in enumerate(texts or (MIXED,)):
            (folder / f"{number}.txt").write_bytes(text.encode())
        inputs = [str(folder / f"{number}.txt") for number in range(len(texts) or 1)]
        more = ["--vocab-size", {"bpe": "400", "word": "30"}[tokenizer]] if tokenizer in ("bpe", "word") else []
        assert main([*inputs, "--tokenizer", tokenizer, *more]) == 0
        return folder

    return call


def wrong(folder: Path) -> list[str]:
    return [finding.text for finding in verify(folder) if finding.good is False]


def change_meta(folder: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads((folder / META).read_text())
    change(fields)
    (folder / META).write_text(json.dumps(fields))


def change_ids(folder: Path, change: Callable[[np.ndarray], object], *, forge: bool = True) -> None:
    """Changes train.bin; with its sha256, unless that is to tell."""
    path = folder / "train.bin"
    ids = np.fromfile(path, dtype="<u2")
    change(ids)
    ids.tofile(path)
    if forge:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        change_meta(folder, lambda fields: fields["splits"]["train"].update(sha256=sha256))


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe", "char", "byte"])
@pytest.mark.parametrize("samples", [(64, 8192), (9, 40)])
def test_good_data_is_called_good(
    prepared: Callable[..., Path], tokenizer: str, samples: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLES", samples[0])
    monkeypatch.setattr(module, "SAMPLE_TOKENS", samples[1])
    folder = prepared(tokenizer, MIXED, "漢字" * 3000, " ", ENGLISH)
    findings = list(verify(folder))
    assert [finding.text for finding in findings if finding.good is not True] == []
    assert sum("the reference makes of their text" in finding.text for finding in findings) == 2
    assert findings[-1].text.startswith("the text is that of the inputs, byte for byte")


def test_words_that_are_not_in_the_vocabulary_are_not_called_wrong(prepared: Callable[..., Path]) -> None:
    findings = list(verify(prepared("word", MIXED, ENGLISH)))
    assert [finding.text for finding in findings if finding.good is False] == []
    assert any("words are <unk>, so its text cannot be compared" in finding.text for finding in findings)
    assert sum("the reference makes of their text" in finding.text for finding in findings) == 2


@pytest.mark.parametrize("flags", [["--split", "hash", "--val-fraction", "0.4"], ["--errors", "replace"]])
def test_text_in_another_order_or_repaired_is_called_good(tmp_path: Path, flags: list[str]) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(
            b"\xff" + MIXED[number:].encode() if "replace" in flags else b"a b " * number + b"c"
        )
    assert main([str(tmp_path), "--output-dir", str(tmp_path / "data"), *flags]) == 0
    assert wrong(tmp_path / "data") == []
    assert any("was repaired, or does not lie in their order" in finding.text for finding in verify(tmp_path / "data"))


def test_blanks_that_tiktoken_cannot_bear_are_called_good(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" " * 450_000 + ENGLISH)
    assert main([str(tmp_path / "text.txt"), "--engine", "fast"]) == 0
    assert wrong(tmp_path) == []


@pytest.mark.parametrize("at", [0, 1, 700, -1])
def test_a_flipped_byte_is_found(prepared: Callable[..., Path], at: int) -> None:
    folder = prepared("char")
    data = bytearray((folder / "val.bin").read_bytes())
    data[at] ^= 1
    (folder / "val.bin").write_bytes(data)
    assert any(text.startswith("val.bin: was changed: its sha256 is not the one recorded") for text in wrong(folder))


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
def test_changed_text_with_a_forged_sha256_is_found(prepared: Callable[..., Path], tokenizer: str) -> None:
    folder = prepared(tokenizer)
    change_ids(folder, lambda ids: ids.__setitem__(slice(3, 5), ids[[4, 3]]))
    assert wrong(folder)[-1].startswith("the text is not that of ")


def test_a_truncated_file_is_found(prepared: Callable[..., Path]) -> None:
    folder = prepared()
    os.truncate(folder / "train.bin", 100)
    assert len(wrong(folder)) == 1
    assert "train.bin has 100 bytes, meta.json says" in wrong(folder)[0]
    (folder / "val.bin").unlink()
    assert "val.bin is missing" in wrong(folder)[1]


def test_an_id_out_of_range_is_found(prepared: Callable[..., Path]) -> None:
    folder = prepared()
    change_ids(folder, lambda ids: ids.__setitem__(300, 50_257))
    assert wrong(folder) == ["train.bin: token 300 is 50257, and ids go from 0 to 50256; prepare the data again"]


def test_another_tokenizers_file_is_found(prepared: Callable[..., Path]) -> None:
    folder = prepared("char")
    (folder / "tokenizer" / "characters.json").write_text(json.dumps("".join(sorted(set(MIXED)))[::-1]))
    assert "is not the file that the data was made with (sha256 differs)" in wrong(folder)[0]


def test_ids_of_another_tokenizer_are_found(prepared: Callable[..., Path]) -> None:
    """The same size, all ids in range, hashes in order; but two merges changed places."""
    folder = prepared("bpe")
    path = folder / "tokenizer" / "ranks.tiktoken"
    lines = path.read_bytes().splitlines()
    tokens = [line.split()[0] for line in lines]
    long = [i for i, token in enumerate(tokens) if len(base64.b64decode(token)) == 2]
    tokens[long[0]], tokens[long[1]] = tokens[long[1]], tokens[long[0]]
    path.write_bytes(b"".join(b"%s %d\n" % (token, i) for i, token in enumerate(tokens)))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    change_meta(folder, lambda fields: fields["tokenizer"].update(sha256=sha256))
    assert any("the text is not that of" in text or "the text is not UTF-8" in text for text in wrong(folder))

    change_meta(folder, lambda fields: fields["tokenizer"].update(name="gpt2"))
    assert any("is called gpt2, and is not what the world calls so" in finding.text for finding in verify(folder))
    change_meta(folder, lambda fields: fields.update(vocab_size=500))
    assert re.search(r"the gpt2 tokenizer has 3\d\d ids, meta.json says 500", wrong(folder)[0])


def test_ids_that_decode_right_and_are_not_the_tokenizers_are_found(prepared: Callable[..., Path]) -> None:
    """As of a fast engine that errs: hashes and text are in order, and only encoding again can tell."""
    folder = prepared("gpt2", ENGLISH * 5)
    tokenizer = gpt2()
    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    at = int(np.flatnonzero(ids == tokenizer.encode(" quick")[0])[20])
    pair = np.concatenate([tokenizer.encode(" qu"), tokenizer.encode("ick")])
    assert tokenizer.decode(pair) == " quick"
    np.concatenate([ids[:at], pair, ids[at + 1 :]]).astype("<u2").tofile(folder / "train.bin")
    sha256 = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    change = {"sha256": sha256, "tokens": len(ids) - 1 + len(pair)}
    change_meta(folder, lambda fields: fields["splits"]["train"].update(change))
    (found,) = wrong(folder)
    assert found.startswith(
        f"train.bin: token {at:,} is {pair[0]} ' qu', where the gpt2 tokenizer has {ids[at]} ' quick'"
    )


def test_half_a_character_is_found(prepared: Callable[..., Path]) -> None:
    folder = prepared("byte", "aé" * 200)

    change_ids(folder, lambda ids: ids.__setitem__(slice(-2, None), [ord("a"), 0xC3]))
    assert "train.bin: the text ends within a character; prepare the data again" in wrong(folder)
    change_ids(folder, lambda ids: ids.__setitem__(100, 0xFF))
    assert any("the text is not UTF-8" in text for text in wrong(folder))


def test_characters_across_documents_are_whole(tmp_path: Path) -> None:
    """The bytes of one character, divided by an end of text: each document is torn, the whole is not."""
    tokenizer = gpt2()
    first, second = tokenizer.encode("漢")[:1].tolist(), tokenizer.encode("漢")[1:].tolist()
    for split in ("train", "val"):
        write(tmp_path / "data" / f"{split}.bin", [262, *first, 50256, *second, 262])
    assert "the document at token 3 begins within a character" in wrong(tmp_path / "data")[0]


def test_too_large_a_vocabulary_for_its_type_is_found(prepared: Callable[..., Path]) -> None:
    folder = prepared("char")
    change_meta(folder, lambda fields: fields.update(vocab_size=70_000))
    assert "a vocabulary of 70,000 does not fit the ids, which are uint16" in wrong(folder)
    (folder / META).write_text("{")
    assert "is not JSON" in wrong(folder)[0]


@pytest.mark.slow
def test_foreign_files_may_begin_and_end_within_words(tmp_path: Path) -> None:
    ids = gpt2().encode(MIXED * 3).tolist()
    for start in range(40):
        write(tmp_path / "data" / "train.bin", ids[600 + start : -start - 1])
        write(tmp_path / "data" / "val.bin", ids[:100])
        assert wrong(tmp_path / "data") == []
    shutil.copy(tmp_path / "data" / "val.bin", tmp_path / "data" / "train.bin")
    write(tmp_path / "data" / "val.bin", [*ids[:50], *(262 for _ in range(50)), 64, 65, 65, *ids[:50]])
    assert any("val.bin: token" in text and "where the gpt2 tokenizer has" in text for text in wrong(tmp_path / "data"))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(gpt2(), 50256)


@given(st.text(st.sampled_from("aA1é漢' .\n\tslt(\r🙂\u00a0\u3000"), max_size=60))
@example(" .'s")  # a contraction, but only where nothing stands before it
@settings(max_examples=500)
def test_text_cut_at_a_border_has_the_same_ids(vocabulary: Vocabulary, text: str) -> None:
    tokenizer = vocabulary.tokenizer
    ids = tokenizer.encode(text)
    for border in vocabulary.borders(ids).tolist():
        parts = [tokenizer.encode(tokenizer.decode(part)) for part in (ids[:border], ids[border:])]
        np.testing.assert_array_equal(np.concatenate(parts), ids)


@given(text=st.text(max_size=60), data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sample_may_begin_anywhere(tmp_path: Path, vocabulary: Vocabulary, text: str, data: st.DataObject) -> None:
    ids = vocabulary.tokenizer.encode(text + " the end")
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    opened = np.memmap(tmp_path / "ids.bin", dtype="<u2", mode="r")
    assert encoded_again(opened, "ids.bin", vocabulary, edges_are_borders=True).good
    start = data.draw(st.integers(0, len(ids) - 1))
    part = np.memmap(tmp_path / "ids.bin", dtype="<u2", mode="r", offset=2 * start)
    assert encoded_again(part, "ids.bin", vocabulary, edges_are_borders=False).good is not False


def test_the_folder_alone_is_enough(prepared: Callable[..., Path]) -> None:
    folder = prepared("gpt2", ENGLISH, MIXED)
    for number in range(2):
        (folder / f"{number}.txt").unlink()
    assert wrong(folder) == []
    assert load_tokenizer(folder).decode(open_split(folder, "train")[:4]) == ENGLISH[:19]
