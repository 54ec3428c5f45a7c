"""Compares generating with nanoGPT's sample.py: the same shape, prompt and settings, in turn, in one process.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/generate.py --nanogpt nanoGPT [--batch 1 8] [--tokens 500] [--rounds 3] [--threads 1]

sample.py draws its samples one after the other with its model's `generate`, which is called here as
it calls it: one sample is measured, and a batch of them costs so many times as much. Ours draws
them in one batch of the engine. What is counted is tokens a second, by the clock and by processor
time, which other work on the machine disturbs less; a ratio is ours over nanoGPT's, the median of
the rounds.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model_zoo.nanogpt.engine import Engine, Request
from model_zoo.nanogpt.model import GPT, GPTConfig

LAYERS, WIDTH, HEADS, BLOCK, VOCABULARY = 6, 384, 6, 256, 65
TEMPERATURE, TOP_K = 0.8, 200  # sample.py's own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="samples of one prompt")
    parser.add_argument("--tokens", type=int, default=500, help="new ones of each sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ours = GPT(GPTConfig(VOCABULARY, BLOCK, LAYERS, HEADS, WIDTH, bias=False, qkv_bias=False)).eval()
    theirs = nanogpt(options.nanogpt)
    print("| batch | ours, tokens/s | nanoGPT | ratio | by processor time |\n| --- | --- | --- | --- | --- |")
    for batch in options.batch:
        drawn = batch * options.tokens
        pairs = []
        for _ in range(options.rounds):
            a = seconds(lambda batch=batch: engine(ours, batch, options.tokens))  # type: ignore[misc]
            b = seconds(lambda: sample(theirs, options.tokens))
            pairs.append((a, (batch * b[0], batch * b[1])))
        clock = statistics.median(b[0] / a[0] for a, b in pairs)
        processor = statistics.median(b[1] / a[1] for a, b in pairs)
        speeds = [drawn / statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
        print(f"| {batch} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {clock:.1f} | {processor:.1f} |", flush=True)
    return 0


def nanogpt(checkout: Path) -> Any:
    """nanoGPT's model, untrained: its speed is that of a trained one."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or spec.loader is None or not (checkout / "model.py").is_file():
        raise SystemExit(f"error: there is no model.py in {checkout}: name a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": BLOCK, "vocab_size": VOCABULARY}
    return module.GPT(module.GPTConfig(**shape, bias=False, dropout=0.0)).eval()


def engine(model: GPT, batch: int, tokens: int) -> None:
    running = Engine(model, batch)
    for seed in range(batch):
        running.add(Request([0], tokens, temperature=TEMPERATURE, top_k=TOP_K, seed=seed))
    while running.step():
        pass


@torch.no_grad()
def sample(model: Any, tokens: int) -> None:
    model.generate(torch.zeros((1, 1), dtype=torch.long), tokens, temperature=TEMPERATURE, top_k=TOP_K)


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


if __name__ == "__main__":
    sys.exit(main())
