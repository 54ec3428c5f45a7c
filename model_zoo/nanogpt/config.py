"""TrainConfig: all settings of a training run, in the sections that presets, variables and flags have."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from elastic_gpt.settings import Device, Resume, SettingsError, Traffic, refuse_rounded
from model_zoo.nanogpt.shape import GPTConfig

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class DataConfig:
    dir: Path = Path("data")
    """Folder that `elastic-gpt prepare` made: train.bin, val.bin, meta.json. From a URL (s3://bucket/data) each machine
    copies the files once, and checks them."""
    cache: Path | None = None
    """Folder of this machine for such copies. None: elastic-gpt/data in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = 500.0
    """Most gigabytes (10^9 bytes) of copies. To make room, unused ones are deleted, the least recently used first."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with warm-up and cosine decay of the learning rate."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases. A run keeps it."""
    learning_rate: float = 6e-4
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: float = 6e-5
    """Learning rate at the end of the decay and after it."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int | None = None
    """Step at which the decay ends. None: the last step of the run."""
    weight_decay: float = 0.1
    """Weight decay of tensors with two or more dimensions; biases and norms do not decay."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    momentum: float = 0.95
    """Muon's decay of the mean gradient."""
    clip: float = 1.0
    """Largest norm of the gradient of the global batch. 0: no clipping."""
    max_skipped: int = 10
    """The run stops after so many updates in a row that were skipped because loss or gradient was not finite."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of the update after `step` updates, of `steps` in all. It depends on nothing else (law 1)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        end = max(self.decay_steps or steps, self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (end - self.warmup_steps))
        return (
            self.min_learning_rate
            + (self.learning_rate - self.min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
        )


@dataclass(frozen=True)
class EvaluateConfig:
    interval: int = 250
    """Steps between evaluations of the validation loss. 0: only after the last step."""
    sequences: int = 256
    """Validation sequences, the same each time, spread evenly over val.bin; fewer if it has fewer."""


@dataclass(frozen=True)
class CheckpointConfig:
    interval: int = 1000
    """Steps between checkpoints on storage. One is written after the last step and on Ctrl-C as well."""
    keep: int = 3
    """How many of the newest checkpoints are kept."""
    dir: str | None = None
    """Where checkpoints are kept: a folder (a relative path is below RUN_DIR), or an fsspec URL such as s3://bucket/run.
    None: RUN_DIR/checkpoints."""


@dataclass(frozen=True)
class ElasticConfig:
    exact: bool = False
    """Sum gradients, rounded to multiples of 1.5e-11, so that parameters are equal bit for bit at every world size on the same
    kind of device."""
    traffic: Traffic = "float32"
    """Type in which gradients travel between workers: bfloat16 is half the bytes, and rounds them. Not in exact mode."""
    snapshot_interval: int = 10
    """Steps between snapshots in host memory. The death of all workers at once costs at most so many steps."""
    grace_seconds: float = 25.0
    """How long a node that is asked to leave waits until the state is on storage (a pod has 30 s in all)."""
    timeout_seconds: float = 120.0
    """How long a collective waits for a silent peer before a new world is formed."""


@dataclass(frozen=True)
class ObserveConfig:
    interval: int = 10
    """Steps between lines on the console (metrics.jsonl has a line for each step)."""
    tensorboard: bool = True
    """Write RUN/tensorboard."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    run_dir: Path = Path("run")
    """Run directory, or the URL of one (s3://bucket/run). A run found there is resumed."""
    init_from: str | None = None
    """Weights to start from instead of random ones: a Hugging Face GPT-2, nanoGPT's ckpt.pt, a run; a path or a URL."""
    resume: Resume = "auto"
    """What a job starts from if memory is ahead of storage, as after kill -9. auto: memory, unless the checkpoint that
    was saved last has been deleted in order to go back."""
    steps: int = 1000
    """Optimizer updates in the whole run."""
    seed: int = 1337
    """Seed of the initial parameters, the order of the data, and dropout."""
    global_batch: int = 32
    """Sequences per step, whatever the number of nodes."""
    micro_batch: int = 8
    """Sequences in one forward pass. The global batch is shared out in micro-batches, so this must divide it."""
    device: Device = "auto"
    """auto: a CUDA GPU, else an Apple GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products; parameters stay float32. auto: bfloat16 on GPUs that have it. On a CPU, bfloat16 if a
    new run measures that it is much faster (never in exact mode); the run keeps it. Else float32."""
    compile: bool = False
    """Compile the model with torch.compile (20 to 60 seconds at the first start)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size=0))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    def __post_init__(self) -> None:
        for name, value in (
            ("steps", self.steps),
            ("global_batch", self.global_batch),
            ("micro_batch", self.micro_batch),
        ):
            if value < 1:
                raise SettingsError(f"{name} is {value}: it must be at least 1")
        for name, value in (
            ("elastic.snapshot_interval", self.elastic.snapshot_interval),
            ("checkpoint.interval", self.checkpoint.interval),
            ("checkpoint.keep", self.checkpoint.keep),
            ("optimizer.max_skipped", self.optimizer.max_skipped),
            ("evaluate.sequences", self.evaluate.sequences),
            ("observe.interval", self.observe.interval),
        ):
            if value < 1:
                raise SettingsError(f"{name} is {value}: it must be at least 1")
        for name, number in (
            ("optimizer.learning_rate", self.optimizer.learning_rate),
            ("elastic.timeout_seconds", self.elastic.timeout_seconds),
            ("data.cache_gb", self.data.cache_gb),
        ):
            if not 0 < number < math.inf:
                raise SettingsError(f"{name} is {number}: it must be above 0, and finite")
        for name, number in (
            ("optimizer.clip", self.optimizer.clip),
            ("optimizer.warmup_steps", self.optimizer.warmup_steps),
            ("optimizer.min_learning_rate", self.optimizer.min_learning_rate),
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("evaluate.interval", self.evaluate.interval),
        ):
            if not 0 <= number < math.inf:
                raise SettingsError(f"{name} is {number}: it must not be negative, nor infinite")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingsError(f"seed is {self.seed}: it must fit 64 bits")
        for name, number in (
            ("optimizer.beta1", self.optimizer.beta1),
            ("optimizer.beta2", self.optimizer.beta2),
            ("optimizer.momentum", self.optimizer.momentum),
        ):
            if not 0 <= number < 1:
                raise SettingsError(f"{name} is {number}: it must be from 0 to below 1")
        if self.elastic.grace_seconds < 0:
            raise SettingsError(f"elastic.grace_seconds is {self.elastic.grace_seconds}: it must not be negative")
        if self.optimizer.decay_steps is not None and self.optimizer.decay_steps < 1:
            raise SettingsError(f"optimizer.decay_steps is {self.optimizer.decay_steps}: it must be at least 1")
        if max(self.global_batch, self.steps) > 2**53:
            raise SettingsError("steps and global_batch are at most 9,007,199,254,740,992: take less")
        if self.global_batch % self.micro_batch:
            start = min(self.micro_batch, self.global_batch)
            below = range(start, max(0, start - 1_000_000), -1)  # the numbers may be huge
            closest = next((n for n in below if self.global_batch % n == 0), 1)
            raise SettingsError(
                f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}: take {closest}"
            )
        refuse_rounded(self.elastic.traffic, exact=self.elastic.exact)
        if self.elastic.exact and self.dtype == "float16":
            raise SettingsError(
                "elastic.exact works with float32 and bfloat16, not with dtype float16 and its loss scaling"
            )

    def notes(self) -> list[str]:
        """One line for each setting that does not have the effect that a person may expect."""
        rate, last = self.optimizer, self.optimizer.decay_steps or self.steps
        found = []
        if rate.warmup_steps >= self.steps:
            found.append(
                f"optimizer.warmup_steps {rate.warmup_steps} is not over after {self.steps} steps:"
                f" the learning rate does not reach {rate.learning_rate:g}"
            )
        elif last <= rate.warmup_steps:
            found.append(
                f"optimizer.decay_steps {last} is not above optimizer.warmup_steps {rate.warmup_steps}:"
                f" the learning rate falls to {rate.min_learning_rate:g} in one step"
            )
        if rate.min_learning_rate > rate.learning_rate:
            found.append(
                f"optimizer.min_learning_rate {rate.min_learning_rate:g} is above optimizer.learning_rate"
                f" {rate.learning_rate:g}: the learning rate rises after the warm-up"
            )
        return found

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a global batch, over all ranks."""
        return self.global_batch // self.micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.model.block_size
