"""Text into tokens: train.bin, val.bin and meta.json, by the contract in tokens.py.

    python prepare/prepare.py --src_data_path data.txt --output_dir data/mine

The text is read twice, in pieces: once to be measured and checked, once to be encoded (and once between them where a
tokenizer learns from it). Memory does not grow with it. One thread makes about 10 MB/s with the gpt2 tokenizer.
"""

import sys
from pathlib import Path

if not __package__:
    # Run as a script, Python puts this folder first on the path, where prepare.py hides the package `prepare`. The
    # repository root takes its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import difflib
import errno
import platform
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from prepare import corpus, tokenizer, tokens
from prepare.corpus import Source
from prepare.encoder import chunks
from prepare.splits import Side, head_and_tail
from prepare.tokenizer import Tokenizer
from prepare.tokens import DataError, Input, Meta, TokenWriter

Advance = Callable[[int], None]
Phase = Callable[[str, int | None], AbstractContextManager[Advance]]
"""`with phase(title, bytes ahead or None) as advance` shows how far `advance(bytes)` came."""

EXAMPLES = """\
examples:
  %(prog)s --src_data_path data.txt                  GPT-2's tokens, beside data.txt
  %(prog)s --sample --output_dir data/docs           no text at hand: Python's own documentation
  %(prog)s a.txt b.txt --output_dir data/both        several documents, <|endoftext|> between them
  %(prog)s data.txt --tokenizer char                 a character, a token: for small models
  %(prog)s data.txt --tokenizer bpe --vocab-size 4096   merges learned from data.txt itself

writes train.bin, val.bin, meta.json and tokenizer/, all of them or none. GPT-2's ranks are
found without a network; text is UTF-8 of any size, and the last tenth of it becomes val.bin.
"""


def prepare(
    sources: Sequence[Source],
    output_dir: Path,
    *,
    name: str = "gpt2",
    vocab_size: int = 0,
    tokenizer_file: Path | None = None,
    val_fraction: float = 0.1,
    phase: Phase,
) -> Meta:
    """Encodes `sources` with the tokenizer `name` into `output_dir`, whole or not at all.

    `vocab_size` is for bpe, `tokenizer_file` (GPT-2's ranks) for gpt2. The split is by characters: the last
    `val_fraction` (above 0, below 1) of all documents in their order is val, and each side is encoded by itself.
    Raises DataError for text that cannot be used and for a full disk.
    """
    others = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    with phase(f"reading {sources[0].name}{others}", None) as advance:
        inputs = [corpus.measure(source, advance) for source in sources]
    size = sum(source.bytes for source in inputs)
    border = int((1 - val_fraction) * sum(source.characters for source in inputs))

    try:
        with tokens.staging(output_dir) as stage:
            coder = _tokenizer(name, sources, vocab_size, tokenizer_file, size, phase)
            section = coder.save(stage)
            dtype = tokens.dtype_for(coder.vocab_size)
            with TokenWriter(stage / "train.bin", dtype) as train_bin, TokenWriter(stage / "val.bin", dtype) as val_bin:
                train, val = Side(coder, train_bin), Side(coder, val_bin)
                with phase("encoding", size) as advance:
                    _encode(sources, inputs, border, train, val, advance)
            meta = Meta(
                format_version=tokens.FORMAT_VERSION,
                dtype=dtype,
                vocab_size=coder.vocab_size,
                tokenizer=section,
                eot_id=coder.eot_id,
                splits={"train": train.result("train.bin"), "val": val.result("val.bin")},
                inputs=inputs,
                split=tokens.SplitRule("tail", None, val_fraction),
                tools={"python": platform.python_version()} | {tool: version(tool) for tool in ("tiktoken", "rustbpe")},
            )
            tokens.publish(stage, output_dir, meta)
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A token stands for a byte of text or more; English with gpt2 takes a quarter of this bound.
        room = decimal(size * np.dtype(tokens.dtype_for(vocab_size)).itemsize)
        free = decimal(shutil.disk_usage(output_dir).free)
        raise DataError(
            f"no room left in {output_dir}: the tokens need {room} at most, {free} is free; "
            "make room or choose another --output_dir"
        ) from err
    return meta


def _encode(
    sources: Sequence[Source], inputs: Sequence[Input], border: int, train: Side, val: Side, advance: Advance
) -> None:
    """The first `border` characters of all text into `train`, the others into `val`.

    Raises DataError where a source is no longer what it was when `inputs` was measured.
    """
    for source, seen in zip(sources, inputs, strict=True):
        reading = corpus.Reading(source, advance)
        for document in reading.documents():
            head, tail = head_and_tail(document, border)
            border -= train.add(head)
            val.add(tail)
        if reading.result() != seen:
            raise DataError(f"{source.name} changed while it was being read: try again")


