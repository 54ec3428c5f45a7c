"""The main job on this machine, in a few minutes: text in, elastic training, text out.

    make demo

Three local nodes train under DLRover; one is killed with `kill -9`, the one that held rank 0; later another joins. The same
configuration then is trained undisturbed by one process, and demo/elastic.png lays the two loss curves over each other.
Exits with 1 if they are not the same.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt

from elastic_gpt.ledger import Ledger
from elastic_gpt.local import LocalJob
from elastic_gpt.observers import read_metrics

DEMO = Path("demo")
STEPS, KILL_AT, JOIN_AT = 800, 255, 400
LIMIT_SECONDS = 240


def main() -> int:
    shutil.rmtree(DEMO, ignore_errors=True)
    title("1/5  text to tokens: the documentation in Python's standard library, one token a character")
    run("prepare", "--sample", "--tokenizer", "char", "--output-dir", DEMO / "data")

    title(f"2/5  three nodes under DLRover; node 0 is killed after step {KILL_AT}, node 3 joins after step {JOIN_AT}")
    elastic(settings(DEMO / "run"))

    title("3/5  the same configuration, undisturbed, in one process")
    run("train", *settings(DEMO / "undisturbed"))

    title("4/5  both curves")
    difference, same_data = compare()
    print(f"largest loss difference over {STEPS} steps: {difference:.1e}")
    print(f"same sequences at every step: {'yes' if same_data else 'NO'}")
    print(f"picture: {DEMO / 'elastic.png'}")

    title("5/5  text from the model that lived through it")
    run("generate", DEMO / "run", "--prompt", "The ", "--max-new-tokens", "300", "--seed", "1")
    print("\nTalk to it:  .venv/bin/elastic-gpt generate demo/run")
    return 0 if same_data and difference < 1e-3 else 1


def settings(directory: Path) -> list[str]:
    return [
        *("shakespeare_char", "--data.dir", str(DEMO / "data"), "--run-dir", str(directory), "--steps", str(STEPS)),
        *("--elastic.exact", "--device=cpu", "--observe.interval=100"),
        *("--evaluate.interval=400", "--checkpoint.interval=200"),
    ]


def title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(*words: object) -> None:
    # One CPU thread, as each of the three nodes has: what is equal bit for bit is equal on equal devices only.
    command = [sys.executable, "-m", "elastic_gpt.cli", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def elastic(arguments: list[str]) -> None:
    with LocalJob(["train", *arguments], least=1, most=4, threads=1) as job:
        for _ in range(3):
            job.add_node()
        wait_for(job, KILL_AT)
        job.kill(0)
        job.say("[demo] kill -9 of node 0")
        wait_for(job, JOIN_AT)
        job.say("[demo] a new node joins")
        job.add_node()
        wait_for(job, STEPS)
        while job.running():
            time.sleep(0.1)


def wait_for(job: LocalJob, step: int) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while done(DEMO / "run") < step:
        if not job.running() or time.monotonic() > deadline:
            sys.exit(f"error: the job stopped at step {done(DEMO / 'run')}: see {job.logs}")
        time.sleep(0.05)


def done(directory: Path) -> int:
    """Steps in the metrics so far, counting only whole lines."""
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare() -> tuple[float, bool]:
    """Largest loss difference, and whether each step had the same sequences; draws demo/elastic.png."""
    disturbed, undisturbed = read_metrics(DEMO / "run"), read_metrics(DEMO / "undisturbed")
    assert [line["step"] for line in disturbed] == [line["step"] for line in undisturbed] == list(range(1, STEPS + 1))
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(disturbed, undisturbed, strict=True))
    same_data = all(a["sequence_hash"] == b["sequence_hash"] for a, b in zip(disturbed, undisturbed, strict=True))
    draw(disturbed, undisturbed, difference)
    return difference, same_data


def draw(disturbed: list[dict], undisturbed: list[dict], difference: float) -> None:
    steps = [line["step"] for line in disturbed]
    figure, (loss, world) = plt.subplots(
        2, 1, figsize=(10, 6.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    loss.plot(
        steps, [line["loss"] for line in undisturbed], color="#b8c4d6", linewidth=5, label="undisturbed, 1 process"
    )
    loss.plot(
        steps, [line["loss"] for line in disturbed], color="#c8553d", linewidth=1, label="elastic, nodes come and go"
    )
    loss.set_ylabel("training loss (nats a token)")
    loss.set_title(f"The loss curve does not notice: largest difference {difference:.1e}")
    loss.legend(loc="upper right")
    world.step(steps, [line["world_size"] for line in disturbed], where="post", color="#33658a")
    world.set(ylabel="workers", xlabel="step", ylim=(0, 4.5), yticks=range(5))
    for step, text in changes():
        for axis in (loss, world):
            axis.axvline(step, color="#888888", linewidth=0.8, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "xytext": (4, -40), "textcoords": "offset points"}
        loss.annotate(text, (step, 1), fontsize=8, color="#555555", **place)
    figure.savefig(DEMO / "elastic.png", dpi=120)


def changes() -> list[tuple[int, str]]:
    """The membership changes of the elastic run: step, and what happened, for the picture."""
    found: list[tuple[int, str]] = []
    before: set[str] = set()
    for event in Ledger(DEMO / "run").events():
        if event["event"] == "joined":
            nodes = {name.rpartition("egpt-")[2].partition("-")[2] for name in event["nodes"]}
            parted, new, before = before - nodes, nodes - before, nodes
        if event["event"] == "restored" and event["step"]:
            what = [f"lost {', '.join(sorted(parted))}"] if parted else []
            what += [f"joined {', '.join(sorted(new))}"] if new else []
            found.append((event["step"], "\n".join([*what, f"{event['dropped']} steps done again"])))
    return found


if __name__ == "__main__":
    sys.exit(main())
