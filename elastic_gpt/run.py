"""An elastic run of any model: a loop over steps that goes on while nodes are lost and added.

    for step in run:                        # a step that the loss of a peer interrupted comes again
        for inputs, targets in step:        # this worker's share of the global batch
            step.backward(loss(inputs, targets))
        step.update()

`Elastic` takes a model, an optimizer and an indexable data set. It is built on `Worlds`, which has
what every elastic run needs; nanoGPT's training (model_zoo/nanogpt/train.py) is built on it too.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from elastic_gpt.batches import Batches, Examples
from elastic_gpt.checkpoint import CheckpointError, refuse_newer, writer
from elastic_gpt.claim import InUse
from elastic_gpt.contract import (
    CONFIG,
    FAILED,
    RESTART_ME,
    RUN_FORMAT_VERSION,
    WORLDS,
)
from elastic_gpt.identity import Run
from elastic_gpt.ledger import Ledger
from elastic_gpt.mirror import here, shown
from elastic_gpt.order import Order
from elastic_gpt.plan import Plan
from elastic_gpt.reports import Observer
from elastic_gpt.rundir import Introduction, Opened, open_together, settings_before
from elastic_gpt.settings import SettingsError, flatten
from elastic_gpt.state import NotFinite, Restored
from elastic_gpt.storage import LocalStorage, Unreachable
from elastic_gpt.world import NotJoined, PeerLost, World, place
from elastic_gpt.worlds import NETWORK_SECONDS, Step, Worlds
from prepare.frontdoor import fail
from prepare.tokens import DataError


@contextlib.contextmanager
def exits(run_dir: Path) -> Iterator[None]:
    """Tells an error in one line, and ends this process with the exit code (contract.py) that its agent knows.

    After 1 and 3 an agent tries again, after 1 only a few times. Without an agent, 3 becomes 1.
    """
    agent = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        yield
    except (SettingsError, DataError, CheckpointError, InUse, NotFinite) as error:
        raise SystemExit(fail(error)) from error
    except PeerLost as error:
        text = f"{error}; this worker ends{', its agent forms a new world' if agent else ''}"
        # The loss of a peer needs no message. That no world can be formed may be due to wrong network settings.
        print(f"warning: {text}" if isinstance(error, NotJoined) else text, file=sys.stderr, flush=True)
        if isinstance(error, NotJoined):
            time.sleep(NETWORK_SECONDS)
        # Without a socket to the agent this process ends at each such try, so the agent has to count them (`Worlds` does else).
        counts = isinstance(error, NotJoined) and WORLDS not in os.environ
        # At once, since a process group with a dead member cannot be torn down properly.
        os._exit(RESTART_ME if agent and not counts else FAILED)
    except Unreachable as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # The agent tries until an outage is over. A store that never answered counts as a crash, and crashes are limited.
        os._exit(RESTART_ME if agent and Ledger(run_dir).lives() else FAILED)
    except Exception as error:
        if agent:  # the traceback goes to the node's log
            traceback.print_exc()
        # At once: if peers ended first, the agent would take this crash for a membership change.
        os._exit(fail(error))


class Elastic(Worlds):
    """An elastic run of a model on an indexable data set: iterate over it, and over each step (see above).

    Started by `elastic-gpt launch --nodes 3 -- run my_script.py`, it goes on while nodes are lost
    and added. Alone, it is a training in one process that can be killed and started again.

    Args:
        run_dir: run directory, or its URL. A run that is there is resumed.
        model: the model; without BatchNorm, whose statistics would depend on one worker's share.
        optimizer: an optimizer of all parameters of the model.
        data: `data[i]` is a tuple of tensors or numbers, `len(data)` their number; the same on every worker.
        identity: names and plain values that a run cannot change, beside the sizes and the model's shapes.
        observers: the user's own (`Observer`), which hear of steps and events on the first worker.
        plan: the fields of `Plan`: steps, global_batch, micro_batch ...

    Raises:
        SettingsError: with the cure.
    """

    def __init__(
        self,
        run_dir: Path | str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Any,
        *,
        identity: Mapping[str, Any] | None = None,
        observers: Sequence[Observer] = (),
        **plan: Any,
    ) -> None:
        with exits(Path(run_dir)):
            settled = Plan(run_dir=here(Path(run_dir)), **plan)
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    raise SettingsError(
                        f"the model's {name} is a {type(module).__name__}, whose statistics would be of one worker's share:"
                        " take LayerNorm or GroupNorm"
                    )
            if len(data) < settled.global_batch:
                raise SettingsError(f"global_batch {settled.global_batch} is more than the data's {len(data)} examples")
            super().__init__(settled, model.to(place(settled.device)), optimizer)
        self.data, self.observers = data, list(observers)
        self.order = Order(len(data), settled.global_batch, settled.seed)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        self.identity = {
            "examples": len(data),
            "global_batch": settled.global_batch,
            "micro_batch": settled.micro_batch,
            "seed": settled.seed,
            "exact": settled.exact,
            "shapes": shapes,
            **(identity or {}),
        }

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left. If this worker has to end before the run does, its process ends here."""
        steps = super().__iter__()
        while True:
            with exits(self.plan.run_dir):
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    def open(self, world: World, me: Introduction) -> Opened[None]:
        mine = {
            "format_version": RUN_FORMAT_VERSION,
            "writer": writer(),
            "traffic": self.plan.traffic,
            "checkpoint": {"dir": self.plan.checkpoint_dir},
            "identity": self.identity,
        }
        path = self.plan.run_dir / CONFIG

        def make(take: Callable[[], tuple[Run, Ledger]]) -> tuple[Run, None]:
            before = settings_before(path)
            refuse_newer(f"the run in {shown(self.plan.run_dir)}", before, RUN_FORMAT_VERSION)
            now = yaml.safe_load(yaml.safe_dump(mine))
            for name, value in flatten(now["identity"]).items() if before else []:
                if before.get(f"identity.{name}") != value:
                    raise SettingsError(
                        f"the run in {shown(self.plan.run_dir)} has {name} {before.get(f'identity.{name}')}, not {value}:"
                        " set it back, or take another run directory"
                    )
            run, _ = take()
            # The place of the checkpoints may change between two lives.
            if not before or before.get("checkpoint.dir") != self.plan.checkpoint_dir:
                kept = yaml.safe_load(path.read_text(encoding="utf-8")) if before else {}
                told = now | kept | {"checkpoint": now["checkpoint"]}
                LocalStorage(self.plan.run_dir).write_text(path.name, yaml.safe_dump(told, sort_keys=False))
            return run, None

        return open_together(self.plan.run_dir, mine, world, make, me)

    def batches(self, world: World) -> Batches:
        return Examples(self.data, self.plan.micro_batch, self.order, world)

    def introduce(self, world: World, restored: Restored) -> list[str]:
        where = f"from step {restored.step} ({restored.source})" if restored.step else "from the start"
        return [f"run: {shown(self.plan.run_dir)}, {where}, on {world.size} worker{'s' if world.size > 1 else ''}"]
