"""`elastic-gpt serve` under load: many clients at once, beside one at a time and beside transformers' generate in a loop.

    python benchmarks/serve.py [--size 4x128 6x384] [--clients 1 8 32 128] [--threads 1] [--tokens 64]

Every client asks twice, streaming, for so many tokens after 16 of a prompt, with a seed of its own.
Tokens a second are those of all clients together, and those a second of the server's processor
time, which other work on the machine disturbs less; the first token is counted from the moment its
request is sent. Each answer is compared with what the same server gave the same request alone: lost
are those that did not come whole, mixed up those that differ.
"""

import argparse
import asyncio
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from model_zoo.nanogpt.export import export
from model_zoo.nanogpt.loading import Loaded
from model_zoo.nanogpt.model import GPT, GPTConfig
from prepare.tokenizer import Characters

LETTERS = string.ascii_letters + string.digits + " .\n"
PROMPT = 16
SIZES = {"4x128": (4, 128, 4), "6x384": (6, 384, 6), "12x768": (12, 768, 12)}


@dataclass
class Measured:
    """What the clients measured."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    """Processor time of the server."""
    texts: list[str | None] = field(default_factory=list)
    """The text of each answer; None if it did not come whole."""
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def row(self, name: str, clients: int, tokens: int, alone: list[str | None]) -> str:
        lost = self.texts.count(None)
        mixed = sum(mine not in (None, theirs) for mine, theirs in zip(self.texts, alone, strict=True))
        drawn = (len(self.texts) - lost) * tokens
        speeds = [f"{drawn / seconds:,.0f}" for seconds in (self.seconds, self.processor_seconds)]
        cells = [f"{1e3 * np.percentile(of, at):,.0f}" for of in (self.first, self.between) for at in (50, 99)]
        return " | ".join(["", name, str(clients), *speeds, *cells, str(lost), str(mixed), ""]).strip()


HEAD = """\
| | clients | tokens/s | by processor time | first p50, ms | p99 | between p50, ms | p99 | lost | mixed up |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["4x128", "6x384"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--threads", type=int, default=1, help="of the model, on each side")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    for size in options.size:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "gpt"
            make_model(folder, *SIZES[size])
            print(f"\n{size}, {options.threads} thread(s), {options.tokens} tokens an answer\n\n{HEAD}", flush=True)
            compare(folder, options)
    return 0


def make_model(folder: Path, layers: int, width: int, heads: int) -> None:
    """An untrained model, which is as fast as a trained one."""
    torch.manual_seed(0)
    tokenizer = Characters(LETTERS)
    model = GPT(GPTConfig(tokenizer.vocab_size, 256, layers, heads, width)).eval()
    export(Loaded(model, tokenizer, 0, "", None), folder, "huggingface", "benchmark")


def compare(folder: Path, options: argparse.Namespace) -> None:
    most = 2 * max(options.clients)
    with Server(folder, options, slots=32, queue=most) as server:
        load(server, 1, options.tokens)  # warms it up
        alone = load(server, 1, options.tokens, most).texts
        for clients in options.clients:
            print(
                load(server, clients, options.tokens).row(
                    "continuous batching", clients, options.tokens, alone[: 2 * clients]
                ),
                flush=True,
            )
    with Server(folder, options, slots=1, queue=most) as server:
        load(server, 1, options.tokens)
        for clients in options.clients[:-1]:
            print(
                load(server, clients, options.tokens).row(
                    "one at a time", clients, options.tokens, alone[: 2 * clients]
                ),
                flush=True,
            )
    theirs = in_a_loop(folder, options)
    print(theirs.row("transformers in a loop", 1, options.tokens, theirs.texts), flush=True)


class Server:
    """`elastic-gpt serve`."""

    def __init__(self, folder: Path, options: argparse.Namespace, slots: int, queue: int) -> None:
        words = ["serve", folder, "--port=0", "--device=cpu", f"--slots={slots}", f"--queue={queue}"]
        self.command = [sys.executable, "-m", "elastic_gpt.cli", *map(str, words)]
        self.environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.command, env=self.environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        told = next(line for line in self.process.stderr if line.startswith("serving "))
        self.port = int(told.rpartition(":")[2])
        return self

    def processor_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()


def load(server: Server, clients: int, tokens: int, requests: int | None = None) -> Measured:
    """Run so many clients at a time. `requests`: number in all; None: two for each client."""
    measured = Measured(texts=[None] * (requests or 2 * clients))
    numbers = iter(range(len(measured.texts)))

    async def client() -> None:
        for number in numbers:
            await ask(server.port, number, tokens, measured)

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())

    began, used = time.perf_counter(), server.processor_seconds()
    asyncio.run(all_of_them())
    measured.seconds = time.perf_counter() - began
    measured.processor_seconds = server.processor_seconds() - used
    return measured


def prompt(number: int) -> str:
    return "".join(random.Random(number).choices(LETTERS, k=PROMPT))


async def ask(port: int, number: int, tokens: int, measured: Measured) -> None:
    """One request over a connection of its own, read by hand: a client library would cost as much as the model."""
    wanted = {"model": "gpt", "prompt": prompt(number), "max_tokens": tokens, "seed": number, "stream": True}
    body = json.dumps(wanted).encode()
    last = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    text, seen, whole = "", 0, False
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            whole = True
            continue
        text += json.loads(line[6:])["choices"][0]["text"]
        now = time.perf_counter()
        (measured.between if seen else measured.first).append(now - last)
        last, seen = now, seen + 1
    writer.close()
    if whole and len(text) == tokens:
        measured.texts[number] = text


def in_a_loop(folder: Path, options: argparse.Namespace) -> Measured:
    """transformers' generate, one request after the other, in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(options.threads)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    measured = Measured()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.seen, self.last = -1, time.perf_counter()  # the prompt comes first

        def put(self, value: Any) -> None:  # noqa: ARG002
            now = time.perf_counter()
            if self.seen >= 0:
                (measured.between if self.seen else measured.first).append(now - self.last)
                self.last = now
            self.seen += 1

        def end(self) -> None:
            pass

    def one(number: int) -> str:
        torch.manual_seed(number)
        ids = tokenizer(prompt(number), return_tensors="pt").input_ids
        length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            streamer=Clock(),
            pad_token_id=0,
            **length,
        )
        return str(tokenizer.decode(found[0, ids.size(1) :]))

    one(0)
    measured = Measured()
    began, used = time.perf_counter(), time.process_time()
    for number in range(8):
        measured.texts.append(one(number))
    measured.seconds, measured.processor_seconds = time.perf_counter() - began, time.process_time() - used
    return measured


if __name__ == "__main__":
    sys.exit(main())
