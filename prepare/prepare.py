"""Text into tokens: the command line of pipeline.py.

python prepare/prepare.py --src_data_path data.txt --output_dir data/mine
"""

import sys
from pathlib import Path

if not __package__:
    # When this file is run as a script, Python puts its folder first on the path, and there prepare.py hides the package
    # `prepare`. So the repository root takes its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
import re
import shutil
import signal
from types import FrameType
from typing import NoReturn

from prepare import journal, pipeline, progress, published, tokens
from prepare.formats import FORMATS
from prepare.frontdoor import TIMED_OUT, ArgumentTypeError, Namespace, Parser, command, number
from prepare.plan import Settings
from prepare.ranks import KNOWN, PATTERNS
from prepare.sources import find, matching
from prepare.tokenizer import CHOICES, KINDS
from prepare.tokens import DataError, Meta

EXAMPLES = """\
examples:
  %(prog)s data.txt                                  GPT-2's tokens, beside data.txt
  %(prog)s --sample --output_dir data/docs           no text at hand: Python's own documentation
  %(prog)s corpus/ --output_dir data/mine            all text, JSON, CSV and Parquet in a folder, packed or not
  %(prog)s 's3://bucket/crawl/*.jsonl.zst' --text-field body --output_dir data/crawl
  %(prog)s reviews.csv --text-field review            a column of a table, by the name in its first line
  %(prog)s books.txt --separator '<|endoftext|>'     many documents in one file
  zcat dump.gz | %(prog)s - --output_dir data/dump   standard input
  %(prog)s data.txt --tokenizer char                 a character, a token: for small models
  %(prog)s data.txt --tokenizer bpe --vocab-size 4096   merges learned from data.txt itself
  %(prog)s data.txt --tokenizer tiktoken --tokenizer-file my.tiktoken --pattern cl100k_base
  %(prog)s data.txt --output_dir s3://bucket/data    to an object store: made here, copied there

reads text, JSON lines, a JSON array of objects, CSV, TSV and Parquet, plain or packed with gzip, zstd,
bzip2 or xz. What else a file is, is named, with the command that makes text of it.

writes train.bin, val.bin, meta.json and tokenizer/, all of them or none. Stopped by Ctrl-C, kill -9
or a full disk, the same command goes on where it stopped (DIR/.prepare/ holds what is done).
GPT-2's ranks are found without a network. Of few documents the last tenth of the text becomes
val.bin; of many (100 and more, with a val fraction of 0.1) a tenth of them by a hash of their text.
"""


