"""From text to the files of training: plan (plan.py), encode, publish.

The text is read in pieces and encoded in chunks, so memory does not grow with it. A journal of
finished chunks (journal.py) lets the same call go on after whatever stopped it. The files depend on
the text and the settings alone, not on the number of workers, the engine, or how often the work was
stopped.
"""

import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.filesize import decimal

from prepare import corpus, engine, journal, notes, progress, splits, tokenizer, tokens
from prepare.corpus import Reading
from prepare.encoder import (
    TRIM_EVERY,
    BadText,
    Chunk,
    Chunker,
    Coder,
    WrongIds,
    encode,
    give_memory_back,
)
from prepare.frontdoor import FULL
from prepare.journal import Changed, Journal
from prepare.plan import Job, Plan, Settings, make_plan
from prepare.progress import Phase
from prepare.sources import Say, Source, find, sample
from prepare.tokens import DataError, Meta

SMALL = 8 << 20
"""Inputs of at most so many bytes: tiktoken on one core is done before the fast engine and processes have started."""


def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)


def prepare(
    inputs: Sequence[str],
    output_dir: Path,
    settings: Settings,
    *,
    engine_name: str = "auto",
    workers: int = 0,
    phase: Phase = progress.lines,
    say: Say = _say,
) -> Meta:
    """Encodes the text of `inputs` into `output_dir`, whole or not at all.

    Goes on with the work of an earlier call with the same inputs and settings that was stopped.

    Args:
        inputs: files, folders, globs, URLs or "-", see sources.find. None at all: the sample.
        engine_name: auto, fast or tiktoken.
        workers: threads or processes that encode. 0: one for each core.
        phase: shows progress.
        say: is told, line by line, what a person should know.

    Raises DataError for what the user can mend.
    """
    for name in inputs:
        if name != "-" and "://" not in name and _below(name, output_dir / journal.STAGE):
            raise DataError(f"{name} lies in {output_dir / journal.STAGE}, where prepare works: move it elsewhere")
    with journal.stage(output_dir) as stage:
        try:
            spooled = _spool(stage / journal.STDIN, phase) if "-" in inputs else None
            field = settings.text_field
            sources = find(inputs, spooled, wanted=settings.format, field=field, say=say) if inputs else [sample()]
            for source in sources:
                _check_apart(source, output_dir)
            _tell_idle_settings(settings, sources, say)
            job = Job(sources, output_dir, stage, settings, engine_name, workers, phase, say)
            while True:
                plan = make_plan(job)
                try:
                    meta = _publish(job, plan, _encode(job, plan))
                    break
                except Changed:
                    journal.clear(stage)
                    say(f"the text is not the one that the unfinished work in {stage} was for: starting afresh")
        except OSError as error:
            if error.errno not in FULL:
                raise
            free = decimal(shutil.disk_usage(output_dir).free)
            raise DataError(
                f"no room left in {output_dir} ({free} free): make room and run the same command again, "
                "it goes on where it stopped"
            ) from error
        finally:
            work = stage / "journal.jsonl"
            if not work.exists() or not work.stat().st_size:
                journal.remove(stage)
        journal.remove(stage)
    return meta


@dataclass(frozen=True)
class _Encoded:
    """The finished token files, still in the stage, and what was counted."""

    working: Coder
    done: Journal
    reading: Reading
    chunker: Chunker
    hashes: Sequence[str]
    """sha256 of train.bin and of val.bin."""


