"""The disk contract alone: train.bin, val.bin, meta.json; write them whole or not at all, open them, name them.

data/train.bin   token ids, no header, little endian, uint16 or uint32 (nanoGPT's format)
data/val.bin
data/meta.json   what they are; written last of all, so its presence says that the rest is whole
data/tokenizer/  what is needed to decode without a network

data.py opens a folder, also one that another tool prepared.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np

FORMAT_VERSION = 1
META = "meta.json"
PACKAGE = "elastic-gpt"
"""Among the tools of meta.json: its version is what a newer format needs."""
UNFINISHED = b'{"unfinished": true}\n'
"""What meta.json says while the files beside it are being exchanged."""


class DataError(ValueError):
    """The user's mistake. The message is one line: the offending value, and the cure."""


@dataclass(frozen=True)
class Input:
    """A source of text, as it was read."""

    name: str
    """The file as the user named it, or what else the text came from."""
    documents: int
    characters: int
    """Unicode code points."""
    bytes: int
    """Bytes of its UTF-8."""
    sha256: str
    repaired: int = 0
    """Places that were no UTF-8 (or lines that were no JSON), replaced or left out by --errors."""


@dataclass(frozen=True)
class Split:
    """One side of the data: train or val."""

    file: str
    """Path below the folder of meta.json."""
    tokens: int
    documents: int
    """Documents with text in this split; one that the border cuts counts on both sides."""
    bytes_in: int
    """Bytes of UTF-8 text that became these tokens; 0 where another tool made them and did not say."""
    sha256: str
    """Of the file; of its ids where another tool put a header before them."""


@dataclass(frozen=True)
class TokenizerSection:
    """What it takes to build the tokenizer again."""

    kind: str
    """How to load it: bpe, char, byte or word."""
    name: str
    """gpt2, r50k_base, cl100k_base, o200k_base, bpe, char, byte, word, or the name of a file of the user's own."""
    pattern: str | None
    """The regular expression that splits text before merging; None where there is none."""
    file: str | None
    """Path below the folder of meta.json; None where nothing needs saving."""
    sha256: str | None
    """Of the file."""
    specials: dict[str, int]
    """Special tokens and their ids. Never found in text, only put there."""


@dataclass(frozen=True)
class SplitRule:
    """How the text was divided."""

    method: str
    """`tail`: the last characters of all documents in their given order are val. `hash`: documents are, by their text."""
    seed: int | None
    """Of the hash; None for the tail, which has nothing random."""
    fraction: float
    """Share of val: of the characters with `tail`, of the documents with `hash` (about)."""


@dataclass(frozen=True)
class Meta:
    """meta.json."""

    format_version: int
    dtype: str
    """uint16 or uint32, of the ids in the .bin files."""
    vocab_size: int
    """Special tokens included."""
    tokenizer: TokenizerSection
    eot_id: int | None
    """The token between documents; None where the tokenizer has none."""
    splits: dict[str, Split]
    inputs: list[Input]
    split: SplitRule
    tools: dict[str, str]
    """Versions of what made the data."""


def own_version() -> str:
    """This program's, or "unknown" where it was not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def dtype_for(vocab_size: int) -> str:
    """The smallest of the contract's types that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_meta(folder: Path) -> Meta | None:
    """The meta.json of `folder`, None where there is none. Raises DataError where this version cannot read it."""
    path = folder / META
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): prepare the data again") from error
    if isinstance(fields, dict) and fields.get("unfinished"):
        raise DataError(f"{folder} is half-written, prepare was stopped there: prepare the data again")
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        tools = fields.get("tools")
        by = tools.get(PACKAGE) if isinstance(tools, dict) else None
        needed = f"pip install '{PACKAGE}>={by}'" if by else f"install a newer {PACKAGE}"
        raise DataError(
            f"{path} has format_version {version}, this {PACKAGE} ({own_version()}) reads {FORMAT_VERSION} and older: {needed}"
        )
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version}, this program reads {FORMAT_VERSION}: prepare again")
    try:
        meta = Meta(
            **{
                **fields,
                "tokenizer": TokenizerSection(**fields["tokenizer"]),
                "splits": {name: Split(**split) for name, split in fields["splits"].items()},
                "inputs": [Input(**source) for source in fields["inputs"]],
                "split": SplitRule(**fields["split"]),
            }
        )
        for made in (meta, meta.tokenizer, meta.split, *meta.splits.values(), *meta.inputs):
            _check_types(made)
        if meta.dtype not in ("uint16", "uint32"):
            raise TypeError(f"dtype is {meta.dtype}")
        return meta
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not as prepare writes it ({error}): prepare the data again") from error


