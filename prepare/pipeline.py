"""From text to the files of training: which text on which side, with which vocabulary, on how many cores.

The text is read in pieces and encoded in chunks: memory does not grow with it. What is done is written down (journal.py), so
that the same call goes on after whatever stopped it. The files depend on the text and the settings alone, not on
the number of workers, the engine, or how often they were stopped.
"""

import errno
import hashlib
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from prepare import corpus, engine, journal, learn, progress, splits, tokenizer, tokens
from prepare.corpus import Layout, Reading
from prepare.encoder import (
    TRIM_EVERY,
    BadText,
    Chunk,
    Chunker,
    Coder,
    Part,
    WrongIds,
    decoded,
    encode,
    give_memory_back,
)
from prepare.journal import Changed, Journal
from prepare.progress import Phase
from prepare.ranks import KNOWN
from prepare.sources import Source, find, sample
from prepare.tokenizer import Tokenizer
from prepare.tokens import DataError, Meta, TokenizerSection

SMALL = 8 << 20
"""Bytes of input that one core encodes with tiktoken before a faster engine and other processes have started."""


@dataclass(frozen=True)
class Settings:
    """What decides, together with the text, what the files will be."""

    tokenizer: str = "gpt2"
    vocab_size: int = 0
    """For bpe and word, special tokens included; 0: all words."""
    sample_size: int = 100_000_000
    """Bytes of text that bpe learns from, taken from all of it evenly."""
    tokenizer_file: str | None = None
    """Ranks of a known encoding, or of one of the user's own ("tiktoken")."""
    pattern: str = "gpt2"
    """Of the user's own encoding: gpt2, cl100k_base or o200k_base."""
    separator: str = ""
    """Between documents in text files; empty: a file is a document."""
    text_field: str = "text"
    """Of JSON lines; the column of Parquet."""
    errors: str = "strict"
    """What is no UTF-8: `strict` stops, `replace` puts U+FFFD, `skip` leaves it out."""
    split: str = "auto"
    """`tail`, `hash`, or `auto`: by the number of documents."""
    seed: int = 0
    """Of the hash."""
    val_fraction: float = 0.1
    """Above 0, below 1."""


def prepare(
    inputs: Sequence[str],
    output_dir: Path,
    settings: Settings,
    *,
    engine_name: str = "auto",
    workers: int = 0,
    phase: Phase = progress.lines,
) -> Meta:
    """Encodes what `inputs` name (nothing: the sample) into `output_dir`, whole or not at all.

    Goes on where a run with the same settings was stopped. `engine_name` is auto, fast or tiktoken; `workers` 0 means
    as many as there are cores. Raises DataError for what the user can mend.
    """
    with journal.stage(output_dir) as stage:
        try:
            spooled = _spool(stage / journal.STDIN, phase) if "-" in inputs else None
            sources = find(inputs, spooled) if inputs else [sample()]
            for source in sources:
                if Path(source.place).resolve() in [
                    (output_dir / name).resolve() for name in (*journal.SIDES, tokens.META)
                ]:
                    raise DataError(f"{source.name} would be overwritten by the output: choose another --output_dir")
            meta = _prepare(sources, output_dir, stage, settings, engine_name, workers, phase)
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = decimal(shutil.disk_usage(output_dir).free)
            raise DataError(
                f"no room left in {output_dir} ({free} free): make room and run the same command again, "
                "it goes on where it stopped"
            ) from err
        finally:
            work = stage / "journal.jsonl"
            if not work.exists() or not work.stat().st_size:
                journal.remove(stage)
        journal.remove(stage)
    return meta


