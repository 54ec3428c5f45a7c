"""The run directory of a training: what is in it, and which settings a run cannot change."""

import contextlib
import shutil
from collections.abc import Callable
from typing import Any

import yaml

from elastic_gpt import settings
from elastic_gpt.checkpoint import refuse_newer, writer
from elastic_gpt.contract import CONFIG, RUN_FORMAT_VERSION, TOKENIZER
from elastic_gpt.identity import Run
from elastic_gpt.ledger import Ledger
from elastic_gpt.mirror import shown
from elastic_gpt.rundir import Introduction, Opened, open_together, settings_before
from elastic_gpt.settings import SettingsError
from elastic_gpt.storage import LocalStorage
from elastic_gpt.world import World
from model_zoo.nanogpt import places, precision
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.initial import FINGERPRINT
from model_zoo.nanogpt.initial import fingerprint as fingerprint_of_start
from model_zoo.nanogpt.vocabulary import vocabulary_fingerprint
from prepare.data import load_tokenizer, save_tokenizer
from prepare.tokens import DataError, Meta, fingerprint

# Settings that a run cannot change, since data order, batches, parameters and the moments that are kept depend on them.
IDENTITY = (
    *("model", "seed", "global_batch", "micro_batch", "optimizer.kind", "elastic.exact", "data_fingerprint"),
    FINGERPRINT,
)
PATHS = ("run_dir", "data.dir", "init_from")  # may differ: a volume may be mounted elsewhere
YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # each membership change waits for this
ABOUT = ("format_version", "writer")  # entries of config.yaml that are not settings


def open_run(config: TrainConfig, meta: Meta, world: World, me: Introduction) -> Opened[TrainConfig]:
    """Make or find the run directory, and claim it for this job. The first worker has the claim.

    What it tells all ranks is the config with the type of matrix products that the run has.

    Raises:
        SettingsError: on all ranks, if their settings or data differ, if the run in the directory has other values of
            settings that a run cannot change, if the directory cannot be written, or if the nodes do not share it.
        InUse: on all ranks, if another job trains into the directory.
        CheckpointError: on all ranks, if a newer version made the run.
    """
    mine = settings.flatten(_resolved(config, meta))
    for path in PATHS:
        mine.pop(path)

    def make(take: Callable[[], tuple[Run, Ledger]]) -> tuple[Run, TrainConfig]:
        settled = precision.settle(config, world.device)
        return _make(settled, meta, take), settled

    return open_together(config.run_dir, mine, world, make, me)


def _resolved(config: TrainConfig, meta: Meta) -> dict[str, Any]:
    about = {"format_version": RUN_FORMAT_VERSION, "writer": writer()}
    return about | settings.tree(places.given(config)) | {"data_fingerprint": fingerprint(meta)}


def _make(config: TrainConfig, meta: Meta, take: Callable[[], tuple[Run, Ledger]]) -> Run:
    resolved = _resolved(config, meta)
    path = config.run_dir / CONFIG
    before = settings_before(path)
    refuse_newer(f"the run in {shown(config.run_dir)}", before, RUN_FORMAT_VERSION)
    if not before and (config.run_dir / "train.bin").exists():
        raise SettingsError(
            f"{shown(config.run_dir)} holds prepared data: name a folder of its own for the run with --run-dir"
        )
    resolved[FINGERPRINT] = fingerprint_of_start(config, before)
    # Settings that an older version did not know have their defaults; it always started from random weights.
    defaults = settings.flatten(settings.tree(TrainConfig())) | {FINGERPRINT: None}
    before = defaults | before if before else {}
    changed = {}
    for name, value in settings.flatten(resolved).items() if before else []:
        if name in (*PATHS, *ABOUT) or before.setdefault(name, value) == value:
            continue
        if any(name == part or name.startswith(f"{part}.") for part in IDENTITY):
            raise SettingsError(
                f"the run in {shown(config.run_dir)} has {name}={before[name]}, not {value}:"
                " set it back, or train into another --run-dir"
            )
        changed[name] = [before[name], value]
    run, ledger = take()
    if changed:
        ledger.write("settings_changed", changes=changed)  # name to old and new value
    tokenizer = config.run_dir / TOKENIZER
    if not tokenizer.exists():  # the tokenizer belongs to the model
        aside = tokenizer.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_tokenizer(config.data.dir, aside)
        aside.rename(tokenizer)
    resolved["tokenizer_fingerprint"] = before.get("tokenizer_fingerprint")
    if not resolved["tokenizer_fingerprint"]:
        with contextlib.suppress(DataError):  # data of another tool that has no tokenizer in it
            resolved["tokenizer_fingerprint"] = vocabulary_fingerprint(load_tokenizer(tokenizer))
    text = yaml.dump(resolved, Dumper=YAML_DUMPER, sort_keys=False)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        LocalStorage(config.run_dir).write_text(path.name, text)
    return run
