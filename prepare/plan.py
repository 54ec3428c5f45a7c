"""What has to be known before the first token is written: how the text is split, and the vocabulary.

The plan is kept in the stage. A run that goes on uses it again if the text and the settings are the
same.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prepare import corpus, journal, notes, splits, tokenizer
from prepare.corpus import Layout, Reading
from prepare.encoder import Chunker, Part, decoded
from prepare.progress import Phase
from prepare.ranks import KNOWN
from prepare.sources import Say, Source
from prepare.tokenizer import Learning, Tokenizer
from prepare.tokens import DataError, TokenizerSection


@dataclass(frozen=True)
class Settings:
    """The settings that decide, together with the text, what the files will be."""

    tokenizer: str = "gpt2"
    vocab_size: int = 0
    """Number of ids of bpe or word, special tokens included. 0: all words."""
    sample_size: int = 100_000_000
    """Bytes of text that bpe learns from, taken evenly from the whole text."""
    tokenizer_file: str | None = None
    """A ranks file: of a known encoding, or of the user's own (tokenizer "tiktoken")."""
    pattern: str = "gpt2"
    """The pattern of the user's own encoding: gpt2, cl100k_base or o200k_base."""
    separator: str = ""
    """What stands between documents in text files. Empty: each file is one document."""
    format: str = "auto"
    """The format of the files: one of formats.FORMATS, or `auto` to look at each file."""
    text_field: str = "text"
    """The JSON field, or the column of Parquet, CSV or TSV, that holds the text. `a.b` is field b within field a."""
    errors: str = "strict"
    """What to do with bytes that are not UTF-8: `strict` stops, `replace` puts U+FFFD, `skip` leaves them out."""
    split: str = "auto"
    """`tail`, `hash`, or `auto`, which depends on the number of documents (splits.py)."""
    seed: int = 0
    """Seed of the hash."""
    val_fraction: float = 0.1
    """Share of the text that becomes val: above 0, below 1."""


@dataclass(frozen=True)
class Job:
    """All that one call of `prepare` works with."""

    sources: Sequence[Source]
    output_dir: Path
    stage: Path
    """The folder with the work until it is published."""
    settings: Settings
    engine_name: str
    workers: int
    phase: Phase
    say: Say

    @property
    def size(self) -> int:
        """Bytes of all inputs, as they are stored (packed)."""
        return sum(source.size for source in self.sources)

    @property
    def layout(self) -> Layout:
        settings = self.settings
        return Layout(_unescaped(settings.separator), settings.text_field, lenient=settings.errors == "skip")


@dataclass(frozen=True)
class Plan:
    """How the text is split. Kept in the stage, for a run that goes on."""

    method: str
    """How the text is split: tail or hash."""
    border: int
    """For `tail`, the number of characters before the val text."""
    coder: Tokenizer
    section: TokenizerSection


def make_plan(job: Job) -> Plan:
    """The plan of unfinished work with the same text and settings, else a new one. Learns the vocabulary if needed."""
    settings, stage = job.settings, job.stage
    wanted = {
        "settings": _identity(settings),
        "inputs": [
            [source.name, source.size, source.state, source.kind, source.packing, source.mark] for source in job.sources
        ],
    }
    plan = journal.read_plan(stage)
    coder: Tokenizer | None = None
    if plan and (other := _difference(plan, wanted)):
        job.say(f"the unfinished work in {stage} was for {other}: starting afresh")
    elif plan:
        plan |= wanted
        try:
            coder = tokenizer.from_section(TokenizerSection(**plan["tokenizer"]), stage)
        except DataError as error:
            job.say(f"the unfinished work cannot be used ({error}): starting afresh")
    if plan is None or coder is None:
        journal.clear(stage)
        with job.phase("measuring", job.size) as meter:
            method, border = _survey(settings, Reading(job.sources, job.layout, meter.advance))
        coder = _vocabulary(job)
        plan = {**wanted, "method": method, "border": border, "tokenizer": asdict(coder.save(stage))}
    journal.write_plan(stage, plan)
    return Plan(plan["method"], plan["border"], coder, TokenizerSection(**plan["tokenizer"]))


def _survey(settings: Settings, reading: Reading) -> tuple[str, int]:
    """How to split (tail or hash), and for tail the number of characters before the border.

    Only for tail does it read all of the text.
    """
    enough = splits.many(settings.val_fraction)
    characters = 0
    if settings.split != "hash":
        for piece in reading.pieces():
            characters += corpus.count_characters(piece.data)
            if settings.split == "auto" and reading.documents >= enough:
                break
        else:
            return "tail", int((1 - settings.val_fraction) * characters)
    return "hash", 0


def _vocabulary(job: Job) -> Tokenizer:
    settings = job.settings
    name, file = settings.tokenizer, Path(settings.tokenizer_file) if settings.tokenizer_file else None
    if name in KNOWN:
        return tokenizer.known(name, file)
    if name == "tiktoken":
        assert file is not None
        return tokenizer.from_file(file, settings.pattern)
    kind = tokenizer.KINDS[name]
    wanted = Learning(job.size, settings.vocab_size, settings.sample_size)
    if not kind.learned:
        return kind.learn(iter(()), wanted)
    with job.phase(f"learning the {name} vocabulary", job.size) as meter:
        reading = Reading(job.sources, job.layout, meter.advance)
        chunks = Chunker(cuts_anywhere=kind.cuts_anywhere).chunks((splits.TRAIN, piece) for piece in reading.pieces())
        return kind.learn(
            (_text(part, job.sources, settings.errors) for chunk in chunks for part in chunk.parts), wanted
        )


def _text(part: Part, sources: Sequence[Source], errors: str) -> str:
    try:
        return decoded(part.data, errors)[0]
    except UnicodeDecodeError as error:
        raise notes.bad_text(
            sources[part.source], part.row, part.offset + error.start, part.data[error.start]
        ) from error


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings, with the content of the tokenizer file in place of its name."""
    fields = asdict(settings)
    if settings.tokenizer_file and Path(settings.tokenizer_file).is_file():
        fields["tokenizer_file"] = hashlib.sha256(Path(settings.tokenizer_file).read_bytes()).hexdigest()
    return fields


def _difference(plan: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In words, how `plan` differs from what is wanted now; "" if it does not.

    Work done under --errors strict had no errors, so replace and skip can go on with it.
    """
    before, now = plan["settings"], wanted["settings"]
    for name in now:
        if before.get(name) != now[name] and not (name == "errors" and before.get(name) == "strict"):
            return f"other settings ({name} was {before.get(name)!r}, now it is {now[name]!r})"
    if plan["inputs"] != wanted["inputs"]:
        gone = [source[0] for source in plan["inputs"] if source not in wanted["inputs"]]
        new = [source[0] for source in wanted["inputs"] if source not in plan["inputs"]]
        return f"other inputs ({', '.join(sorted({*gone, *new})[:3]) or 'their order'} changed)"
    return ""


def _unescaped(separator: str) -> bytes:
    """A separator as typed in a shell, with the escapes \\n, \\t, \\r, \\0 and \\\\ replaced as in Python."""
    meanings = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
    return re.sub(r"\\([ntr0\\])", lambda found: meanings[found[1]], separator).encode()
