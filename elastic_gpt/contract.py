"""What processes tell each other, now or through a disk. No torch, and no logic beyond writing it down and reading it.

Exit codes: those of a user's commands are in prepare/frontdoor.py, the lowest room; workers tell their agent two more.

Progress: from training to the Kubernetes client. The first worker of a world writes a line to its pod's log, and the same to a
file that its agent passes on to the job's master with each lease (nodes/rendezvous.py). The master writes it to its own log,
which no traceback of a worker drowns and which is still there when the workers' pods are gone.

The layout of a run directory, the events of its ledger, and where snapshots lie. (Of a data folder: prepare/tokens.py.)
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from prepare.frontdoor import DONE as DONE
from prepare.frontdoor import FAILED as FAILED
from prepare.frontdoor import USERS_MISTAKE as USERS_MISTAKE

RESTART_ME = 3  # a worker's: the world has to be formed anew, or storage is away; never too many
NO_WORLD = 4  # a worker's: a world could not be formed, which may also be a peer's death in that moment

WORLDS = "ELASTIC_GPT_WORLDS"  # environment of a worker: the socket of the agent that gives it its worlds (agent.py)

RUN_FORMAT_VERSION = 1  # of a run directory, in its config.yaml
CHECKPOINT_FORMAT_VERSION = 1  # of a checkpoint, in its manifest

# In a run directory:
CONFIG = "config.yaml"  # the resolved settings
METRICS = "metrics.jsonl"  # a line a step
LEDGER = "ledger.jsonl"  # a line an event
CLAIM = "claim.json"  # the job that trains into it
CHECKPOINTS = "checkpoints"  # unless checkpoint.dir names another place: step_00001000/ ...
MANIFEST = "MANIFEST.json"  # in each of those; it makes one of the files beside it
TOKENIZER = "tokenizer"  # meta.json and tokenizer/ of the data, so that the model can be talked to
TENSORBOARD = "tensorboard"

Event = Literal[
    "created", "copied", "upgraded", "settings_changed", "joined", "left", "lost", "restored", "recovered", "interrupted",
    "replaced", "slow", "saved", "save_failed", "evaluated", "skipped", "diverged", "stopped", "finished",
]  # fmt: skip
EVENTS: dict[Event, dict[str, object]] = {
    "created": {"run_id": str, "directory": dict},
    "copied": {"run_id": str, "copied_from": str, "directory": dict},
    "upgraded": {"run_id": str, "copied_from": str, "directory": dict},
    "settings_changed": {"changes": dict},
    "joined": {"life": int, "name": str, "nodes": list, "world_size": int, "stayed": list},
    "left": {"node": str, "step": int},
    "lost": {"node": str, "step": int},
    "restored": {"life": int, "step": int, "source": str, "dropped": int},
    "recovered": {"detection": float, "rendezvous": float, "restore": float, "first_step": float},
    "interrupted": {"node": str, "cause": str},
    "replaced": {"node": str, "cause": str},
    "slow": {"node": str, "step": int, "seconds": float, "others": float},
    "saved": {"step": int, "checkpoint": str, "place": str},
    "save_failed": {"error": str},
    "evaluated": {"step": int, "loss": float | None},
    "skipped": {"step": int},
    "diverged": {"step": int, "good": int},
    "stopped": {"step": int},
    "finished": {"step": int},
}
"""Of each event of a ledger, its fields; all have `event` and `time` (seconds since 1970), and may have more."""
assert set(EVENTS) == set(get_args(Event))


def shared_memory() -> Path:
    """The folder of all snapshots of this user on this machine."""
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return root / f"elastic-gpt-{os.getuid()}"


PROGRESS = "elastic-gpt-progress "  # what a line of progress begins with; JSON follows, for machines


@dataclass(frozen=True)
class Progress:
    """How far training is. Of a world that has done no step yet: the step that it starts from, and no loss."""

    time: float = 0.0
    """Seconds since 1970; 0: not told."""
    step: int = 0
    steps: int = 0
    """All of the run's."""
    loss: float | None = None
    """Nats a token; not a number where training went wrong."""
    tokens_per_second: float | None = None
    workers: int = 0
    """In the world that did this step."""
    seconds_left: float | None = None
    """To the end of the run, as training estimates it."""

    def to_line(self) -> str:
        """One line, without the end of one. Strict JSON: a number that is not finite goes as its name."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return PROGRESS + json.dumps(
            {name: value if math.isfinite(value) else str(value) for name, value in told.items()}, allow_nan=False
        )

    @classmethod
    def from_line(cls, text: str) -> "Progress | None":
        """The progress in a line of a log, whatever stands before it; None where there is none.

        The pods' version may be another than the client's: a field that is missing or is not a number has its default, and one
        that is not known here is passed over. Without a step there is no progress.
        """
        _, found, told = text.partition(PROGRESS)
        try:
            values = json.loads(told) if found else None
        except ValueError:
            return None
        if not isinstance(values, dict):
            return None
        numbers: dict[str, Any] = {}
        for field in fields(cls):
            read = int if field.type is int else float
            with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
                numbers[field.name] = read(values[field.name])
        return cls(**numbers) if "step" in numbers else None


def progress_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where a pod's training leaves its progress for the agent; None for a process that is not in a pod of an ElasticJob.

    DLRover's master gives each pod both names; local nodes have them too, and beside them who launched them.
    """
    names = [environment.get(name) for name in ("ELASTIC_JOB_NAME", "POD_NAME")]
    if not all(names) or "ELASTIC_GPT_LOCAL" in environment:
        return None
    return Path(tempfile.gettempdir()) / f"elastic-gpt-progress-{names[1]}"
