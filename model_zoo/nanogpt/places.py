"""Folders of this machine for data and run directories that are given as URLs: copies of data, and mirrors of runs."""

import dataclasses
from pathlib import Path

from elastic_gpt import mirror
from elastic_gpt.datacopy import cache_folder, local_copy
from elastic_gpt.storage import url_of
from model_zoo.nanogpt.config import DataConfig, TrainConfig

_data: dict[Path, str] = {}  # folder of a copy to its URL


def here(config: TrainConfig) -> TrainConfig:
    """`config` with folders of this machine in place of URLs.

    Raises:
        ValueError: if the data is missing, damaged or too large, or no installed package knows the protocol.
        Unreachable: if a store does not answer.
    """
    data = dataclasses.replace(config.data, dir=data_here(config.data))
    return dataclasses.replace(config, data=data, run_dir=mirror.here(config.run_dir))


def data_here(data: DataConfig) -> Path:
    """The folder of this machine with the data."""
    url = url_of(data.dir)
    if url is None:
        return data.dir
    folder = local_copy(url, data.cache or cache_folder(), int(data.cache_gb * 1e9))
    _data[folder] = url
    return folder


def given(config: TrainConfig) -> TrainConfig:
    """`config` as the user gave it, with the URLs. (Its paths are only for writing them down.)"""
    run, urls = mirror.mirror_of(config.run_dir), {"dir": _data.get(config.data.dir, config.data.dir)}
    data = dataclasses.replace(config.data, **urls)  # type: ignore[arg-type]
    return dataclasses.replace(config, data=data, **({"run_dir": run.url} if run else {}))  # type: ignore[arg-type]
