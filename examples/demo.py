"""The whole way on this machine in a few minutes: text in, elastic training, text out, also over HTTP.

    make demo

Three local nodes train under DLRover. The one with rank 0 is killed with `kill -9`, and later
another one joins. Then one process trains the same configuration undisturbed. demo/elastic.png
shows both loss curves. Exits with 1 if they differ.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from random import Random

from elastic_gpt.drill.compare import compare, draw
from elastic_gpt.drill.faults import Faults
from elastic_gpt.nodes.local import LocalJob

DEMO = Path("demo")
STEPS, KILL_AT, JOIN_AT = 800, 255, 400


def main() -> int:
    shutil.rmtree(DEMO, ignore_errors=True)
    title("1/6  text to tokens: the documentation in Python's standard library, one token a character")
    run("prepare", "--sample", "--tokenizer", "char", "--output-dir", DEMO / "data")

    title(f"2/6  three nodes under DLRover; node 0 is killed after step {KILL_AT}, node 3 joins after step {JOIN_AT}")
    elastic(settings(DEMO / "run"))

    title("3/6  the same configuration, undisturbed, in one process")
    run("train", *settings(DEMO / "undisturbed"))

    title("4/6  both curves")
    found = compare(DEMO / "run", DEMO / "undisturbed")
    draw(DEMO / "run", DEMO / "undisturbed", DEMO / "elastic.png")
    print(f"largest loss difference over {STEPS} steps: {found.loss_difference:.1e}")
    print(f"same sequences at every step: {'yes' if found.same_sequences and found.same_steps else 'NO'}")
    print(f"parameters equal bit for bit: {'yes' if found.same_parameters else 'NO'}")
    print(f"picture: {DEMO / 'elastic.png'}")

    title("5/6  text from the model that lived through it")
    run("generate", DEMO / "run", "--prompt", "The ", "--max-new-tokens", "300", "--seed", "1")

    title("6/6  the same model behind HTTP, asked once")
    ask()
    print("\nWhat happened, and what it cost:  .venv/bin/elastic-gpt ledger demo/run")
    print("Talk to it:  .venv/bin/elastic-gpt generate demo/run")
    print("            or .venv/bin/elastic-gpt serve demo/run, and a browser")
    return 0 if found.same_steps and found.same_sequences and found.loss_difference < 1e-3 else 1


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


def ask() -> None:
    """Start the server on a free port, send it one request as a client of OpenAI's would, and end it."""
    command = [sys.executable, "-m", "elastic_gpt.cli", "serve", str(DEMO / "run"), "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            told = next(line for line in server.stderr if line.startswith("serving "))
            address = told.split()[-1]
            wanted = {"model": "run", "prompt": "The ", "max_tokens": 40, "seed": 1}
            print(f"POST {address}/v1/completions {json.dumps(wanted)}")
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/completions", json.dumps(wanted).encode(), head)
            with urllib.request.urlopen(request) as answer:
                print(answer.read().decode())
        finally:
            server.terminate()


def elastic(arguments: list[str]) -> None:
    with LocalJob(["train", *arguments], least=1, most=4, threads=1) as job:
        faults = Faults(job, DEMO / "run", nodes=4, dice=Random(1))
        for _ in range(3):
            job.add_node()
        faults.reach(KILL_AT)
        job.kill(0)
        job.say("[demo] kill -9 of node 0")
        faults.reach(JOIN_AT)
        job.say("[demo] a new node joins")
        job.add_node()
        faults.reach(STEPS)
        while job.running():
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
