"""The run directory: what a run leaves behind, and what makes it this run and no other."""

import errno
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from elastic_gpt import settings
from elastic_gpt.ledger import Ledger
from elastic_gpt.settings import SettingsError
from elastic_gpt.state import Run
from elastic_gpt.storage import LocalStorage
from elastic_gpt.world import World
from model_zoo.nanogpt.config import TrainConfig
from prepare.interop import save_tokenizer
from prepare.tokens import Meta, fingerprint

# What a run cannot change without being another run: data order, batches and parameters follow from these.
IDENTITY = ("model", "seed", "global_batch", "micro_batch", "elastic.exact", "data_fingerprint")
PATHS = ("run_dir", "data.dir")  # may differ between nodes and lives: the same volume, mounted elsewhere
LOOKS, LOOK_SECONDS = 60, 0.5  # for a file that another node made; an NFS client may know of it 30 s later


def open_run(config: TrainConfig, meta: Meta, world: World) -> Run:
    """Make or find the run directory.

    Raises:
        SettingsError: on all ranks, if the ranks were given different settings or data, if the run there was made with
            settings that a run cannot change, if the directory cannot be written, or if the nodes do not share it.
    """
    mine = settings.flatten(_resolved(config, meta))
    for path in PATHS:
        mine.pop(path)
    first = world.gather(mine)[0]
    differing = next((name for name in mine if mine[name] != first[name]), None)
    complaints = world.gather(
        differing and f"{differing}={mine[differing]} on {world.node}, {first[differing]} on another node"
    )
    if complaint := next(filter(None, complaints), None):
        raise SettingsError(f"the nodes were given different settings: {complaint}")
    run = world.first_does(lambda: _open(config, meta))
    for _ in range(LOOKS):  # all ranks look equally often, and none waits long for another
        seen = any(event.get("run_id") == run.run_id for event in Ledger(config.run_dir).events())
        alone = next(filter(None, world.gather(None if seen else world.node)), None)
        if alone is None:
            return run
        time.sleep(LOOK_SECONDS)
    raise SettingsError(
        f"run directory {config.run_dir} is not shared: node {alone} does not see in it what another node wrote there:"
        " mount the same volume on all nodes"
    )


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
    before = _before(path)
    changed = {}
    for name, value in settings.flatten(resolved).items() if before else []:
        if before.get(name) == value or name in PATHS:
            continue
        if any(name == part or name.startswith(f"{part}.") for part in IDENTITY):
            raise SettingsError(
                f"the run in {config.run_dir} has {name}={before.get(name)}, not {value}:"
                " set it back, or train into another --run-dir"
            )
        changed[name] = [before.get(name), value]
    config.run_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(config.run_dir)
    saved = [(event["step"], event["place"]) for event in ledger.events() if event["event"] == "saved"]
    run = Run(ledger.run_id(), ledger.lives(), ledger.branches(), saved[-1] if saved else None)
    if changed:
        ledger.write("settings_changed", changes=changed)  # name to before and after
    tokenizer = config.run_dir / "tokenizer"
    if not tokenizer.exists():  # it travels with the model
        aside = tokenizer.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_tokenizer(config.data.dir, aside)
        aside.rename(tokenizer)
    LocalStorage(config.run_dir).write_text(path.name, yaml.safe_dump(resolved, sort_keys=False))
    return run


def _before(path: Path) -> dict[str, Any]:
    """The settings of the life before, by dotted name; none for a new run."""
    try:
        return settings.flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"{path} is damaged: restore it, or remove it if the settings given now are the run's"
        ) from error
