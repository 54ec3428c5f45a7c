"""Token files of other tools, nanoGPT, DLRover and llm.c, read as if they were ours. (convert.py writes them.)

nanoGPT   train.bin, val.bin of uint16 without a header; meta.pkl where a token is a character, else GPT-2's ids
DLRover   the same, always with meta.pkl
llm.c     *train*.bin, *val*.bin: 256 int32 (magic, version, tokens, zeros), then ids; in shards where they are many

None of them has a meta.json or a fingerprint, so their ids are read through once and what was found
is remembered in the user's cache. Nothing is ever written into their folder.
"""

import functools
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from rich.filesize import decimal

from prepare.ranks import END_OF_TEXT
from prepare.tokenizer import FOLDER, Characters, Tokenizer, gpt2
from prepare.tokens import (
    FORMAT_VERSION,
    META,
    DataError,
    Meta,
    Split,
    SplitRule,
    TokenizerSection,
    blocks,
    document_lengths,
    open_ids,
    user_cache,
)

HEADER_BYTES = 256 * 4
_MAX_PICKLE_BYTES = 64 << 20  # all of Unicode takes 25 MB


@dataclass(frozen=True)
class Kind:
    """One kind of llm.c's headers, and what the ids behind it are."""

    magic: int
    version: int
    dtype: str
    tokenizer: str
    vocab_size: int
    eot_id: int
    """The id before each document."""


KINDS = (
    Kind(20240520, 1, "uint16", "gpt2", 50_257, 50_256),
    Kind(20240801, 7, "uint32", "llama-3", 128_256, 128_000),
)
GPT2 = KINDS[0]


def foreign_meta(folder: Path) -> Meta | None:
    """Describes a folder that another tool prepared, as meta.json would. None if it has no token files.

    Raises DataError if the files do not fit together, or an id is not in their vocabulary.
    """
    if (folder / FOLDER).is_dir():  # our own folder, without its meta.json
        return None
    files = {split: token_files(folder, split) for split in ("train", "val")}
    found = [split for split in files if files[split]]
    if not found:
        return None
    if len(found) == 1:
        raise DataError(f"{folder} has {found[0]} tokens only: training needs a train.bin and a val.bin")
    for split, shards in files.items():
        if len(shards) > 1:
            raise DataError(
                f"{folder} has {len(shards)} files for {split}: join them, "
                f"elastic-gpt convert {folder} NEW_FOLDER --format nanogpt"
            )
    kinds = {split: kind_of(shards[0]) for split, shards in files.items()}
    kind = kinds["train"]
    if kinds["val"] != kind:
        raise DataError(f"{folder} holds train and val of different formats: prepare them together")

    characters, vocab_size = None, (kind or GPT2).vocab_size
    if (folder / "meta.pkl").exists() and not kind:
        vocab_size, characters = read_meta_pkl(folder / "meta.pkl")
        name = "char" if characters is not None else "unknown"
        section, eot_id = TokenizerSection(name, name, None, None, None, {}), None
    else:
        section, eot_id = _section(kind or GPT2), (kind or GPT2).eot_id
    if not kind and section.name == "gpt2":
        _say(f"note: {folder} has neither {META} nor meta.pkl: taken for nanoGPT's files with GPT-2's 50,257 ids")

    splits = {}
    for split, (path,) in files.items():
        scan = _scanned(path, eot_id)
        if scan.largest >= vocab_size:
            raise DataError(
                f"{path} has the id {scan.largest}, and the vocabulary of {section.name} ends at {vocab_size - 1}: "
                "prepare the data again with elastic-gpt prepare"
            )
        splits[split] = Split(path.name, scan.tokens, scan.documents, 0, scan.sha256)
    total = sum(split.tokens for split in splits.values())
    return Meta(
        format_version=FORMAT_VERSION,
        dtype=kind.dtype if kind else "uint16",
        vocab_size=vocab_size,
        tokenizer=section,
        eot_id=eot_id,
        splits=splits,
        inputs=[],
        split=SplitRule("unknown", None, splits["val"].tokens / total),
        tools={"llm.c" if kind else "nanoGPT or DLRover": "unknown"},
    )


def header_bytes(path: Path) -> int:
    """The byte at which the ids of another tool's file begin."""
    return HEADER_BYTES if kind_of(path) else 0