def _tokenizer(
    name: str, sources: Sequence[Source], vocab_size: int, file: Path | None, size: int, phase: Phase
) -> Tokenizer:
    if name == "gpt2":
        return tokenizer.gpt2(file)
    if name == "byte":
        return tokenizer.Bytes()
    with phase(f"learning the {name} vocabulary", size) as advance:
        readings = [corpus.Reading(source, advance) for source in sources]
        documents = (document for reading in readings for document in reading.documents())
        if name == "char":
            characters: set[str] = set()
            for document in documents:
                for piece in document:
                    characters.update(piece)
            return tokenizer.Characters(characters)
        return tokenizer.train_bpe((chunk for document in documents for chunk in chunks(document)), vocab_size)


def main(argv: list[str] | None = None, prog: str = "prepare.py") -> int:
    """The command line. Returns the exit status: 0, 1 for the user's mistake, 128 + signal number if stopped."""
    flags = _parse(argv, prog)

    def stop(signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signum)  # so that SIGTERM too unwinds, and takes its temporary files along

    before = signal.signal(signal.SIGTERM, stop)
    try:
        output_dir = flags.output_dir or _beside(flags.inputs)
        sources = [corpus.sample()] if flags.sample else [corpus.text_file(path) for path in flags.inputs]
        for path in flags.inputs:
            if path.resolve().parent == output_dir.resolve() and path.name in ("train.bin", "val.bin", tokens.META):
                raise DataError(f"{path} would be overwritten by the output: choose another --output_dir")
        meta = prepare(
            sources,
            output_dir,
            name=flags.tokenizer,
            vocab_size=flags.vocab_size,
            tokenizer_file=flags.tokenizer_file,
            val_fraction=flags.val_fraction,
            phase=_bars if sys.stderr.isatty() else _lines,
        )
    except KeyboardInterrupt as err:
        print(f"{prog}: stopped; nothing half-written is left", file=sys.stderr)
        return 128 + (err.args[0] if err.args else signal.SIGINT)
    except DataError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"error: {err.filename or output_dir}: {err.strerror or err}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(_summary(meta, output_dir, flags.vocab_size))
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistyped flag with the nearest right one."""

    def error(self, message: str) -> NoReturn:
        typos = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        known = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(typos[0], known, n=1) if message.startswith("unrecognized") and typos else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}{hint}; {self.prog} --help tells more\n")


def _parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = _Parser(
        prog=prog,
        description="Turn text files into the tokens that training reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="FILE", help="text files, UTF-8, in this order")
    parser.add_argument("--src_data_path", "--src-data-path", type=Path, metavar="FILE", help="one more text file")
    parser.add_argument("--sample", action="store_true", help="use the documentation of Python itself: 0.5 MB")
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, metavar="DIR", help="default: beside the input; ./data/sample"
    )
    parser.add_argument("--tokenizer", choices=["gpt2", "char", "byte", "bpe"], default="gpt2", help="default: gpt2")
    parser.add_argument(
        "--vocab-size", type=int, default=0, metavar="N", help="for bpe: bytes, merges and <|endoftext|> together"
    )
    parser.add_argument(
        "--tokenizer-file",
        type=Path,
        metavar="FILE",
        help="for gpt2: its ranks (r50k_base.tiktoken), where none is found",
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="share of the text for val.bin (default: 0.1)"
    )
    flags = parser.parse_args(argv)
    if flags.src_data_path is not None:
        flags.inputs.insert(0, flags.src_data_path)
    if bool(flags.inputs) == flags.sample:
        parser.error("name one or more text files, or --sample" + (", not both" if flags.sample else ""))
    if (flags.tokenizer == "bpe") != bool(flags.vocab_size):
        parser.error("--tokenizer bpe and --vocab-size N (4096, say) go together")
    if flags.tokenizer_file and flags.tokenizer != "gpt2":
        parser.error(f"--tokenizer-file is for gpt2, not for {flags.tokenizer}")
    if not 0 < flags.val_fraction < 1:
        parser.error(f"--val-fraction {flags.val_fraction} must be above 0 and below 1")
    return flags


def _beside(inputs: list[Path]) -> Path:
    """The folder to write to where none is given."""
    if not inputs:
        return Path("data/sample")
    folders = {path.parent for path in inputs}
    if len(folders) > 1:
        raise DataError("the inputs lie in several folders: choose where to write with --output_dir DIR")
    return folders.pop()


@contextmanager
def _bars(title: str, size: int | None) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=size)
        yield lambda done: bars.advance(task, done)


@contextmanager
def _lines(title: str, size: int | None) -> Iterator[Advance]:
    print(f"{title} {decimal(size)}" if size else title, file=sys.stderr, flush=True)
    yield lambda _: None


def _summary(meta: Meta, folder: Path, asked: int) -> str:
    lines = [f"{'':5}  {'tokens':>13}  {'bytes/token':>11}  {'documents':>9}  file"]
    for name, split in meta.splits.items():
        ratio = split.bytes_in / split.tokens
        lines.append(f"{name:5}  {split.tokens:13,}  {ratio:11.2f}  {split.documents:9,}  {folder / split.file}")
    lines.append(
        f"{meta.tokenizer.name} tokenizer, vocabulary {meta.vocab_size:,}, {meta.dtype}: {folder / tokens.META}"
    )
    if asked > meta.vocab_size:
        lines.append(f"note: the text has no more pairs to merge, so {meta.vocab_size:,} ids and not {asked:,}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
