"""Shows what prepared data holds: a table, a histogram of document lengths, or a full check.

    elastic-gpt inspect data/mine
    elastic-gpt inspect data/mine --histogram lengths.png
    elastic-gpt inspect data/mine --verify

Opens folders of nanoGPT, DLRover and llm.c too. Memory does not grow with the data. (The module is
not called inspect.py like its command, since that name would hide the standard library's
`inspect`.)
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from prepare.data import find_tokenizer, open_split, read_meta
from prepare.frontdoor import Namespace, Parser, command, printable, writing
from prepare.picture import plain, quiet
from prepare.tokenizer import Tokenizer
from prepare.tokens import META, DataError, Meta, blocks, document_lengths, fingerprint
from prepare.verify import Finding, verify

_SHOWN_CHARACTERS = 300  # of decoded text are shown
_MOST_FREQUENT = 10
_BINS_PER_DECADE = 10


@dataclass
class Counts:
    """Statistics of the ids of one split."""

    ids: np.ndarray
    """How often each id occurs, shape (vocab_size + 1,); the last counts ids that are not in the vocabulary."""
    documents: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(12 * _BINS_PER_DECADE, dtype=np.int64))
    """How many documents have which length: bin i is for 10**(i/10) up to 10**((i+1)/10) tokens."""


def count(ids: np.memmap, vocab_size: int, eot_id: int | None, advance: Callable[[int], None]) -> Counts:
    """Reads all of `ids`, shape (n,). Calls `advance` with the number of bytes read since its last call."""
    counts = Counts(np.zeros(vocab_size + 1, dtype=np.int64))

    def read() -> Iterator[np.ndarray]:
        for block in blocks(ids):
            counts.ids += np.bincount(np.minimum(block, vocab_size), minlength=vocab_size + 1)
            advance(block.nbytes)
            yield block

    for lengths in document_lengths(read(), eot_id):
        counts.documents += len(lengths)
        counts.longest = max(counts.longest, int(lengths.max(initial=0)))
        bins = (_BINS_PER_DECADE * np.log10(lengths)).astype(np.int64)
        counts.lengths += np.bincount(bins, minlength=len(counts.lengths))
    return counts


@command
def main(argv: list[str] | None = None, prog: str = "elastic-gpt inspect") -> int:
    """The command line. Returns the exit status: 0; 1 if --verify found something wrong; 2 for the user's mistake."""
    flags = _parse(argv, prog)
    if flags.verify:
        return check(flags.folder)
    meta = read_meta(flags.folder)
    if flags.histogram:
        _check_drawable(meta, flags.histogram)
    console = Console()
    counts = {}
    with _bars("reading", _size(meta), console) as advance:
        for name in meta.splits:
            counts[name] = count(open_split(flags.folder, name), meta.vocab_size, meta.eot_id, advance)
    _show(flags.folder, meta, counts, console)
    if flags.histogram:
        draw(counts, flags.folder, flags.histogram)
        console.print(f"document lengths: {flags.histogram}", highlight=False, soft_wrap=True)
    return 0


@quiet()
def draw(counts: dict[str, Counts], folder: Path, path: Path) -> None:
    """Draws a histogram of document lengths, in tokens, for each split."""
    from matplotlib.figure import Figure

    edges = 10 ** (np.arange(12 * _BINS_PER_DECADE + 1) / _BINS_PER_DECADE)
    used = np.flatnonzero(np.sum([side.lengths for side in counts.values()], axis=0))
    shown = slice(used[0], used[-1] + 1)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for (name, side), colour in zip(counts.items(), ("#33658a", "#c8553d"), strict=False):
        axis.stairs(
            side.lengths[shown],
            edges[shown.start : shown.stop + 1],
            fill=True, alpha=0.7, color=colour, label=f"{name}: {side.documents:,} documents",
        )  # fmt: skip
    axis.set(
        xscale="log",
        xlabel="tokens in a document",
        ylabel="documents",
        title=plain(f"Document lengths in {printable(str(folder))}"),
    )
    axis.legend()
    with writing(path):
        figure.savefig(path, dpi=120)


def _check_drawable(meta: Meta, path: Path) -> None:
    """Raises DataError if no histogram can be drawn. Called first, since reading the data may take minutes."""
    if meta.eot_id is None:
        name = meta.tokenizer.name
        raise DataError(f"the {name} tokenizer puts nothing between documents: there are no lengths to draw")
    with quiet():
        import matplotlib  # noqa: F401 - a second to import, and not everybody has it
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "would lie in a folder that is not there"
        raise DataError(f"--histogram {printable(str(path))} {what}: name a file in one that is")


EXAMPLES = """\
Opens what prepare, nanoGPT, DLRover and llm.c made. --verify ends with status 1 if something is wrong.

examples:
  %(prog)s data/mine                             tokens, documents, frequent tokens, text
  %(prog)s data/mine --histogram lengths.png     the documents' lengths, drawn
  %(prog)s data/mine --verify                    reads all of it again
"""


def _parse(argv: list[str] | None, prog: str) -> Namespace:
    parser = Parser(
        prog=prog,
        description="Show what prepared data holds, or check all of it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="DATA_DIR", help="the folder with train.bin and val.bin")
    parser.add_argument("--histogram", type=Path, metavar="FILE", help="draw the documents' lengths into a .png")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check sizes, hashes, ids and text, and encode samples again with tiktoken",
    )
    flags = parser.parse_args(argv)
    if flags.verify and flags.histogram:
        parser.error("--verify checks and --histogram draws: choose one of them")
    if flags.histogram and flags.histogram.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--histogram {flags.histogram}: name a .png, .svg or .pdf file")
    return flags


