"""Prepared data in the format of another trainer.

    elastic-gpt convert data/mine data/for_llmc --format llm.c

Reads what training reads (ours, nanoGPT's, DLRover's, llm.c's), and llm.c's shards too, which
nanoGPT's format joins.
"""

import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prepare.data import find_tokenizer, open_split, read_meta
from prepare.frontdoor import Parser, command, writing
from prepare.interop import KINDS, open_tokens, token_files
from prepare.tokens import META, DataError, blocks, write_file

_MAX_TOKENS = 2**31 - 1  # llm.c counts in an int32


def llmc_header(dtype: str, tokens: int) -> bytes:
    """The 1,024 bytes that llm.c wants before `tokens` ids of `dtype` ("uint16" or "uint32")."""
    kind = next(kind for kind in KINDS if kind.dtype == dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = kind.magic, kind.version, tokens
    return header.tobytes()


def meta_pkl(vocab_size: int, characters: Sequence[str] = ()) -> bytes:
    """meta.pkl as nanoGPT and DLRover write it, for `characters` in the order of their ids (none: ids are not characters)."""
    fields: dict[str, Any] = {"vocab_size": vocab_size}
    if characters:
        fields["itos"] = dict(enumerate(characters))
        fields["stoi"] = {character: i for i, character in fields["itos"].items()}
    return pickle.dumps(fields, protocol=4)


def write_nanogpt(folder: Path, target: Path) -> list[Path]:
    """Writes what nanoGPT and DLRover read into `target`: uint16 without a header, and meta.pkl unless it is GPT-2's ids.

    Returns the files. Raises DataError if `target` has token files, or the ids of `folder` need uint32.
    """
    sides = _sides(folder)
    if any(ids.itemsize != 2 for side in sides.values() for ids in side):
        raise DataError(f"{folder} has ids of uint32, and nanoGPT reads uint16: prepare with a vocabulary up to 65,536")
    with _new_files(target) as stage:
        for split, side in sides.items():
            _write(stage / f"{split}.bin", b"", (block for ids in side for block in blocks(ids)))
        if all(len(side) == 1 for side in sides.values()):  # llm.c's shards are GPT-2's
            meta = read_meta(folder)
            if meta.tokenizer.name != "gpt2":  # which nanoGPT assumes
                tokenizer = find_tokenizer(folder) if meta.tokenizer.kind == "char" else None
                characters = [tokenizer.decode([i]) for i in range(meta.vocab_size)] if tokenizer else []
                write_file(stage / "meta.pkl", meta_pkl(meta.vocab_size, characters))
    return sorted(path for path in target.iterdir() if path.is_file())


def write_llmc(folder: Path, target: Path, shard_tokens: int = _MAX_TOKENS) -> list[Path]:
    """Writes train.bin and val.bin with llm.c's header into `target`; train_000000.bin, ... above `shard_tokens` ids.

    Returns the files. Raises DataError if `target` has token files.
    """
    with _new_files(target) as stage:
        for split, side in _sides(folder).items():
            shards = [(ids, start) for ids in side for start in range(0, len(ids), shard_tokens)]
            for number, (ids, start) in enumerate(shards):
                name = f"{split}_{number:06d}.bin" if len(shards) > 1 else f"{split}.bin"
                stop = min(start + shard_tokens, len(ids))
                header = llmc_header(f"uint{8 * ids.itemsize}", stop - start)
                _write(stage / name, header, blocks(ids, start, stop))
    return sorted(path for path in target.iterdir() if path.is_file())


EXAMPLES = """\
nanogpt: for nanoGPT and DLRover, with meta.pkl for characters. llm.c: a header before the ids.

examples:
  %(prog)s data/mine data/for_llmc --format llm.c
  %(prog)s data/mine data/for_nanogpt --format nanogpt
"""


@command
def main(argv: list[str] | None = None, prog: str = "elastic-gpt convert") -> int:
    """The command line. Returns the exit status: 0, or 2 for the user's mistake."""
    parser = Parser(
        prog=prog,
        description="Write prepared data in the format of another trainer, into a folder of its own.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="DATA_DIR", help="what prepare, nanoGPT, DLRover or llm.c made")
    parser.add_argument("target", type=Path, metavar="OUT_DIR", help="where to write; it must not hold token files")
    parser.add_argument("--format", choices=["nanogpt", "llm.c"], required=True)
    flags = parser.parse_args(argv)
    write = write_nanogpt if flags.format == "nanogpt" else write_llmc
    for path in write(flags.folder, flags.target):
        print(f"{path.stat().st_size:15,} bytes  {path}")
    return 0


def _sides(folder: Path) -> dict[str, list[np.memmap]]:
    """The ids of train and of val, in the files they lie in."""
    if not (folder / META).exists():
        files = {split: token_files(folder, split) for split in ("train", "val")}
        if any(len(shards) > 1 for shards in files.values()) and all(files.values()):
            return {split: [open_tokens(path) for path in shards] for split, shards in files.items()}
    return {split: [open_split(folder, split)] for split in read_meta(folder).splits}


@contextmanager
def _new_files(target: Path) -> Iterator[Path]:
    """A context with a folder to write to. At its end, all files in it are moved to `target`.

    A stop between two renames leaves a train.bin without a val.bin, which no tool takes for data.
    """
    if any(target.glob("*.bin")) or (target / META).exists():
        raise DataError(f"{target} holds data already: choose another folder")
    stage = target / ".unfinished"
    try:
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        stage.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot write to {target} ({error.strerror}): choose another folder") from error
    try:
        with writing(stage):
            yield stage
        for path in sorted(stage.iterdir()):
            os.replace(path, target / path.name)  # noqa: PTH105 - Path.replace is the same call; this says rename(2)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(path: Path, header: bytes, ids: Iterator[np.ndarray]) -> None:
    with path.open("wb") as file:
        file.write(header)
        for block in ids:
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())
