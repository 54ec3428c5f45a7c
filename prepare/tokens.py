"""The files of prepared data: train.bin, val.bin and meta.json. Writes them whole or not at all, and opens them.

data/train.bin   token ids, no header, little endian, uint16 or uint32 (nanoGPT's format)
data/val.bin
data/meta.json   describes them; written last, so if it is there, the rest is whole
data/tokenizer/  what decoding needs, without a network

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
    """A mistake that the user can mend. The message is one line with the offending value and the cure."""


@dataclass(frozen=True)
class Input:
    """What was read of one source of text."""

    name: str
    """What the user called the file, or another name for the source."""
    documents: int
    characters: int
    """Unicode code points."""
    bytes: int
    """Bytes of its UTF-8."""
    sha256: str
    repaired: int = 0
    """Places that were not UTF-8, or lines that were not JSON, which --errors had replaced or left out."""


@dataclass(frozen=True)
class Split:
    """One part of the data: train or val."""

    file: str
    """Path below the folder of meta.json."""
    tokens: int
    documents: int
    """Documents with text in this split. One that is divided between train and val counts in both."""
    bytes_in: int
    """Bytes of UTF-8 text that became these tokens; 0 if another tool made them, and it is not known."""
    sha256: str
    """sha256 of the file, without the header that another tool may have put before the ids."""


@dataclass(frozen=True)
class TokenizerSection:
    """All that is needed to load the tokenizer again."""

    kind: str
    """Its kind, which decides how it is loaded: bpe, char, byte or word."""
    name: str
    """gpt2, r50k_base, cl100k_base, o200k_base, bpe, char, byte, word, or the name of a file of the user's own."""
    pattern: str | None
    """The regular expression that splits text before merging; None if its kind has none."""
    file: str | None
    """Path of its file below the folder of meta.json; None if it needs none."""
    sha256: str | None
    """sha256 of that file."""
    specials: dict[str, int]
    """Special tokens and their ids. Text never becomes one of them."""


@dataclass(frozen=True)
class SplitRule:
    """How the text was divided into train and val."""

    method: str
    """`tail`: the last characters of the whole text are val. `hash`: a hash of its text decides for each document."""
    seed: int | None
    """Seed of the hash; None for `tail`."""
    fraction: float
    """Share that is val: of the characters with `tail`, about that of the documents with `hash`."""


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    format_version: int
    dtype: str
    """Type of the ids in the .bin files: uint16 or uint32."""
    vocab_size: int
    """Number of ids, special tokens included."""
    tokenizer: TokenizerSection
    eot_id: int | None
    """The id between documents; None if the tokenizer has none."""
    splits: dict[str, Split]
    inputs: list[Input]
    split: SplitRule
    tools: dict[str, str]
    """Versions of the programs that made the data."""


def own_version() -> str:
    """The version of this program; "unknown" if it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def user_cache() -> Path:
    """The folder for what can be made again: copies of data, fingerprints."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic-gpt"


def dtype_for(vocab_size: int) -> str:
    """uint16 if every id below `vocab_size` fits it, else uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_meta(folder: Path) -> Meta | None:
    """Reads the meta.json of `folder`; None if there is none. Raises DataError if this version cannot read it."""
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
    """Raises TypeError if the value of a dataclass field is not of its annotated type."""
    for name, hint in get_type_hints(type(made)).items():
        kind = get_origin(hint) if get_origin(hint) in (dict, list) else hint
        value = getattr(made, name)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError(f"{name} is {value!r}")


def open_ids(path: Path, dtype: str, *, offset: int = 0) -> np.memmap:
    """The ids of a token file as a read-only memmap of shape (tokens,). They begin `offset` bytes into the file."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset)


def blocks(ids: np.memmap, start: int = 0, stop: int | None = None, size: int = 1 << 20) -> Iterator[np.ndarray]:
    """The ids from `start` up to `stop` (None: the end), in arrays of shape (n,) with n at most `size`.

    Only one of them is in memory at a time, whereas all that is read through a memmap stays in
    memory.
    """
    stop = len(ids) if stop is None else stop
    with Path(str(ids.filename)).open("rb") as file:
        file.seek(ids.offset + start * ids.itemsize)
        while data := file.read(min(size, stop - start) * ids.itemsize):
            start += len(data) // ids.itemsize
            yield np.frombuffer(data, dtype=ids.dtype)


def document_lengths(ids: Iterable[np.ndarray], eot_id: int | None) -> Iterator[np.ndarray]:
    """The lengths of the documents in tokens, in order, in arrays of shape (n,). Leaves out empty documents."""
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
    """16 hex digits, the same for the same ids, whatever folder or tool they come from."""
    identity = [meta.dtype, sorted((name, split.sha256) for name, split in meta.splits.items())]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def write_file(path: Path, data: bytes) -> str:
    """Writes `data` to `path` and flushes it to disk. Returns its sha256."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def publish(stage: Path, folder: Path, meta: Meta) -> None:
    """Moves the files that `meta` names from `stage` to `folder`, meta.json last.

    First, a note "unfinished" takes the place of meta.json. If the process is stopped between two
    renames, the folder has a new train.bin and an old val.bin: with the old meta.json they would be
    taken for one data set, and without any for data of nanoGPT.
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
    """Flushes a folder, so that a rename in it is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
