"""What processes tell each other, directly or through files. Without torch, and no more logic than writing and reading it.

Exit codes of workers, beside those of all commands (prepare/frontdoor.py).

Progress, from training to the Kubernetes client. The first worker of a world writes a line to its
pod's log, and the same line to a file, which its agent sends to the job's master with each lease
(nodes/rendezvous.py). The master writes it to its own log, which has no tracebacks of workers and
is still there when the workers' pods are gone.

The files of a run directory, the events of its ledger, and where snapshots are. (For a data folder
see prepare/tokens.py.)
"""

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from prepare.frontdoor import DONE as DONE
from prepare.frontdoor import FAILED as FAILED
from prepare.frontdoor import USERS_MISTAKE as USERS_MISTAKE

RESTART_ME = 3  # of a worker: form a new world, or wait for storage; may be repeated without end
NO_WORLD = 4  # of a worker: again and again no world could be formed, so its node ends

WORLDS = "ELASTIC_GPT_WORLDS"  # environment variable of a worker: its agent's socket (agent.py)

RUN_FORMAT_VERSION = 1  # in the config.yaml of a run directory
CHECKPOINT_FORMAT_VERSION = 1  # in the manifest of a checkpoint
EXACT_SUMS = 2  # there too: how exact mode sums gradients; what another number made is another run bit for bit. None: 1

# Names in a run directory:
CONFIG = "config.yaml"  # the resolved settings
METRICS = "metrics.jsonl"  # one line for each step
LEDGER = "ledger.jsonl"  # one line for each event
CLAIM = "claim.json"  # which job trains into it
CHECKPOINTS = "checkpoints"  # step_00001000/ ...; checkpoint.dir may name another place
MANIFEST = "MANIFEST.json"  # in each step's folder; without it the folder is no checkpoint
TOKENIZER = "tokenizer"  # meta.json and tokenizer/ of the data, so that the model can generate text
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
"""The fields of each event of a ledger. All have `event` and `time` (seconds since 1970) too, and may have more."""
assert set(EVENTS) == set(get_args(Event))


def shared_memory() -> Path:
    """The folder for all snapshots of this user on this machine."""
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return root / f"elastic-gpt-{os.getuid()}"


POD = re.compile(r"[a-z0-9.-]{1,253}")  # a pod's name
PROGRESS = "elastic-gpt-progress "  # how a line of progress begins; JSON follows


@dataclass(frozen=True)
class Progress:
    """How far training is. Before the first step of a world: the step that it starts from, without a loss."""

    time: float = 0.0
    """Seconds since 1970; 0: not known."""
    step: int = 0
    steps: int = 0
    """Steps of the whole run."""
    loss: float | None = None
    """Nats per token; NaN if training went wrong."""
    tokens_per_second: float | None = None
    workers: int = 0
    """Workers in the world that did this step."""
    seconds_left: float | None = None
    """Estimated seconds to the end of the run."""
    slow: tuple[str, ...] = ()
    """Nodes that the others wait for in each step (pace.py), by their pods' names."""

    def to_line(self) -> str:
        """One line without a line end, in strict JSON: a number that is not finite is a string."""
        told = {name: value for name, value in asdict(self).items() if value is not None and value != ()}
        for name, value in told.items():
            if isinstance(value, float) and not math.isfinite(value):
                told[name] = str(value)
        return PROGRESS + json.dumps(told, allow_nan=False)

    @classmethod
    def from_line(cls, text: str) -> "Progress | None":
        """The progress in a line of a log, whatever comes before it in the line; None if there is none.

        The pods may run another version than the client: a field that is missing or not a number
        has its default, and an unknown one is ignored. Without a step there is no progress.
        """
        _, found, told = text.partition(PROGRESS)
        try:
            values = json.loads(told) if found else None
        except ValueError:
            return None
        if not isinstance(values, dict):
            return None
        names = values.get("slow")
        slow = [one for one in names if isinstance(one, str) and POD.fullmatch(one)] if isinstance(names, list) else []
        numbers: dict[str, Any] = {"slow": tuple(slow)}
        for field in fields(cls):
            if field.name in numbers:
                continue
            read = int if field.type is int else float
            with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
                numbers[field.name] = read(values[field.name])
        return cls(**numbers) if "step" in numbers else None


def progress_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file with which training tells its agent the progress; None outside of the pods of an ElasticJob.

    DLRover's master sets both variables in each pod. Local nodes have them too, but also one that
    names their launcher.
    """
    names = [environment.get(name) for name in ("ELASTIC_JOB_NAME", "POD_NAME")]
    if not all(names) or "ELASTIC_GPT_LOCAL" in environment:
        return None
    return Path(tempfile.gettempdir()) / f"elastic-gpt-progress-{names[1]}"
