"""The type of a run's matrix products: set by the user, or decided once by a short measurement.

CPUs differ: with AMX, bfloat16 products make a wide model twice as fast; without AVX512_BF16, four
times slower. Parameters, sums of the loss and the optimizer are always float32 (autocast).
"""

import dataclasses
import time

import torch

from elastic_gpt import devices
from elastic_gpt.contract import CONFIG
from elastic_gpt.rundir import settings_before
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.model import GPT

NARROW = 128  # models that are less wide gain little from bfloat16 and are not measured
GAIN = 1.3  # bfloat16 is used if it is at least so many times as fast
# Of the measurement, which takes a second for most models. With fewer tokens than a step has, what is done once a step
# (the gradient of a large vocabulary, say) would outweigh what bfloat16 gains.
TOKENS, ROUNDS, SECONDS = 1024, 3, 3.0


def dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of matrix products on this device."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    return devices.usual_dtype(device)


def is_known(config: TrainConfig, device: torch.device) -> bool:
    """Whether `settle` needs no measurement, so that a worker knows the type before it meets the others."""
    return not _is_open(config, device) or bool(settings_before(config.run_dir / CONFIG))


def _is_open(config: TrainConfig, device: torch.device) -> bool:
    return config.dtype == "auto" and not config.elastic.exact and devices.is_host(device)


def settle(config: TrainConfig, device: torch.device) -> TrainConfig:
    """On CPUs, `config` with the dtype that "auto" stands for. On other devices the device decides.

    A run keeps the type in its config.yaml; "auto" there means float32. For a new run, the first
    worker measures, and all ranks use its answer, even on other processors. Raises SettingsError
    if config.yaml is damaged.
    """
    if not _is_open(config, device):
        return config
    before = settings_before(config.run_dir / CONFIG)
    if before:
        return dataclasses.replace(config, dtype=before.get("dtype", "auto"))
    if config.model.n_embd < NARROW:
        return dataclasses.replace(config, dtype="float32")
    gain = measured_gain(config)
    faster = gain >= GAIN
    print(
        f"dtype: {'bfloat16' if faster else 'float32'} for the whole run: in bfloat16 a layer of the model and its head are"
        f" {gain:.1f} times as fast here as in float32 (--dtype {'float32' if faster else 'bfloat16'} for the other)",
        flush=True,
    )
    return dataclasses.replace(config, dtype="bfloat16" if faster else "float32")


def measured_gain(config: TrainConfig) -> float:
    """How many times as fast a layer of the model and its head are in bfloat16, forward and backward."""
    length = min(config.model.block_size, 256)
    with torch.random.fork_rng(devices=[]):
        model = GPT(dataclasses.replace(config.model, n_layer=1, block_size=length, dropout=0.0))
        sequences = min(config.global_batch, max(1, TOKENS // length))
        tokens = torch.randint(config.model.vocab_size, (sequences, length))
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    end = time.perf_counter() + SECONDS
    for number in range(ROUNDS):
        if number and time.perf_counter() > end:
            break
        for kind in best:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                loss = model(tokens, tokens)
            loss.backward()
            best[kind] = min(best[kind], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
