"""The state on storage: a checkpoint is whole or absent (law 6).

    RUN/checkpoints/step_00001000/model.safetensors       parameters, by their names in the model
                                  optimizer.safetensors   the optimizer's moments, by moment and parameter
                                  MANIFEST.json           whose it is, sizes and sha256 of both; its rename (or PUT) into
                                                          place is the commit

A folder without a manifest is not a checkpoint. Loading verifies each file; a damaged checkpoint is named and the one
before it is taken. Tensors are safetensors and the rest is JSON: nothing in it is code. (torch.distributed.checkpoint
keeps its own index as a pickle; the state is the same on all ranks, so its resharding would buy nothing here.)
"""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from elastic_gpt.storage import Unreachable, open_storage

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """No checkpoint can be loaded, with the reason and the cure."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        place: a folder (RUN/checkpoints), or an fsspec URL (s3://bucket/run).
        keep: newest ones that are kept.
        run_id: of the run; another's are neither taken nor deleted. None, for who only reads weights: any run's.
    """

    def __init__(self, place: Path | str, keep: int = 1, run_id: str | None = None) -> None:
        try:
            self.storage = open_storage(place)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self.keep, self.run_id = keep, run_id
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[int] | None = None
        self.saved: int | None = None  # step of the newest checkpoint that this process has seen to be whole
        self.listed = 0  # step of the newest one that `newest_step` saw, whole or not
        self.failed = False  # whether the last save did

    @staticmethod
    def name(step: int) -> str:
        return f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(int(name[5:]) for name in self.storage.manifests())

    def newest_step(self, newer_than: int = -1) -> int | None:
        """Step of the newest whole checkpoint past `newer_than`, or None. Damaged ones are named on standard error.

        Raises:
            CheckpointError: if there are some, but all are damaged; or if there are another run's.
        """
        damaged = []
        steps = self.steps()
        self._refuse_another_runs(steps)
        self.listed = max(steps, default=0)
        for step in reversed(steps):
            if step <= newer_than:
                return None
            try:
                self._verify(step)
                self.saved = step
                return step
            except CheckpointError as error:
                damaged.append(str(error))
                print(f"warning: {error}; the one before it is tried", file=sys.stderr)
        if damaged and newer_than < 0:
            raise CheckpointError(
                f"no checkpoint in {self.storage} is whole ({damaged[0]}): restore one from a backup,"
                " or train into another --run-dir"
            )
        return None

    @torch.no_grad()
    def load(self, step: int, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Copy the checkpoint of `step` into the live state `tensors`; returns the step reports that came with it."""
        found = self.read(step, "model") | self.read(step, "optimizer")
        if found.keys() != tensors.keys():
            odd = sorted(found.keys() ^ tensors.keys())[0]
            raise CheckpointError(
                f"{self.storage}/{self.name(step)} is of another model: '{odd}' is in only one of the two"
            )
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
        return list(self._manifest(step).get("reports", []))

    def read(self, step: int, part: str) -> dict[str, torch.Tensor]:
        """The tensors of one part (`model` or `optimizer`), their names with the part in front."""
        file = f"{part}.safetensors"
        try:
            with self._whole(step, file) as path:
                return {f"{part}.{name}": tensor for name, tensor in load_file(path).items()}
        except Unreachable:
            raise
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.storage}/{self.name(step)}/{file}: {error}") from error

    def save(self, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]) -> None:
        """Copy the state to host memory and write it in a thread; `finished` tells how that ended.

        Ask `finished` first: one save at a time.
        """
        assert self.pending is None
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self.pending = self.writer.submit(self._write, step, copies, list(reports))

    def finished(self, wait: bool = False) -> int | OSError | None:
        """What became of the last save: its step, the error it failed with, or None if nothing new is known."""
        if self.pending is None or not (wait or self.pending.done()):
            return None
        pending, self.pending = self.pending, None
        try:
            self.saved = pending.result()
            self.failed = False
            return self.saved
        except OSError as error:  # a full or read-only volume: training goes on and the next save tries again
            self.failed = True
            return error

    @property
    def owed(self) -> bool:
        """Whether the last save failed, and none is under way: the next moment that suits is the time for another."""
        return self.failed and self.pending is None

    def _write(self, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]) -> int:
        folder, steps = self.name(step), self.steps()
        self._refuse_another_runs(steps)
        if step in steps:  # it is done again
            try:
                self._verify(step)
                return step
            except CheckpointError:
                self.storage.delete(f"{folder}/MANIFEST.json")
        self.storage.delete_folder(folder)  # what a killed or damaged save left behind
        try:
            self._write_files(folder, step, tensors, reports)
        except OSError:
            self.storage.delete_folder(folder)  # on a full disk its room is needed
            raise
        # Of the history that leads to this step; a damaged later one does not push out a good one.
        for old in sorted({past for past in steps if past < step} | {step})[: -self.keep]:
            try:
                self.storage.delete(f"{self.name(old)}/MANIFEST.json")  # first no longer a checkpoint, then gone
                self.storage.delete_folder(self.name(old))
            except OSError as error:  # the new one is whole all the same
                print(f"warning: {self.name(old)} could not be deleted: {error}", file=sys.stderr, flush=True)
        return step

    def _refuse_another_runs(self, steps: list[int]) -> None:
        """One place holds one run: two would resume from each other's checkpoints, and delete them."""
        for step in steps if self.run_id else []:
            try:
                owner = self._manifest(step)["run_id"]
            except Unreachable:
                raise
            except (OSError, ValueError, KeyError):  # damaged, which is told elsewhere
                continue
            if owner != self.run_id:
                raise CheckpointError(
                    f"{self.storage} holds checkpoints of another run ({owner}): give this one a --checkpoint.dir of its own,"
                    " or go on in the other's --run-dir"
                )

    def _write_files(
        self, folder: str, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]
    ) -> None:
        files = {}
        for part in ("model", "optimizer"):
            inside = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            write = functools.partial(_save_tensors, inside)
            files[f"{part}.safetensors"] = self.storage.write_file(f"{folder}/{part}.safetensors", write, _fingerprint)
        manifest = {"format_version": FORMAT_VERSION, "run_id": self.run_id, "step": step, "files": files}
        self.storage.write_text(f"{folder}/MANIFEST.json", json.dumps(manifest | {"reports": reports}, indent=1))

    def _verify(self, step: int) -> None:
        try:
            for name in self._manifest(step)["files"]:
                with self._whole(step, name):
                    pass
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError | Unreachable):
                raise
            raise CheckpointError(f"checkpoint {self.storage}/{self.name(step)} is damaged: {error}") from error

    def _manifest(self, step: int) -> dict[str, Any]:
        return json.loads(self.storage.read_text(f"{self.name(step)}/MANIFEST.json"))

    @contextlib.contextmanager
    def _whole(self, step: int, name: str) -> Iterator[Path]:
        """A local path with a file of the checkpoint, checked against the manifest."""
        with self.storage.open_file(f"{self.name(step)}/{name}") as path:
            if _fingerprint(path) != self._manifest(step)["files"][name]:
                folder = f"{self.storage}/{self.name(step)}"
                raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")
            yield path


def load_model_weights(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and model state dict of the newest whole checkpoint of a run directory.

    Raises:
        CheckpointError: if there is no run, or no checkpoint in it yet.
    """
    if not run.is_dir():
        raise CheckpointError(f"no run directory {run}: train one with `elastic-gpt train PRESET --run-dir {run}`")
    config = run / "config.yaml"
    settings = yaml.safe_load(config.read_text()) if config.exists() else {}
    checkpoints = Checkpoints(settings.get("checkpoint", {}).get("dir") or run / "checkpoints")
    step = checkpoints.newest_step()
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {run} yet: one is written every checkpoint.interval steps and at the end"
        )
    return step, {name.removeprefix("model."): tensor for name, tensor in checkpoints.read(step, "model").items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how safetensors reports an error of the file system
        raise OSError(str(error)) from error
