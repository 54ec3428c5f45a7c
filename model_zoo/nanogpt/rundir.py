"""The run directory: what a run leaves behind, and what makes it this run and no other."""

import shutil

import yaml

from elastic_gpt import settings
from elastic_gpt.ledger import Ledger
from elastic_gpt.settings import SettingsError
from elastic_gpt.world import World
from model_zoo.nanogpt.config import TrainConfig
from prepare.tokens import Meta, fingerprint

# What a run cannot change without being another run: data order, batches and parameters follow from these.
IDENTITY = ("model", "seed", "global_batch", "micro_batch", "elastic.exact", "data_fingerprint")


def open_run(config: TrainConfig, meta: Meta, world: World) -> str:
    """Make or find the run directory; returns the run's identity.

    Raises:
        SettingsError: on all ranks, if the run there was made with settings that a run cannot change, or if the
            directory cannot be written.
    """
    mistake, run_id = "", ""
    if world.first:
        try:
            run_id = _open(config, meta)
        except SettingsError as error:
            mistake = str(error)
        except OSError as error:
            mistake = f"cannot write run directory {config.run_dir} ({error.strerror}): choose another --run-dir"
    mistake, run_id = world.gather((mistake, run_id))[0]
    if mistake:
        raise SettingsError(mistake)
    return run_id


def _open(config: TrainConfig, meta: Meta) -> str:
    resolved = yaml.safe_load(settings.dump(config)) | {"data_fingerprint": fingerprint(meta)}
    path = config.run_dir / "config.yaml"
    if path.exists():
        before, now = (settings.flatten(tree) for tree in (yaml.safe_load(path.read_text()), resolved))
        for name, value in now.items():
            fixed = any(name == part or name.startswith(f"{part}.") for part in IDENTITY)
            if fixed and before.get(name) != value:
                raise SettingsError(
                    f"the run in {config.run_dir} has {name}={before.get(name)}, not {value}:"
                    " set it back, or train into another --run-dir"
                )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    run_id = Ledger(config.run_dir).run_id()
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
    return run_id
