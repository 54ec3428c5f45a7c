"""The state on storage: a checkpoint is whole or absent (law 6).

    RUN/checkpoints/step_00001000/model.safetensors       parameters, by their names in the model
                                  optimizer.safetensors   the optimizer's moments, by moment and parameter
                                  MANIFEST.json           sizes and sha256 of both; its rename into place is the commit

A folder without a manifest is not a checkpoint. Loading verifies each file; a damaged checkpoint is named and the one
before it is taken. Tensors are safetensors and the rest is JSON: nothing in it is code. (torch.distributed.checkpoint
keeps its own index as a pickle; the state is the same on all ranks, so its resharding would buy nothing here.)
"""

import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """No checkpoint can be loaded, with the reason and the cure."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: RUN/checkpoints.
        keep: newest ones that are kept.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[int] | None = None
        self.saved: int | None = None  # step of the newest checkpoint that this process has seen to be whole

    @staticmethod
    def name(step: int) -> str:
        return f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        names = (path.parent.name for path in self.folder.glob("step_*/MANIFEST.json"))
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name))

    def newest_step(self, newer_than: int = -1) -> int | None:
        """Step of the newest whole checkpoint past `newer_than`, or None. Damaged ones are named on standard error.

        Raises:
            CheckpointError: if there are some, but all are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
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
                f"no checkpoint in {self.folder} is whole ({damaged[0]}): restore one from a backup,"
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
                f"{self.folder / self.name(step)} is of another model: '{odd}' is in only one of the two"
            )
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
        return list(json.loads((self.folder / self.name(step) / "MANIFEST.json").read_text()).get("reports", []))

    def read(self, step: int, part: str) -> dict[str, torch.Tensor]:
        """The tensors of one part (`model` or `optimizer`), their names with the part in front."""
        path = self.folder / self.name(step) / f"{part}.safetensors"
        try:
            return {f"{part}.{name}": tensor for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error

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
            return self.saved
        except OSError as error:  # a full or read-only volume: training goes on and the next save tries again
            return error

    def _write(self, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]) -> int:
        folder = self.folder / self.name(step)
        if (folder / "MANIFEST.json").exists():  # a step that is done again
            try:
                self._verify(step)
                return step
            except CheckpointError:
                (folder / "MANIFEST.json").unlink()
        shutil.rmtree(folder, ignore_errors=True)  # what a killed or damaged save left behind
        try:
            self._write_files(folder, step, tensors, reports)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk its room is needed
            raise
        # Of the history that leads to this step; a damaged later one does not push out a good one.
        for old in [past for past in self.steps() if past <= step][: -self.keep]:
            (self.folder / self.name(old) / "MANIFEST.json").unlink()  # first no longer a checkpoint, then gone
            shutil.rmtree(self.folder / self.name(old), ignore_errors=True)
        return step

    def _write_files(
        self, folder: Path, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]
    ) -> None:
        folder.mkdir(parents=True)
        files = {}
        for part in ("model", "optimizer"):
            path = folder / f"{part}.safetensors"
            inside = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            try:
                save_file(inside, path)
            except SafetensorError as error:  # how safetensors reports an error of the file system
                raise OSError(str(error)) from error
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        aside = folder / "MANIFEST.json.partial"
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files, "reports": reports}
        aside.write_text(json.dumps(manifest, indent=1))
        _flush(aside)
        aside.rename(folder / "MANIFEST.json")
        _flush(folder)
        _flush(self.folder)

    def _verify(self, step: int) -> None:
        folder = self.folder / self.name(step)
        try:
            manifest = json.loads((folder / "MANIFEST.json").read_text())
            for name, expected in manifest["files"].items():
                path = folder / name
                if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                    raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error


def load_model_weights(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and model state dict of the newest whole checkpoint of a run directory.

    Raises:
        CheckpointError: if there is no run, or no checkpoint in it yet.
    """
    if not run.is_dir():
        raise CheckpointError(f"no run directory {run}: train one with `elastic-gpt train PRESET --run-dir {run}`")
    checkpoints = Checkpoints(run / "checkpoints")
    step = checkpoints.newest_step()
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {run} yet: one is written every checkpoint.interval steps and at the end"
        )
    return step, {name.removeprefix("model."): tensor for name, tensor in checkpoints.read(step, "model").items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the file system write a file or a folder's entries out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
