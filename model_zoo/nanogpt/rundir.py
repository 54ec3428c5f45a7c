"""The run directory: what a run leaves behind, and what makes it this run and no other."""

import errno
import shutil
from dataclasses import dataclass
from typing import Any

import yaml

from elastic_gpt import settings
from elastic_gpt.ledger import Ledger
from elastic_gpt.settings import SettingsError
from elastic_gpt.world import World
from model_zoo.nanogpt.config import TrainConfig
from prepare.tokens import Meta, fingerprint

# What a run cannot change without being another run: data order, batches and parameters follow from these.
IDENTITY = ("model", "seed", "global_batch", "micro_batch", "elastic.exact", "data_fingerprint")


@dataclass(frozen=True)
class Run:
    """What the workers have to know of the run they are in."""

    run_id: str
    life: int
    """Number of this life."""
    branches: list[tuple[int, int]]
    """Life and step at which each earlier life began."""

    def valid(self, life: int, step: int) -> bool:
        """Whether the state after `step` of `life` is in the run's history, not in an end that a later life abandoned."""
        return all(step <= began for later, began in self.branches if later > life)


def open_run(config: TrainConfig, meta: Meta, world: World) -> Run:
    """Make or find the run directory.

    Raises:
        SettingsError: on all ranks, if the ranks were given different settings or data, if the run there was made with
            settings that a run cannot change, or if the directory cannot be written.
    """
    mine = settings.flatten(_resolved(config, meta))
    for path in ("run_dir", "data.dir"):  # may be mounted elsewhere
        mine.pop(path)
    first = world.gather(mine)[0]
    differing = next((name for name in mine if mine[name] != first[name]), None)
    complaints = world.gather(
        differing and f"{differing}={mine[differing]} on {world.node}, {first[differing]} on another node"
    )
    if complaint := next(filter(None, complaints), None):
        raise SettingsError(f"the nodes were given different settings: {complaint}")
    return world.first_does(lambda: _open(config, meta))


def _resolved(config: TrainConfig, meta: Meta) -> dict[str, Any]:
    return yaml.safe_load(settings.dump(config)) | {"data_fingerprint": fingerprint(meta)}


def _open(config: TrainConfig, meta: Meta) -> Run:
    try:
        return _make(config, meta)
    except OSError as error:
        cure = "make room" if error.errno == errno.ENOSPC else "choose another --run-dir"
        raise SettingsError(f"cannot write run directory {config.run_dir} ({error.strerror}): {cure}") from error


def _make(config: TrainConfig, meta: Meta) -> Run:
    resolved = _resolved(config, meta)
    path = config.run_dir / "config.yaml"
    known = yaml.safe_load(path.read_text()) if path.exists() else None
    if known:
        before = settings.flatten(known)
        for name, value in settings.flatten(resolved).items():
            fixed = any(name == part or name.startswith(f"{part}.") for part in IDENTITY)
            if fixed and before.get(name) != value:
                raise SettingsError(
                    f"the run in {config.run_dir} has {name}={before.get(name)}, not {value}:"
                    " set it back, or train into another --run-dir"
                )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(config.run_dir)
    run = Run(ledger.run_id(), ledger.lives(), ledger.branches())
    tokenizer = config.run_dir / "tokenizer"
    if not tokenizer.exists():  # it travels with the model
        aside = tokenizer.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if (config.data.dir / "tokenizer").exists():  # bytes need no files
            shutil.copytree(config.data.dir / "tokenizer", aside / "tokenizer")
        shutil.copy(config.data.dir / "meta.json", aside)
        aside.rename(tokenizer)
    aside = path.with_suffix(".partial")
    aside.write_text(yaml.safe_dump(resolved, sort_keys=False))
    aside.rename(path)
    return run
