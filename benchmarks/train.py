"""Compares training with nanoGPT's train.py: both programs with their defaults, in turn, same model, batch and data.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/train.py --nanogpt nanoGPT [--size example 6x384 vocabulary] [--threads 1] [--compile] [--json FILE]
    python benchmarks/train.py --nanogpt nanoGPT --size gpt2 --device cuda --compile

Each program is a process of its own that is stopped while the other one has its turn, so a
machine's slow minutes hit both. What is counted is what each writes down: a line a step, between
the first whole step of a turn and its last. A ratio is ours over nanoGPT's, the median of the
pairs; above 1 ours is faster. Beside it the same by processor time, which other work on the machine
disturbs less. MFU is against matrix products of 2048 x 2048 in float32 measured here; on a GPU against its data sheet.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from elastic_gpt import devices
from model_zoo.nanogpt.model import GPT, GPTConfig

PATIENCE = 600.0  # seconds to the first step: compiling takes its time
FOREVER = 10**7  # steps


@dataclass(frozen=True)
class Size:
    """A model to train. Both use `batch` sequences per step; ours may divide them into micro-batches."""

    model: GPTConfig
    batch: int
    micro_batch: int
    preset: str


def _model(layers: int, width: int, heads: int, block: int, vocab: int) -> GPTConfig:
    """nanoGPT's architecture: no biases, the erf form of GELU."""
    return GPTConfig(vocab, block, layers, heads, width, bias=False, qkv_bias=False, activation="gelu_erf")


SIZES = {  # the presets' own micro-batches where a preset has this size
    "example": Size(_model(4, 128, 4, 64, 103), 12, 4, "shakespeare_char"),
    "6x384": Size(_model(6, 384, 6, 256, 103), 16, 16, "shakespeare_char"),
    "vocabulary": Size(_model(4, 256, 4, 256, 50304), 8, 8, "shakespeare_char"),
    "gpt2": Size(_model(12, 768, 12, 1024, 50304), 480, 12, "gpt2_124m"),
}


class Program:
    """A training process that runs in turns, and the steps that it has written down."""

    def __init__(
        self, command: Sequence[object], folder: Path, steps: Callable[[], int], log: Path, **more: str
    ) -> None:
        self.steps, self.log = steps, log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | more,
            )
        self.seen = psutil.Process(self.process.pid)

    def turn(self, steps: int, seconds: float) -> tuple[float, float]:
        """Seconds and processor seconds a step, over at least that many steps and seconds."""
        self.process.send_signal(signal.SIGCONT)
        self._until(self.steps() + 1, 0.0)  # the step that was stopped half-way
        first, start, used = self.steps(), time.perf_counter(), self._used()
        self._until(first + steps, seconds)
        done, took, spent = self.steps() - first, time.perf_counter() - start, self._used() - used
        self.process.send_signal(signal.SIGSTOP)
        return took / done, spent / done

    def _until(self, steps: int, seconds: float) -> None:
        start = time.perf_counter()
        while (last := self.steps()) < steps or time.perf_counter() < start + seconds:
            if self.process.poll() is not None or time.perf_counter() > start + PATIENCE:
                raise SystemExit(f"error: {self.log} ends after {last} steps: {self.log.read_text()[-2000:]}")
            time.sleep(0.002)
        while self.steps() == last:  # a turn begins and ends with the end of a step
            time.sleep(0.0005)

    def _used(self) -> float:
        times = self.seen.cpu_times()
        return times.user + times.system

    def peak_memory(self) -> int:
        """Peak main memory in megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def lines_that_hold(path: Path, word: bytes) -> Callable[[], int]:
    """A counter of the lines of a growing file that hold `word`; each call reads what is new."""
    count, place = 0, 0

    def steps() -> int:
        nonlocal count, place
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(place)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            place += len(whole)
            count += sum(word in line for line in whole.splitlines())
        return count

    return steps


@contextlib.contextmanager
def both(size: Size, options: argparse.Namespace, data: Path, work: Path) -> Iterator[tuple[Program, Program]]:
    """nanoGPT and ours, started and stopped again after their first steps."""
    model, threads = size.model, {"OMP_NUM_THREADS": str(options.threads)}
    accumulate = size.batch // size.micro_batch if size.preset == "gpt2_124m" else 1
    shape = {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd, "block_size": model.block_size}
    theirs = Program(
        [
            *(sys.executable, "-W", "ignore", "train.py", f"--device={options.device}", f"--compile={options.compile}"),
            *(
                f"--dataset={data / 'theirs'}",
                f"--out_dir={work / 'theirs'}",
                "--eval_iters=1",
                f"--eval_interval={FOREVER}",
            ),
            *(f"--batch_size={size.batch // accumulate}", f"--gradient_accumulation_steps={accumulate}"),
            *(f"--{name}={value}" for name, value in shape.items()),
        ],
        options.nanogpt,
        lines_that_hold(work / "theirs.log", b"iter "),
        work / "theirs.log",
        **threads,
    )
    ours = Program(
        [
            *(sys.executable, "-W", "ignore", "-m", "elastic_gpt.cli", "train", size.preset, f"--steps={FOREVER}"),
            *(f"--data.dir={data / 'ours'}", f"--run-dir={work / 'ours'}", f"--device={options.device}"),
            *(f"--compile={options.compile}", f"--dtype={options.dtype}", f"--model.vocab-size={model.vocab_size}"),
            *(f"--global-batch={size.batch}", f"--micro-batch={size.micro_batch}", f"--evaluate.interval={FOREVER}"),
            *(f"--checkpoint.interval={FOREVER}", "--model.bias=false", "--model.qkv-bias=false"),
            "--model.activation=gelu_erf",
            *(f"--model.{name.replace('_', '-')}={value}" for name, value in shape.items()),
        ],
        Path.cwd(),
        lines_that_hold(work / "ours" / "metrics.jsonl", b'"step"'),
        work / "ours.log",
        **threads,
    )
    try:
        for program in (ours, theirs):
            program.process.send_signal(signal.SIGSTOP)
        for program in (theirs, ours):
            program.turn(3, 0.0)  # warm
        yield theirs, ours
    finally:
        ours.end()
        theirs.end()


def peak(device: str, threads: int) -> float:
    """Operations a second of the device: a GPU's data sheet (measured if it is not known), of a CPU a large matrix product."""
    if device == "cuda":
        known = devices.peak_flops(torch.device(device), torch.bfloat16)
        assert known is not None
        return known
    torch.set_num_threads(threads)
    return devices.measured_peak(torch.device(device), torch.float32, 2048)