def read_meta_pkl(path: Path) -> tuple[int, list[str] | None]:
    """The vocabulary size in a meta.pkl, and its characters in order of their ids (None if they are not sorted).

    A pickle is a program. This reader lets it make numbers, strings, lists and dicts, and raises
    DataError as soon as it names anything else, before that is imported.
    """
    if path.stat().st_size > _MAX_PICKLE_BYTES:
        raise DataError(
            f"{path} has {decimal(path.stat().st_size)}, no vocabulary of characters is that large: prepare the data again"
        )
    try:
        with path.open("rb") as file:
            fields = _PlainUnpickler(file).load()
    except DataError as error:
        raise DataError(f"{path} {error}: do not trust it, prepare the data anew with elastic-gpt prepare") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise DataError(f"{path} is not a pickle ({type(error).__name__}): prepare the data again") from error
    size = fields.get("vocab_size") if isinstance(fields, dict) else None
    if type(size) is not int or not 0 < size <= 1 << 16:
        raise DataError(f"{path} has no vocab_size from 1 to 65,536, but {size!r}: prepare the data again")
    itos = fields.get("itos")
    try:
        characters = [itos[i] for i in range(size)]
        plain = len(itos) == size and all(len(character) == 1 for character in characters)
        return size, characters if plain and characters == sorted(set(characters)) else None
    except (KeyError, IndexError, TypeError):
        return size, None


def foreign_tokenizer(folder: Path, name: str) -> Tokenizer | None:
    """The tokenizer `name` of another tool's folder; None if the tool did not leave it there."""
    if name == "gpt2":
        return gpt2()
    return Characters(read_meta_pkl(folder / "meta.pkl")[1] or []) if name == "char" else None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"asks for {module}.{name}, which no vocabulary needs")


def _section(kind: Kind) -> TokenizerSection:
    known = kind.tokenizer == "gpt2"
    specials = {END_OF_TEXT: kind.eot_id} if known else {}
    return TokenizerSection("bpe" if known else "unknown", kind.tokenizer, None, None, None, specials)


def token_files(folder: Path, split: str) -> list[Path]:
    """The token files of one split: nanoGPT's single file, or llm.c's shards in order."""
    if (folder / f"{split}.bin").is_file():
        return [folder / f"{split}.bin"]
    return [path for path in sorted(folder.glob(f"*{split}*.bin")) if kind_of(path)]


def kind_of(path: Path) -> Kind | None:
    """The kind of llm.c header that a file has; None if it has none. Raises DataError if it does not fit the file."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    size = path.stat().st_size
    if len(header) == HEADER_BYTES:
        magic, version, tokens = header.view("<i4")[:3].tolist()
        for kind in KINDS:
            if magic != kind.magic:  # as ids these bytes are in neither vocabulary, so it is not a file of nanoGPT
                continue
            if version != kind.version:
                raise DataError(
                    f"{path} is of llm.c's version {version}, this program reads {kind.version}: make it again"
                )
            expected = HEADER_BYTES + tokens * np.dtype(kind.dtype).itemsize
            if size != expected:
                raise DataError(f"{path} has {size:,} bytes, its header says {expected:,}: make or copy it again")
            return kind
    if size % 2 or not size:
        raise DataError(f"{path} has {size:,} bytes, not a whole number of uint16 ids: make or copy it again")
    return None


@dataclass(frozen=True)
class _Scan:
    """What was found when all ids of a file were read."""

    sha256: str
    tokens: int
    documents: int
    largest: int


def _scanned(path: Path, eot_id: int | None) -> _Scan:
    """Reads a file once. The result stays in the user's cache until the file changes."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, eot_id]
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return _scan_or_recall(path, eot_id, name)


@functools.cache
def _scan_or_recall(path: Path, eot_id: int | None, name: str) -> _Scan:
    cached = user_cache() / f"{name}.json"
    try:
        return _Scan(**json.loads(cached.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    if path.stat().st_size > 100 << 20:
        _say(f"reading {path} once for its fingerprint: {decimal(path.stat().st_size)}, a second or two per gigabyte")
    scan = _scan(path, eot_id)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(asdict(scan)))
        aside.rename(cached)
    except OSError:
        pass  # without a cache the file is read again next time
    return scan


def _scan(path: Path, eot_id: int | None) -> _Scan:
    digest, tokens, largest = hashlib.sha256(), 0, -1

    def read() -> Iterator[np.ndarray]:
        nonlocal tokens, largest
        for block in blocks(open_tokens(path)):
            digest.update(block.data)
            tokens += len(block)
            largest = max(largest, int(block.max()))
            yield block

    documents = sum(len(lengths) for lengths in document_lengths(read(), eot_id))
    return _Scan(digest.hexdigest(), tokens, documents, largest)


def open_tokens(path: Path) -> np.memmap:
    """The ids of another tool's file, behind the header if it has one, as a read-only memmap of shape (tokens,)."""
    kind = kind_of(path)
    return open_ids(path, kind.dtype if kind else "uint16", offset=HEADER_BYTES if kind else 0)


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