def check(folder: Path, more: Iterable[Finding] = ()) -> int:
    """Prints what each check of `folder` found, then the findings `more`. Returns 1 if something is wrong, else 0.

    Raises DataError if there is no data.
    """
    meta = read_meta(folder)
    console = Console(highlight=False, soft_wrap=True)
    marks = {True: "[green]ok[/]   ", None: "[yellow]note[/] ", False: "[red]WRONG[/]"}
    wrong = 0
    with _bars("checking", _size(meta), console) as advance:
        for finding in itertools.chain(verify(folder, advance), more):
            console.print(f"{marks[finding.good]}  {escape(finding.text)}")
            wrong += finding.good is False
    console.print(f"[red]{folder} is not what it says it is[/]" if wrong else f"{folder} is in order")
    return 1 if wrong else 0


def _show(folder: Path, meta: Meta, counts: dict[str, Counts], console: Console) -> None:
    tokenizer = find_tokenizer(folder)
    table = Table("", *counts, title=str(folder), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, values in _rows(meta, counts, tokenizer):
        table.add_row(title, *values)
    console.print(table)
    console.print(_facts(meta), highlight=False, soft_wrap=True, markup=False)
    strangers = sum(int(side.ids[-1]) for side in counts.values())
    if strangers:
        console.print(f"[red]{strangers:,} ids are not in the vocabulary[/]: --verify tells where", soft_wrap=True)
    console.print(_frequent(meta, counts, tokenizer))
    for name in counts:
        ids = open_split(folder, name)[:_SHOWN_CHARACTERS]
        known = tokenizer and (ids < meta.vocab_size).all()
        text = tokenizer.decode(ids) if tokenizer and known else " ".join(map(str, ids.tolist()))
        console.print(
            Panel(escape(_printable(text[:_SHOWN_CHARACTERS])), title=f"{name} begins", title_align="left"),
            highlight=False,
        )


def _rows(meta: Meta, counts: dict[str, Counts], tokenizer: Tokenizer | None) -> Iterator[tuple[str, list[str]]]:
    sides = [(meta.splits[name], side) for name, side in counts.items()]
    yield "tokens", [f"{split.tokens:,}" for split, _ in sides]
    documents = [side.documents if meta.eot_id is not None else split.documents for split, side in sides]
    if meta.eot_id is not None or meta.inputs:
        yield "documents", [f"{number:,}" for number in documents]
    if meta.eot_id is not None:
        yield "longest document, tokens", [f"{side.longest:,}" for _, side in sides]
    if tokenizer:
        texts = [split.bytes_in or _bytes(side, tokenizer) for split, side in sides]
        yield "text", [decimal(size) for size in texts]
        yield "bytes per token", [f"{size / split.tokens:.2f}" for size, (split, _) in zip(texts, sides, strict=True)]
    yield "ids that occur", [f"{np.count_nonzero(side.ids[:-1]):,}" for _, side in sides]
    yield "file", [split.file for split, _ in sides]


def _bytes(side: Counts, tokenizer: Tokenizer) -> int:
    """Bytes of text that all ids of a split stand for; end-of-text ids count 0."""
    used = [i for i in np.flatnonzero(side.ids[:-1]).tolist() if i != tokenizer.eot_id]
    return sum(int(side.ids[i]) * len(tokenizer.decode_bytes([i])) for i in used)


def _facts(meta: Meta) -> str:
    lines = [f"{meta.tokenizer.name} tokenizer, vocabulary {meta.vocab_size:,}, {meta.dtype}"]
    if meta.split.method == "unknown":
        lines.append(f"prepared by {' '.join(meta.tools)}, which leaves no {META}")
    else:
        seed = "" if meta.split.seed is None else f", seed {meta.split.seed}"
        lines.append(f"split: {meta.split.method}, {meta.split.fraction:.3g} of the text is val{seed}")
        names = ", ".join(source.name for source in meta.inputs[:3])
        more = f" and {len(meta.inputs) - 3:,} more" if len(meta.inputs) > 3 else ""
        lines.append(f"inputs: {names}{more}, {decimal(sum(source.bytes for source in meta.inputs))} of text")
    lines.append(f"fingerprint: {fingerprint(meta)}")
    return "\n".join(lines)


def _frequent(meta: Meta, counts: dict[str, Counts], tokenizer: Tokenizer | None) -> Table:
    table = Table("most frequent", "id", *(f"of {name}" for name in counts))
    for column in table.columns[1:]:
        column.justify = "right"
    total = np.sum([side.ids[:-1] for side in counts.values()], axis=0)
    for i in np.argsort(-total, kind="stable")[:_MOST_FREQUENT].tolist():
        if total[i]:
            shares = [f"{side.ids[i] / meta.splits[name].tokens:.2%}" for name, side in counts.items()]
            table.add_row(escape(repr(tokenizer.decode([i]))) if tokenizer else "?", str(i), *shares)
    return table


def _printable(text: str) -> str:
    """`text` with control characters as escapes, so that a terminal does not obey them."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _size(meta: Meta) -> int:
    return sum(split.tokens for split in meta.splits.values()) * np.dtype(meta.dtype).itemsize


@contextmanager
def _bars(title: str, size: int, results: Console) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal, below anything that is printed on `results` meanwhile."""
    console = results if results.is_terminal else Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=size)
        yield lambda done: bars.advance(task, done)