def prepare(work: Path) -> Path:
    """The sample corpus a token a character, for both programs."""
    ours, theirs = work / "data" / "ours", work / "data" / "theirs"
    command = [sys.executable, "-m", "elastic_gpt.cli"]
    for words in (
        ["prepare", "--sample", "--tokenizer", "char", "--output-dir", str(ours)],
        ["convert", str(ours), str(theirs), "--format", "nanogpt"],
    ):
        subprocess.run(command + words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return work / "data"


def compare(name: str, options: argparse.Namespace, data: Path, work: Path) -> dict[str, object]:
    """One row of the table."""
    size = SIZES[name]
    tokens = size.batch * size.model.block_size
    meta = data / "theirs" / "meta.pkl"  # nanoGPT takes the vocabulary size from it, or else 50,304
    if size.model.vocab_size == 50304:
        meta.unlink(missing_ok=True)
    highest, pairs = 0.0, []
    with both(size, options, data, work) as (theirs, ours):
        for number in range(options.pairs):
            highest = max(highest, peak(options.device, options.threads))
            order = (theirs, ours) if number % 2 else (ours, theirs)
            took = {program: program.turn(options.steps, options.seconds) for program in order}
            pairs.append((took[theirs], took[ours]))
        memory = theirs.peak_memory(), ours.peak_memory()
        dtype = next(line for line in ours.log.read_text().splitlines() if line.startswith("model: ")).split("; ")[-1]
    with torch.device("meta"):
        flops = GPT(size.model).flops_per_token()
    speed = [tokens / statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
    return {
        "size": name,
        "threads": options.threads,
        "compile": options.compile,
        "ours in": dtype,
        "nanoGPT tokens/s": round(speed[0]),
        "ours tokens/s": round(speed[1]),
        "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 2),
        "by processor time": round(statistics.median(a[1] / b[1] for a, b in pairs), 2),
        "MFU": " / ".join(f"{tokens_ * flops / highest:.0%}" for tokens_ in speed),
        "peak MB": " / ".join(str(megabytes) for megabytes in memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["example", "6x384", "vocabulary"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", help="of ours: auto is what a user gets; nanoGPT's is float32 on a CPU"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="both")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="at least so many a turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="at least so long a turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    options.nanogpt = options.nanogpt.resolve()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(
        f"{machine}, torch {torch.__version__}, Python {platform.python_version()}; median of {options.pairs} pairs\n"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder))
        for name in options.size:
            work = Path(folder) / name
            work.mkdir()
            rows.append(compare(name, options, data, work))
            shutil.rmtree(work)
            if len(rows) == 1:
                print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
            print(f"| {' | '.join(str(value) for value in rows[-1].values())} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))


def processor() -> str:
    """Name and number of the processors."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
