"""Opens a prepared folder, whether we or another tool made it: its description, its ids, its tokenizer."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from prepare import interop, tokenizer, tokens
from prepare.tokenizer import FOLDER, Tokenizer
from prepare.tokens import META, DataError, Meta


def read_meta(folder: Path) -> Meta:
    """The description of a prepared folder, whoever made it. Raises DataError if this version cannot read it."""
    if meta := tokens.read_meta(folder) or interop.foreign_meta(folder):
        return meta
    raise DataError(f"no {META} in {folder}: prepare the data first (elastic-gpt prepare --help)")


def open_split(folder: Path, split: str) -> np.memmap:
    """The ids of `split` ("train" or "val") as a read-only memmap of shape (tokens,).

    Raises DataError if the file is missing or does not have the size that meta.json says.
    """
    meta = read_meta(folder)
    if split not in meta.splits:
        raise DataError(f"{folder} has no split {split!r}, it has {', '.join(meta.splits)}")
    path = folder / meta.splits[split].file
    if not path.is_file():
        raise DataError(f"{path} is missing although {META} names it: prepare the data again")
    offset = 0 if is_ours(folder) else interop.header_bytes(path)
    size, expected = path.stat().st_size, offset + meta.splits[split].tokens * np.dtype(meta.dtype).itemsize
    if size != expected:
        raise DataError(f"{path} has {size:,} bytes, {META} says {expected:,}: prepare the data again")
    return tokens.open_ids(path, meta.dtype, offset=offset)


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a prepared folder. None if another tool made the folder and left no tokenizer in it.

    Raises DataError if the tokenizer's file is missing or was changed.
    """
    section = read_meta(folder).tokenizer
    if not is_ours(folder):
        return interop.foreign_tokenizer(folder, section.name)
    return None if section.kind == "unknown" else tokenizer.from_section(section, folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """As `find_tokenizer`, but raises DataError if the folder has no tokenizer."""
    if found := find_tokenizer(folder):
        return found
    raise DataError(f"{folder} does not say what tokenizer its ids are of: name a folder that prepare made")


def save_tokenizer(folder: Path, target: Path) -> None:
    """Writes into the folder `target` what decoding the ids of `folder` needs: meta.json and tokenizer/."""
    if is_ours(folder):
        if (folder / FOLDER).exists():  # the byte tokenizer needs no file
            shutil.copytree(folder / FOLDER, target / FOLDER)
        shutil.copy(folder / META, target)
        return
    meta, found = read_meta(folder), find_tokenizer(folder)
    if found:
        meta = replace(meta, tokenizer=found.save(target))
    tokens.write_file(target / META, (json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n").encode())


def is_ours(folder: Path) -> bool:
    """Whether our `prepare` made the folder."""
    return (folder / META).exists()