def _prepare(
    sources: Sequence[Source],
    output_dir: Path,
    stage: Path,
    settings: Settings,
    engine_name: str,
    workers: int,
    phase: Phase,
) -> Meta:
    size = sum(source.size for source in sources)
    layout = Layout(_unescaped(settings.separator), settings.text_field, lenient=settings.errors == "skip")
    wanted = {
        "settings": _identity(settings),
        "inputs": [[source.name, source.size, source.state] for source in sources],
    }
    plan = journal.read_plan(stage)
    coder: Tokenizer | None = None
    if plan and (other := _difference(plan, wanted)):
        _say(f"the unfinished work in {stage} was for {other}: starting afresh")
    elif plan:
        plan |= wanted
        try:
            coder = tokenizer.from_section(TokenizerSection(**plan["tokenizer"]), stage)
        except DataError as err:
            _say(f"the unfinished work cannot be used ({err}): starting afresh")
    if plan is None or coder is None:
        journal.clear(stage)
        with phase("measuring", size) as meter:
            method, border = _survey(settings, Reading(sources, layout, meter.advance))
        coder = _tokenizer(settings, sources, layout, size, phase)
        plan = {**wanted, "method": method, "border": border, "tokenizer": asdict(coder.save(stage))}
    journal.write_plan(stage, plan)
    section = TokenizerSection(**plan["tokenizer"])

    chosen = engine.choose("tiktoken" if engine_name == "auto" and size < SMALL else engine_name, coder, stage)
    working = Coder(coder, chosen, tokens.dtype_for(coder.vocab_size), settings.errors)
    if not workers:
        workers = 1 if size < SMALL else min(_cores(), 2 if isinstance(chosen, engine.Fast) else 32)
    done = Journal(stage)
    try:
        with phase("encoding", size) as meter:
            reading = Reading(sources, layout, meter.advance)
            chunker = Chunker(cuts_anywhere=coder.cuts_anywhere)
            pieces = reading.measured_pieces()
            sided = (
                splits.by_tail(pieces, plan["border"])
                if plan["method"] == "tail"
                else splits.by_hash(pieces, settings.seed, settings.val_fraction)
            )

            def ahead() -> Iterator[tuple[int, Chunk]]:
                number = 0
                for number, chunk in enumerate(chunker.chunks(sided), 1):
                    if not done.is_done(number - 1, chunk):
                        if not meter.text:
                            meter.start()
                        yield number - 1, chunk
                if number < len(done.done):
                    raise Changed

            if done.done:
                _say(f"going on after {decimal(sum(done.bytes))} of tokens in {stage}")
            for count, (chunk, coded) in enumerate(encode(ahead(), working, workers, section, stage)):
                done.add(chunk, coded)
                if count % TRIM_EVERY == 0:
                    give_memory_back()
                meter.text += chunk.size
                meter.tokens += sum(map(len, coded.ids)) // working.dtype.itemsize
        hashes = done.finish()
    except Changed:
        done.close()
        journal.clear(stage)
        _say(f"the text is not the one that the unfinished work in {stage} was for: starting afresh")
        return _prepare(sources, output_dir, stage, settings, engine_name, workers, phase)
    except BadText as err:
        source, *place = err.args
        raise _bad_text(sources[source], *place) from err
    except WrongIds:
        journal.clear(stage)
        raise
    finally:
        done.close()

    counts = [length // working.dtype.itemsize for length in done.bytes]
    if min(counts) < 2:
        journal.clear(stage)
        raise splits.too_little(dict(zip(journal.SIDES, counts, strict=True)), plan["method"])
    meta = Meta(
        format_version=tokens.FORMAT_VERSION,
        dtype=tokens.dtype_for(coder.vocab_size),
        vocab_size=coder.vocab_size,
        tokenizer=section,
        eot_id=coder.eot_id,
        splits={
            file.removesuffix(".bin"): tokens.Split(
                file, counts[side], chunker.documents[side], chunker.bytes[side], hashes[side]
            )
            for side, file in enumerate(journal.SIDES)
        },
        inputs=reading.inputs([done.repaired[number] for number in range(len(sources))]),
        split=tokens.SplitRule(
            plan["method"], settings.seed if plan["method"] == "hash" else None, settings.val_fraction
        ),
        tools={"python": platform.python_version()}
        | {tool: version(tool) for tool in sorted({"tiktoken", "rustbpe", chosen.name})},
    )
    tokens.publish(stage, output_dir, meta)
    if done.unknown:
        _say(f"{done.unknown:,} words are not in the vocabulary and became {tokenizer.UNKNOWN}")
    return meta


def _survey(settings: Settings, reading: Reading) -> tuple[str, int]:
    """How to split (tail or hash), and for the tail the number of characters before the border.

    Reads everything only where that is the tail's.
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


def _tokenizer(settings: Settings, sources: Sequence[Source], layout: Layout, size: int, phase: Phase) -> Tokenizer:
    name, file = settings.tokenizer, Path(settings.tokenizer_file) if settings.tokenizer_file else None
    if name in KNOWN:
        return tokenizer.known(name, file)
    if name == "tiktoken":
        assert file is not None
        return tokenizer.from_file(file, settings.pattern)
    if name == "byte":
        return tokenizer.Bytes()
    with phase(f"learning the {name} vocabulary", size) as meter:
        reading = Reading(sources, layout, meter.advance)
        chunks = Chunker(cuts_anywhere=name == "char").chunks((splits.TRAIN, piece) for piece in reading.pieces())
        texts = (_text(part, sources, settings.errors) for chunk in chunks for part in chunk.parts)
        if name == "char":
            return learn.characters(texts)
        if name == "word":
            return learn.words(texts, settings.vocab_size)
        return learn.byte_pairs(texts, size, settings.vocab_size, settings.sample_size)


def _text(part: Part, sources: Sequence[Source], errors: str) -> str:
    try:
        return decoded(part.data, errors)[0]
    except UnicodeDecodeError as err:
        raise _bad_text(sources[part.source], part.row, part.offset + err.start, part.data[err.start]) from err


def _bad_text(source: Source, row: int, offset: int, byte: int) -> DataError:
    bad = f"{source.name} is not UTF-8 text: {source.where(row, offset)} has 0x{byte:02x}"
    return DataError(f"{bad}; convert it (iconv -t UTF-8) or unpack it, or say --errors replace or skip")


def _spool(path: Path, phase: Phase) -> Path:
    """Standard input, saved: text is read more than once, and again by a run that goes on."""
    with phase("saving standard input", 0) as meter, path.open("wb") as file:
        while block := sys.stdin.buffer.read(corpus.PIECE_BYTES):
            file.write(block)
            meter.advance(len(block))
    return path


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings, and what a file among them holds."""
    fields = asdict(settings)
    if settings.tokenizer_file and Path(settings.tokenizer_file).is_file():
        fields["tokenizer_file"] = hashlib.sha256(Path(settings.tokenizer_file).read_bytes()).hexdigest()
    return fields


def _difference(plan: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What of `plan` is not as it is wanted now, in words; nothing where all is.

    What was done under --errors strict had no errors, so it is good under replace and skip too.
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
    """What was typed in a shell: \\n, \\t, \\r, \\0 and \\\\ stand for what they do in Python."""
    meanings = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
    return re.sub(r"\\([ntr0\\])", lambda found: meanings[found[1]], separator).encode()


def _cores() -> int:
    """That this process may use: in a container, those of its limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such limit ("max"), or no such file
        return cores


def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)