def _encode(job: Job, plan: Plan) -> _Encoded:
    """Encode all chunks that are not done yet. Raises Changed if the text is not the one of the unfinished work."""
    settings, stage, coder = job.settings, job.stage, plan.coder
    small = job.size < SMALL
    chosen = engine.choose("tiktoken" if job.engine_name == "auto" and small else job.engine_name, coder, stage)
    working = Coder(coder, chosen, tokens.dtype_for(coder.vocab_size), settings.errors)
    workers = job.workers or (1 if small else min(_cores(), 2 if isinstance(chosen, engine.Fast) else 32))
    done = Journal(stage)
    try:
        with job.phase("encoding", job.size) as meter:
            reading = Reading(job.sources, job.layout, meter.advance)
            chunker = Chunker(cuts_anywhere=coder.cuts_anywhere)
            pieces = reading.measured_pieces()
            sided = (
                splits.by_tail(pieces, plan.border)
                if plan.method == "tail"
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
                job.say(f"going on after {decimal(sum(done.bytes))} of tokens in {stage}")
            for count, (chunk, coded) in enumerate(encode(ahead(), working, workers, plan.section, stage)):
                done.add(chunk, coded)
                if count % TRIM_EVERY == 0:
                    give_memory_back()
                meter.text += chunk.size
                meter.tokens += sum(map(len, coded.ids)) // working.dtype.itemsize
        return _Encoded(working, done, reading, chunker, done.finish())
    except BadText as error:
        source, *place = error.args
        raise notes.bad_text(job.sources[source], *place) from error
    except WrongIds:
        journal.clear(stage)
        raise
    finally:
        done.close()


def _publish(job: Job, plan: Plan, encoded: _Encoded) -> Meta:
    """Move the files to their place, meta.json last, and tell what was left out of the text."""
    settings, done, chunker = job.settings, encoded.done, encoded.chunker
    counts = [length // encoded.working.dtype.itemsize for length in done.bytes]
    if min(counts) < 2:
        journal.clear(job.stage)
        raise splits.too_little(dict(zip(journal.SIDES, counts, strict=True)), plan.method)
    meta = Meta(
        format_version=tokens.FORMAT_VERSION,
        dtype=tokens.dtype_for(plan.coder.vocab_size),
        vocab_size=plan.coder.vocab_size,
        tokenizer=plan.section,
        eot_id=plan.coder.eot_id,
        splits={
            file.removesuffix(".bin"): tokens.Split(
                file, counts[side], chunker.documents[side], chunker.bytes[side], encoded.hashes[side]
            )
            for side, file in enumerate(journal.SIDES)
        },
        inputs=encoded.reading.inputs([done.repaired[number] for number in range(len(job.sources))]),
        split=tokens.SplitRule(plan.method, settings.seed if plan.method == "hash" else None, settings.val_fraction),
        tools={tokens.PACKAGE: tokens.own_version(), "python": platform.python_version()}
        | {tool: version(tool) for tool in sorted({"tiktoken", "rustbpe", encoded.working.engine.name})},
    )
    tokens.publish(job.stage, job.output_dir, meta)
    if done.unknown:
        job.say(f"{done.unknown:,} words are not in the vocabulary and became {tokenizer.UNKNOWN}")
    notes.left_out(encoded.reading, job.sources, settings.separator, job.say)
    if plan.method == "tail" and settings.seed:
        job.say(
            f"--seed {settings.seed} has no effect: val is the tail of the text, and only a split by hash has a seed"
        )
    return meta


def _below(path: str, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _check_apart(source: Source, output_dir: Path) -> None:
    """Raises DataError if writing the output would overwrite a source."""
    if not source.place or "://" in source.place or source.name == "standard input":
        return
    written = [output_dir / name for name in (*journal.SIDES, tokens.META, "tokenizer")]
    if any(_below(source.place, path) for path in written):
        raise DataError(f"{source.name} would be overwritten by the output: choose another --output_dir")


def _tell_idle_settings(settings: Settings, sources: Sequence[Source], say: Say) -> None:
    """Tell which settings have no effect on these sources."""
    kinds = {source.kind for source in sources if source.place}
    sampled = not any(source.place for source in sources)
    what = "the sample" if sampled else f"the input is {' and '.join(sorted(kinds))}"
    if settings.separator and "text" not in kinds:
        say(f"--separator has no effect: {what}, whose records are the documents")
    if settings.text_field != "text" and kinds <= {"text"}:
        say(f"--text-field {settings.text_field} has no effect: {what}, which has no fields (--format tells otherwise)")
    if settings.sample_size != Settings.sample_size and settings.tokenizer != "bpe":
        say(f"--sample-size has no effect: it is for --tokenizer bpe, and this is {settings.tokenizer}")
    if settings.format != "auto" and sampled:
        say("--format has no effect on the sample")


def _spool(path: Path, phase: Phase) -> Path:
    """Saves standard input to `path`, since text is read more than once."""
    with phase("saving standard input", 0) as meter, path.open("wb") as file:
        while block := sys.stdin.buffer.read(corpus.PIECE_BYTES):
            file.write(block)
            meter.advance(len(block))
    return path


def _cores() -> int:
    """How many cores this process may use; in a container, its limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no limit ("max"), or not in a cgroup
        return cores
