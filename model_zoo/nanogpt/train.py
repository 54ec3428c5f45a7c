"""Trains a GPT: alone, or as one worker of many that may come and go.

    elastic-gpt train shakespeare_char --data.dir data --run-dir run
    python model_zoo/nanogpt/train.py shakespeare_char --data.dir data --run-dir run
    torchrun --nproc-per-node 2 model_zoo/nanogpt/train.py shakespeare_char --data.dir data --run-dir run
    elastic-gpt launch --nodes 3 -- train shakespeare_char --data.dir data --run-dir run

The same command resumes an interrupted run. It needs only the run directory.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a script, its folder is on the path in place of the project's
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from elastic_gpt import cli, huge_pages

    huge_pages.start_over_with_huge_pages()
    sys.argv.insert(1, "train")
    sys.exit(cli.main())

import psutil
import torch

from elastic_gpt import devices, settings
from elastic_gpt.batches import Batches
from elastic_gpt.claim import InUse, job, refuse_if_in_use
from elastic_gpt.contract import CONFIG, DONE
from elastic_gpt.evaluator import Evaluator
from elastic_gpt.gradients import LossScale
from elastic_gpt.order import Order, sequence_count
from elastic_gpt.run import exits
from elastic_gpt.rundir import Introduction, Opened, settings_before
from elastic_gpt.settings import SettingsError
from elastic_gpt.state import Restored
from elastic_gpt.world import World, place
from elastic_gpt.worlds import Worlds
from model_zoo.nanogpt import places, precision
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from model_zoo.nanogpt.initial import check_start, start
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.optimizer import make_optimizer
from model_zoo.nanogpt.rundir import open_run
from model_zoo.nanogpt.startup import arithmetic, loss_function, merged_micro_batches, plan
from prepare.data import open_split, read_meta
from prepare.frontdoor import command, fail
from prepare.tokens import DataError, Meta


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt train") -> int:
    """Parse settings and train.

    Returns the exit codes of all commands. Under an agent also 3, after which it is started again as
    after 1, and 4, which ends its node (contract.py).
    """
    try:
        config, meta = check(sys.argv[1:] if argv is None else argv, prog)
    except (SettingsError, DataError, InUse) as error:
        return fail(error)
    with exits(config.run_dir):
        train(config, meta)
    return DONE


def train(config: TrainConfig, meta: Meta) -> None:
    """Train to the last step. If this worker has to end before, its process ends in here (see `Worlds`)."""
    training = Training(config, meta)
    for step in training:  # in one world after the other; a step that is interrupted by the loss of a peer comes again
        for tokens, targets in step:  # this worker's share of the global batch
            step.backward(training.loss_sum(tokens, targets))
        step.update(config.optimizer.rate(step.number, config.steps))


class Training(Worlds):
    """GPT-2 and its optimizer, on tokens."""

    evaluates = True

    def __init__(self, config: TrainConfig, meta: Meta) -> None:
        self.config, self.meta = config, meta
        self.loss_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
        self.dtype: torch.dtype | None = None  # of its matrix products
        # --- model and optimizer
        device = place(config.device)
        torch.manual_seed(config.seed)  # the same initial parameters on all workers
        torch.set_float32_matmul_precision("high")
        model = GPT(config.model).to(device)
        optimizer = make_optimizer(model, config.optimizer, device)
        scale = LossScale(device) if config.dtype == "float16" else None
        super().__init__(plan(config), model, optimizer, scale)
        self.gpt = model
        # --- data
        self.train_tokens, self.val_tokens = (open_split(config.data.dir, split) for split in ("train", "val"))
        sequences = sequence_count(len(self.train_tokens), config.model.block_size)
        self.order = Order(sequences, config.global_batch, config.seed)

    def open(self, world: World, me: Introduction) -> Opened[TrainConfig]:
        opened = open_run(self.config, self.meta, world, me)
        config = dataclasses.replace(self.config, dtype=opened.told.dtype)
        # Other ranks get these weights when the state is restored.
        if config.init_from is not None and opened.run.saved is None:
            world.first_does(lambda: None if self.held.step >= 0 else start(self.gpt, config))
        self._compute_in(precision.dtype(config, world.device))
        return opened

    def warm_up(self) -> None:
        """One pass over tokens of no meaning, forward and backward. A step begins with no gradient, and seeds of its own."""
        config, device = self.config, place(self.config.device)
        if not precision.is_known(config, device):
            return
        self._compute_in(precision.dtype(precision.settle(config, device), device))
        shape = config.micro_batch, config.model.block_size
        # Two tensors, as in a step: a graph is compiled anew if its inputs are no longer one.
        tokens, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.loss_sum(tokens, targets).backward()
        if config.compile and config.evaluate.interval > 0:  # which is another graph
            self.gpt.eval()
            with torch.no_grad():
                self.loss_sum(tokens, targets)
            self.gpt.train()

    def _compute_in(self, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            self.dtype, self.loss_sum = dtype, loss_function(self.gpt, self.config, dtype, place(self.config.device))

    def batches(self, world: World) -> Batches:
        config, merged = self.config, merged_micro_batches(self.config, world)
        return Batches(self.train_tokens, config.model.block_size, config.micro_batch, self.order, world, merged=merged)

    def evaluate(self, world: World) -> float:
        evaluator = Evaluator(
            self.gpt,
            self.loss_sum,
            self.val_tokens,
            block_size=self.config.model.block_size,
            sequences=self.config.evaluate.sequences,
            micro_batch=self.config.micro_batch,
            world=world,
        )
        return evaluator.evaluate()

    def speed(self, world: World) -> tuple[int, float | None]:
        assert self.dtype is not None
        return self.gpt.flops_per_token(), devices.peak_flops(world.device, self.dtype)

    def introduce(self, world: World, restored: Restored) -> list[str]:
        assert self.dtype is not None
        return arithmetic(self.config, self.meta, self.gpt, self.order, world, self.dtype, restored)


def prepare_node(argv: Sequence[str], prog: str = "elastic-gpt train") -> None:
    """Copy data from an object store, before this node joins and others wait for it."""
    places.data_here(
        settings.parse(TrainConfig, argv, presets=PRESETS, prog=prog, environment=settings.environment()).data
    )


def check(argv: Sequence[str], prog: str = "elastic-gpt train") -> tuple[TrainConfig, Meta]:
    """Parse the settings and read the data's description. Finds all mistakes in them before any process is started."""
    config = settings.parse(TrainConfig, argv, presets=PRESETS, prog=prog, environment=settings.environment())
    before = settings_before(config.run_dir / CONFIG)
    if before and (later := settings.field_types(TrainConfig).keys() - before.keys()):
        # The run is of an older version, whose presets did not decide these: it goes on with their defaults.
        config = settings.parse(
            TrainConfig, argv, presets=PRESETS, prog=prog, environment=settings.environment(), unheard=later
        )
    config = places.here(config)
    meta = read_meta(config.data.dir)
    if 0 < config.model.vocab_size < meta.vocab_size:
        raise SettingsError(
            f"model.vocab_size {config.model.vocab_size} is less than the data's {meta.vocab_size}:"
            " leave it out, and the data's is taken"
        )
    config = check_start(config, meta)
    for split in ("train", "val"):
        if sequence_count(len(open_split(config.data.dir, split)), config.model.block_size) == 0:
            raise DataError(
                f"{config.data.dir / split}.bin is too short for one sequence of {config.model.block_size} tokens:"
                " prepare more text, or take a smaller --model.block-size"
            )
    devices.refuse(config.device, exact=config.elastic.exact)
    here = psutil.virtual_memory().total
    if (weights := 4 * config.model.least_parameters) > here:
        raise SettingsError(
            f"the model's weights take at least {weights / 1e9:,.0f} GB, this machine has {here / 1e9:,.0f} GB of memory:"
            " take a smaller --model.n-embd, --model.n-layer, --model.block-size or --model.vocab-size"
        )
    refuse_if_in_use(config.run_dir, job())
    for note in config.notes():
        print(f"note: {note}", file=sys.stderr, flush=True)
    return config, meta


if __name__ == "__main__":
    sys.exit(main())