@command
def main(argv: list[str] | None = None, prog: str = "prepare.py") -> int:
    """The command line. Returns the exit status: 0, 1 if --verify finds something wrong, 2, 124, or 128 + signal number."""
    flags = _parse(argv, prog)
    if flags.wait is not None:
        return 0 if published.wait(flags.output_dir, flags.wait, lambda note: _tell([note])) else TIMED_OUT
    defaults = Settings()
    settings = Settings(**{name: getattr(flags, name) for name in vars(defaults)})
    output_dir: Path | None = None
    notes: list[str] = []

    def stop(signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signum)  # SIGTERM unwinds as Ctrl-C does, which ends the workers

    before = signal.signal(signal.SIGTERM, stop)
    try:
        place = flags.output_dir or _beside(flags.inputs)
        output_dir = place
        if isinstance(place, str):
            published.is_there(place)  # a store that refuses us says so before the work
            output_dir = published.workplace(place)
        meta = pipeline.prepare(
            flags.inputs,
            output_dir,
            settings,
            engine_name=flags.engine,
            workers=flags.workers,
            phase=progress.phase(),
            say=notes.append,
        )
        if isinstance(place, str):
            published.put(output_dir, place, meta, progress.phase())
        print(_summary(meta, place, settings.vocab_size), flush=True)
    except KeyboardInterrupt as error:
        goes_on = output_dir is not None and (output_dir / journal.STAGE).exists()
        left = "the same command goes on from here" if goes_on else "nothing half-written is left"
        print(f"{prog}: stopped; {left}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        _tell(notes)  # last, where they are seen
    code = _check(flags.inputs, settings, meta, output_dir) if flags.verify else 0
    if isinstance(place, str):
        shutil.rmtree(output_dir)
    return code


def _check(inputs: list[str], settings: Settings, meta: Meta, output_dir: Path) -> int:
    """Checks the output, and the inputs once more (except standard input, which cannot be read twice)."""
    from prepare.look import check
    from prepare.whole import inputs_whole

    names = [name for name in inputs if name != "-"]
    sources = find(names, wanted=settings.format, field=settings.text_field) if names else []
    more = inputs_whole(sources, meta.inputs, same_text=not settings.separator) if sources else ()
    return check(output_dir, more)


def _tell(notes: list[str]) -> None:
    while notes:
        print(f"note: {notes.pop(0)}", file=sys.stderr, flush=True)


def _parse(argv: list[str] | None, prog: str) -> Namespace:
    parser = Parser(
        prog=prog,
        any_bytes=True,
        description="Turn text of any size into the tokens that training reads.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument_group("what to read").add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, folders, globs or URLs of them, in this order; - is stdin")
    add("--src_data_path", "--src-data-path", metavar="INPUT", help="one more")
    add("--sample", action="store_true", help="use the documentation of Python itself: 0.5 MB")
    add(
        "--separator",
        default="",
        metavar="TEXT",
        help=r"between documents in text files, such as '\n\n\n' (none: a file)",
    )
    add(
        "--format",
        choices=["auto", *FORMATS],
        default="auto",
        help="what the files are (default: auto, by their first bytes and name); json: an array of objects, or jsonl",
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="of JSON, Parquet, CSV (default: text); a.b: field b of what field a holds",
    )
    add(
        "--errors",
        choices=["strict", "replace", "skip"],
        default="strict",
        help="what is not UTF-8: stop (default), put U+FFFD in its place, or leave it out (broken JSON lines and CSV rows too)",
    )
    add = parser.add_argument_group("tokens").add_argument
    add("--tokenizer", choices=CHOICES, default="gpt2", help="default: gpt2; tiktoken: a file of your own")
    add("--tokenizer-file", metavar="FILE", help="a .tiktoken file: your own, or where a known one is")
    add("--pattern", choices=list(PATTERNS), help="for tiktoken: how your file's maker split text")
    add("--vocab-size", type=int, default=0, metavar="N", help="for bpe and word, special tokens included")
    add(
        "--sample-size",
        type=_size,
        default="100MB",
        metavar="SIZE",
        help="for bpe: text to learn from, taken evenly (default: 100MB)",
    )
    add = parser.add_argument_group("what to write").add_argument
    add(
        "--output_dir",
        "--output-dir",
        type=_place,
        metavar="DIR",
        help="a folder, or a URL to copy it to (default: beside the input; ./data/sample)",
    )
    add(
        "--wait",
        nargs="?",
        type=number(0),
        const=math.inf,
        metavar="S",
        help="make nothing: wait until another machine has filled DIR, S seconds at most (exit code 124 then)",
    )
    add("--val-fraction", type=float, default=0.1, metavar="F", help="share of the text for val.bin (default: 0.1)")
    add(
        "--split",
        choices=["auto", "tail", "hash"],
        default="auto",
        help="val is the tail of the text, or documents by a hash of their text (auto: of many)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the hash (default: 0)")
    add(
        "--verify",
        action="store_true",
        help="afterwards read it all again: decode it, compare it with the input, encode samples with tiktoken",
    )
    add = parser.add_argument_group("how fast").add_argument
    add(
        "--engine",
        choices=["auto", "fast", "tiktoken"],
        default="auto",
        help="the same ids at other speeds; auto takes the fast one where it fits",
    )
    add("--workers", type=int, default=0, metavar="N", help="default: as many as there are cores")
    flags = parser.parse_args(argv)
    # --- what no flag can check by itself
    if flags.wait is not None:
        if flags.inputs or flags.src_data_path or flags.sample or not flags.output_dir:
            parser.error("--wait goes with --output_dir alone: it reads nothing and waits for what another prepares")
        return flags
    if flags.src_data_path is not None:
        flags.inputs.insert(0, flags.src_data_path)
    if bool(flags.inputs) == flags.sample:
        parser.error("name what to read, or --sample" + (", not both" if flags.sample else ""))
    if flags.inputs.count("-") > 1:
        parser.error("standard input (-) can be read once")
    if flags.tokenizer == "bpe" and not flags.vocab_size:
        parser.error("--tokenizer bpe and --vocab-size N (4096, say) go together")
    sized = [name for name, kind in KINDS.items() if kind.sized]
    if flags.vocab_size and flags.tokenizer not in sized:
        parser.error(f"--vocab-size is for --tokenizer {' and '.join(sized)}")
    if flags.tokenizer_file and flags.tokenizer not in (*KNOWN, "tiktoken"):
        parser.error(f"--tokenizer-file is for tiktoken's encodings, not for {flags.tokenizer}")
    if (flags.tokenizer == "tiktoken") != bool(flags.pattern) or (
        flags.tokenizer == "tiktoken" and not flags.tokenizer_file
    ):
        parser.error("--tokenizer tiktoken, --tokenizer-file FILE and --pattern NAME go together")
    flags.pattern = flags.pattern or "gpt2"
    if not 0 < flags.val_fraction < 1:
        parser.error(f"--val-fraction {flags.val_fraction} must be above 0 and below 1")
    if flags.workers < 0:
        parser.error(f"--workers {flags.workers} must be 1 or more")
    if not -(2**63) <= flags.seed < 2**63:
        parser.error(f"--seed {flags.seed} must fit 64 bits")
    return flags


def _place(text: str) -> Path | str:
    """A folder of this machine, or a URL."""
    return text if "://" in text else Path(text)


def _size(text: str) -> int:
    """A number of bytes, from text such as 5000000, 5000kB, 5MB or 5GB."""
    found = re.fullmatch(r"([0-9.]+)\s*([kMG]?)B?", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ArgumentTypeError(f"{text!r} is not a size; say 100MB, for example")
    number, unit = found.groups()
    return int(float(number) * 1000 ** " KMG".index(unit.upper() or " "))


def _beside(inputs: list[str]) -> Path:
    """The folder to write to if no --output-dir is given."""
    if not inputs:
        return Path("data/sample")
    if any(name == "-" or "://" in name for name in inputs):
        raise DataError("the input is not a file on this machine: choose where to write with --output_dir DIR")
    folders = set()
    for path in map(Path, inputs):
        found = [path] if path.exists() else matching(str(path)) or [path]
        folders |= {file if file.is_dir() else file.parent for file in found}
    if len(folders) > 1:
        raise DataError("the inputs lie in several folders: choose where to write with --output_dir DIR")
    return folders.pop()


def _summary(meta: Meta, place: Path | str, asked: int) -> str:
    where = (lambda name: place / name) if isinstance(place, Path) else (lambda name: f"{place.rstrip('/')}/{name}")
    lines = [f"{'':5}  {'tokens':>13}  {'bytes/token':>11}  {'documents':>9}  file"]
    for name, split in meta.splits.items():
        ratio = split.bytes_in / split.tokens
        lines.append(f"{name:5}  {split.tokens:13,}  {ratio:11.2f}  {split.documents:9,}  {where(split.file)}")
    lines.append(f"{meta.tokenizer.name} tokenizer, vocabulary {meta.vocab_size:,}, {meta.dtype}: {where(tokens.META)}")
    if asked > meta.vocab_size:
        why = "has no more pairs to merge" if meta.tokenizer.kind == "bpe" else "has no more words"
        lines.append(f"note: the text {why}, so {meta.vocab_size:,} ids and not {asked:,}")
    if repaired := sum(source.repaired for source in meta.inputs):
        lines.append(f"note: {repaired:,} places were not UTF-8 (meta.json counts them for each input)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
