"""The disk contract: train.bin, val.bin, meta.json; write them whole or not at all, open them, name them.

data/train.bin   token ids, no header, little endian, uint16 or uint32 (nanoGPT's format)
data/val.bin
data/meta.json   what they are; written last of all, so its presence says that the rest is whole
data/tokenizer/  what is needed to decode without a network
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

FORMAT_VERSION = 1
META = "meta.json"


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


@dataclass(frozen=True)
class Split:
    """One side of the data: train or val."""

    file: str
    """Path below the folder of meta.json."""
    tokens: int
    documents: int
    """Documents with text in this split; one that the border cuts counts on both sides."""
    bytes_in: int
    """Bytes of UTF-8 text that became these tokens."""
    sha256: str
    """Of the file."""


@dataclass(frozen=True)
class TokenizerSection:
    """What it takes to build the tokenizer again."""

    kind: str
    """How to load it: bpe, char or byte."""
    name: str
    """gpt2, bpe, char or byte."""
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
    """`tail`: the last characters of all documents in their given order are val."""
    seed: int | None
    """None: the tail has nothing random."""
    fraction: float
    """Share of the characters that went to val."""


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


def dtype_for(vocab_size: int) -> str:
    """The smallest of the contract's types that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_meta(folder: Path) -> Meta:
    """What `folder` holds. Raises DataError where there is no meta.json that this version can read."""
    path = folder / META
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise DataError(f"no {META} in {folder}: prepare the data first (elastic-gpt prepare --help)") from err
    except ValueError as err:
        raise DataError(f"{path} is not JSON ({err}): prepare the data again") from err
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version}, this program reads {FORMAT_VERSION}: prepare again")
    try:
        return Meta(
            **{
                **fields,
                "tokenizer": TokenizerSection(**fields["tokenizer"]),
                "splits": {name: Split(**split) for name, split in fields["splits"].items()},
                "inputs": [Input(**source) for source in fields["inputs"]],
                "split": SplitRule(**fields["split"]),
            }
        )
    except (KeyError, TypeError, AttributeError) as err:
        raise DataError(f"{path} is not as prepare writes it ({err}): prepare the data again") from err


def open_split(folder: Path, split: str) -> np.ndarray:
    """The ids of `split` ("train" or "val") as a read-only memmap of shape (tokens,).

    Raises DataError where the file is missing or its size is not what meta.json says.
    """
    meta = read_meta(folder)
    if split not in meta.splits:
        raise DataError(f"{folder} has no split {split!r}, it has {', '.join(meta.splits)}")
    path = folder / meta.splits[split].file
    dtype = np.dtype(meta.dtype).newbyteorder("<")
    if not path.is_file():
        raise DataError(f"{path} is missing although {META} names it: prepare the data again")
    size, expected = path.stat().st_size, meta.splits[split].tokens * dtype.itemsize
    if size != expected:
        raise DataError(f"{path} has {size:,} bytes, {META} says {expected:,}: prepare the data again")
    return np.memmap(path, dtype=dtype, mode="r")


def fingerprint(meta: Meta) -> str:
    """16 hex digits that are the same for the same ids, whatever folder or tool they came from."""
    identity = [meta.dtype, sorted((name, split.sha256) for name, split in meta.splits.items())]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


class TokenWriter:
    """Appends ids to one .bin file and counts and hashes them on the way."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.tokens = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, ids: np.ndarray) -> None:
        """Appends `ids`, shape (n,), all below the vocabulary size."""
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                _flush(self._file.fileno(), self._file)
        finally:
            self._file.close()


def write_file(path: Path, data: bytes) -> str:
    """Writes `data` to `path`, down to the disk, and returns its sha256."""
    with path.open("wb") as file:
        file.write(data)
        _flush(file.fileno(), file)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` (so on the same disk) to write to; gone at the end, whatever happens.

    `folder` is made where it is missing. Raises DataError where nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".prepare-", dir=folder))
    except OSError as err:
        raise DataError(f"cannot write to {folder} ({err.strerror}): choose another --output_dir") from err
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, folder: Path, meta: Meta) -> None:
    """Moves the files that `meta` names from `stage` to `folder`, meta.json last.

    The old meta.json goes before the first new file comes: were we stopped between two renames, the folder would hold
    new train.bin and old val.bin, and with the old meta.json they would pass for one data set. Without any, they
    are "not prepared".
    """
    text = json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n"
    write_file(stage / META, text.encode())
    files = [split.file for split in meta.splits.values()]
    if meta.tokenizer.file is not None:
        files.append(meta.tokenizer.file)

    (folder / META).unlink(missing_ok=True)
    _flush_folder(folder)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(stage / file, folder / file)  # noqa: PTH105 - Path.replace is the same call; this says rename(2)
        _flush_folder((folder / file).parent)
    os.replace(stage / META, folder / META)  # noqa: PTH105
    _flush_folder(folder)


def _flush(descriptor: int, file: Any) -> None:
    file.flush()
    os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