def _check_types(made: Any) -> None:
    """Raises TypeError where a field of a dataclass holds what its annotation does not say."""
    for name, hint in get_type_hints(type(made)).items():
        kind = get_origin(hint) if get_origin(hint) in (dict, list) else hint
        value = getattr(made, name)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError(f"{name} is {value!r}")


def open_ids(path: Path, dtype: str, *, offset: int = 0) -> np.memmap:
    """The ids of a token file as a read-only memmap of shape (tokens,); they begin `offset` bytes into it."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset)


def blocks(ids: np.memmap, start: int = 0, stop: int | None = None, size: int = 1 << 20) -> Iterator[np.ndarray]:
    """The ids of an open split from `start` up to `stop` (the end), in arrays of shape (n,) with n at most `size`.

    Memory holds one of them at a time; what is read through the memmap itself stays there.
    """
    stop = len(ids) if stop is None else stop
    with Path(str(ids.filename)).open("rb") as file:
        file.seek(ids.offset + start * ids.itemsize)
        while data := file.read(min(size, stop - start) * ids.itemsize):
            start += len(data) // ids.itemsize
            yield np.frombuffer(data, dtype=ids.dtype)


def document_lengths(ids: Iterable[np.ndarray], eot_id: int | None) -> Iterator[np.ndarray]:
    """The documents' lengths in tokens, in order, in arrays of shape (n,). A document without tokens is not counted."""
    held = 0
    for block in ids:
        ends = np.flatnonzero(block == eot_id) if eot_id is not None else np.empty(0, dtype=np.int64)
        if not ends.size:
            held += len(block)
            continue
        lengths = np.diff(ends, prepend=-1) - 1
        lengths[0] += held
        held = len(block) - 1 - int(ends[-1])
        yield lengths[lengths > 0]
    if held:
        yield np.array([held])


def fingerprint(meta: Meta) -> str:
    """16 hex digits that are the same for the same ids, whatever folder or tool they came from."""
    identity = [meta.dtype, sorted((name, split.sha256) for name, split in meta.splits.items())]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def write_file(path: Path, data: bytes) -> str:
    """Writes `data` to `path`, down to the disk, and returns its sha256."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def publish(stage: Path, folder: Path, meta: Meta) -> None:
    """Moves the files that `meta` names from `stage` to `folder`, meta.json last.

    Before the first new file comes, a note that says "unfinished" takes the place of meta.json: were we stopped between
    two renames, the folder would hold new train.bin and old val.bin, which with the old meta.json would pass for one
    data set, and without any for nanoGPT's.
    """
    text = json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n"
    write_file(stage / META, text.encode())
    files = [split.file for split in meta.splits.values()]
    if meta.tokenizer.file is not None:
        files.append(meta.tokenizer.file)

    write_file(stage / "unfinished", UNFINISHED)
    os.replace(stage / "unfinished", folder / META)  # noqa: PTH105 - Path.replace is the same call; this says rename(2)
    _flush_folder(folder)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(stage / file, folder / file)  # noqa: PTH105
        _flush_folder((folder / file).parent)
    os.replace(stage / META, folder / META)  # noqa: PTH105
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
