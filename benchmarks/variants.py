"""Compares the validation loss of two variants of a run, after the same tokens and after the same processor seconds.

    python benchmarks/variants.py [--compare model optimizer] [--corpus FILE] [--steps 500] [--seeds 1 2 3] [--threads 1]

`model`: the preset `shakespeare_modern` against `shakespeare_char`. `optimizer`: `shakespeare_modern` with Muon against the
same with AdamW. Trains both for so many steps, each with its own learning rate, the old one also with the new one's; then
the old one again, with the better of the two rates, for as many steps as it does in the time that the new one took. A
learning rate decays over the steps of its run. The time is the processor's, of the steps alone: what a start and an
evaluation take is taken off by a run of a tenth of the steps. Without --corpus on the sample that `elastic-gpt prepare
--sample` fetches.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-W", "ignore", "-m", "elastic_gpt.cli"]


@dataclass(frozen=True)
class Variant:
    name: str
    rate: float
    flags: tuple[str, ...]


# The presets' own rates. Of Muon 4e-3 was better than 2e-3 in 300 steps (seed 1).
MODERN = Variant("modern", 2e-3, ("shakespeare_modern",))
CHAR = Variant("GPT-2's form", 1e-3, ("shakespeare_char",))
MUON = Variant("modern, Muon", 4e-3, ("shakespeare_modern", "--optimizer.kind=muon"))
PAIRS = {"model": (MODERN, CHAR), "optimizer": (MUON, MODERN)}  # the new one, and what it is compared with


def run(words: list[str], threads: int) -> tuple[str, float]:
    """Do a command of ours: what it says, and its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(COMMAND + words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)}: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Trainer:
    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        self.folder, self.threads, self.dtype, self.runs = folder, threads, dtype, 0

    def train(self, variant: Variant, steps: int, seed: int, rate: float) -> tuple[float, float]:
        """Validation loss after the last step, and processor seconds of the whole command."""
        self.runs += 1
        place = self.folder / f"run{self.runs}"
        rates = [f"--optimizer.learning-rate={rate}", f"--optimizer.min-learning-rate={rate / 10}"]
        where = [f"--data.dir={self.folder / 'data'}", f"--run-dir={place}"]
        where += ["--device=cpu", f"--dtype={self.dtype}", "--observe.tensorboard=false"]
        often = [f"--steps={steps}", f"--seed={seed}", f"--evaluate.interval={steps}", f"--checkpoint.interval={steps}"]
        said, seconds = run(["train", *variant.flags, *where, *often, *rates], self.threads)
        return float(re.findall(r"validation loss (\S+)", said)[-1]), seconds

    def seconds_a_step(self, variant: Variant, steps: int, seed: int, whole: float) -> float:
        """Processor seconds a step of a run that took `whole`."""
        short = max(1, steps // 10)
        return (whole - self.train(variant, short, seed, variant.rate)[1]) / (steps - short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--corpus", metavar="FILE", help="text to train on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="auto: each run measures which is faster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), options.threads, options.dtype)
        corpus = options.corpus or "--sample"
        run(["prepare", corpus, "--tokenizer", "char", "--output-dir", str(trainer.folder / "data")], options.threads)
        results = {pair: compare(*PAIRS[pair], trainer, options.steps, options.seeds) for pair in options.compare}
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, **results}, indent=1))


def compare(new: Variant, old: Variant, trainer: Trainer, steps: int, seeds: list[int]) -> list[dict[str, float]]:
    """Print the table of a pair, a row a seed, and return its rows."""
    rows = []
    print(f"| seed | {new.name} | {old.name} | with the first one's rate | in the same time | its steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seed in seeds:
        mine, took = trainer.train(new, steps, seed, new.rate)
        own, own_took = trainer.train(old, steps, seed, old.rate)
        other = own if new.rate == old.rate else trainer.train(old, steps, seed, new.rate)[0]
        ratio = trainer.seconds_a_step(new, steps, seed, took) / trainer.seconds_a_step(old, steps, seed, own_took)
        more = round(steps * ratio)
        same, _ = trainer.train(old, more, seed, new.rate if other < own else old.rate)
        rows.append({"seed": seed, "new": mine, "old": own, "rate": other, "seconds": same, "steps": more})
        print(f"| {seed} | {mine:.3f} | {own:.3f} | {other:.3f} | {same:.3f} | {more} |", flush=True)
    means = [statistics.mean(row[name] for row in rows) for name in ("new", "old", "rate", "seconds")]
    print(f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} | |\n")
    return rows


if __name__ == "__main__":
    main()
