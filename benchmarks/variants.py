"""Compares the validation loss of the modern variant with GPT-2's form, after the same tokens and after the same seconds.

    python benchmarks/variants.py [--corpus FILE] [--steps 500] [--seeds 1 2 3] [--threads 1] [--json FILE]

Trains the presets `shakespeare_modern` and `shakespeare_char` for so many steps, each with its own learning rate, the second
also with the first one's; then the second again, with the better of the two rates, for as many steps as it does in the time
that the first one took. A learning rate decays over the steps of its run. The time is the processor's, of the steps alone:
what a start and an evaluation take is taken off by a run of a tenth of the steps. Without --corpus on the sample that
`elastic-gpt prepare --sample` fetches.
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
from pathlib import Path

COMMAND = [sys.executable, "-W", "ignore", "-m", "elastic_gpt.cli"]
RATE = {"shakespeare_modern": 2e-3, "shakespeare_char": 1e-3}  # the presets' own


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
    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads, self.runs = folder, threads, 0

    def train(self, preset: str, steps: int, seed: int, rate: float) -> tuple[float, float]:
        """Validation loss after the last step, and processor seconds of the whole command."""
        self.runs += 1
        place = self.folder / f"run{self.runs}"
        rates = [f"--optimizer.learning-rate={rate}", f"--optimizer.min-learning-rate={rate / 10}"]
        where = [f"--data.dir={self.folder / 'data'}", f"--run-dir={place}", "--device=cpu"]
        often = [f"--steps={steps}", f"--seed={seed}", f"--evaluate.interval={steps}", f"--checkpoint.interval={steps}"]
        said, seconds = run(["train", preset, *where, *often, *rates], self.threads)
        return float(re.findall(r"validation loss (\S+)", said)[-1]), seconds

    def seconds_a_step(self, preset: str, steps: int, seed: int, whole: float) -> float:
        """Processor seconds a step of a run that took `whole`."""
        short = max(1, steps // 10)
        return (whole - self.train(preset, short, seed, RATE[preset])[1]) / (steps - short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="FILE", help="text to train on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    rows = []
    modern, old = "shakespeare_modern", "shakespeare_char"
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), options.threads)
        corpus = options.corpus or "--sample"
        run(["prepare", corpus, "--tokenizer", "char", "--output-dir", str(trainer.folder / "data")], options.threads)
        print("| seed | modern | GPT-2's form | with the modern one's rate | in the same time | its steps |")
        print("| --- | --- | --- | --- | --- | --- |")
        for seed in options.seeds:
            new, new_took = trainer.train(modern, options.steps, seed, RATE[modern])
            own, own_took = trainer.train(old, options.steps, seed, RATE[old])
            other, _ = trainer.train(old, options.steps, seed, RATE[modern])
            ratio = trainer.seconds_a_step(modern, options.steps, seed, new_took) / trainer.seconds_a_step(
                old, options.steps, seed, own_took
            )
            steps = round(options.steps * ratio)
            same, _ = trainer.train(old, steps, seed, RATE[modern] if other < own else RATE[old])
            rows.append({"seed": seed, "modern": new, "old": own, "rate": other, "seconds": same, "steps": steps})
            print(f"| {seed} | {new:.3f} | {own:.3f} | {other:.3f} | {same:.3f} | {steps} |", flush=True)
    means = [statistics.mean(row[name] for row in rows) for name in ("modern", "old", "rate", "seconds")]
    print(f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} | |")
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
