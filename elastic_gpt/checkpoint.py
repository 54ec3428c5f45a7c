"""The state on storage: a checkpoint is whole or absent (law 6).

    RUN/checkpoints/step_00001000/model.safetensors       parameters, by their names in the model
                                  optimizer.safetensors   the optimizer's moments, by moment and parameter
                                  MANIFEST.json           the run it belongs to, sizes and sha256 of both files, of the
                                                          manifest before it and of the ledger so far; its rename (or
                                                          PUT) into place is the commit

A folder without a manifest is not a checkpoint. Loading verifies each file; a damaged checkpoint is
named and the one before it is taken. Tensors are safetensors and the rest is JSON, so nothing in it
is code. (torch.distributed.checkpoint keeps its index as a pickle. All ranks have the same state,
so its resharding would be of no use here.)
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from elastic_gpt.contract import (
    CHECKPOINT_FORMAT_VERSION,
    CHECKPOINTS,
    CONFIG,
    EXACT_SUMS,
    MANIFEST,
    RUN_FORMAT_VERSION,
)
from elastic_gpt.identity import Run
from elastic_gpt.ledger import strict_json
from elastic_gpt.mirror import mirror_of
from elastic_gpt.storage import FOLDER, Unreachable, open_storage


def writer() -> str:
    """This program and its version."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it is not installed
        return f"elastic-gpt {importlib.metadata.version('elastic-gpt')}"
    return "elastic-gpt"


class CheckpointError(ValueError):
    """No checkpoint can be loaded. The message says why, and what to do."""


class NoCheckpointYet(CheckpointError):
    """The run has not written its first checkpoint yet."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        place: a folder (RUN/checkpoints), or an fsspec URL (s3://bucket/run).
        keep: how many of the newest are kept.
        run: the run; checkpoints of another one are neither loaded nor deleted. None to read those of any run.
        ledger: the run's ledger.jsonl, to which each manifest is chained.
    """

    def __init__(self, place: Path | str, keep: int = 1, run: Run | None = None, ledger: Path | None = None) -> None:
        try:
            self.storage = open_storage(place)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self.keep, self.run, self.ledger = keep, run, ledger
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[int] | None = None
        self._saving_in: Run | None = None  # the life in which that began
        self.saved: int | None = None  # step of the newest checkpoint that this process knows to be whole
        self.listed = 0  # step of the newest one that `newest_step` saw, whole or not
        self.failed = False  # whether the last save failed

    def begin_life(self, run: Run) -> None:
        """From now on checkpoints are of this life. One that is on its way goes on, as that of the life in which it began."""
        self.run, self.saved, self.listed = run, None, 0

    @staticmethod
    def name(step: int) -> str:
        return f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(int(name[5:]) for name in self.storage.manifests())

    def files(self, step: int) -> dict[str, int]:
        """What is there of the checkpoint of `step`, whole or not: bytes by the names of its files."""
        return self.storage.sizes(self.name(step))

    def versions(self, step: int) -> dict[str, str]:
        """What changes if a file of the checkpoint of `step` is written anew, by the names of the files."""
        return self.storage.versions(self.name(step))

    def newest_step(self, newer_than: int = -1) -> int | None:
        """Step of the newest whole checkpoint after step `newer_than`, or None. Damaged ones are named on standard error.

        Raises:
            CheckpointError: if all of them are damaged, or if some are of another run or of a newer version.
        """
        damaged = []
        steps = self.steps()
        self._refuse_newer_formats(steps)
        self._refuse_another_runs(steps)
        self.listed = max(steps, default=0)
        for step in reversed(steps):
            if step <= newer_than:
                return None
            if self._abandoned(step):
                print(f"{self.storage}/{self.name(step)} is of an end that the run went back from", file=sys.stderr)
                continue
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
        """The tensors of one part, `model` or `optimizer`. Their names begin with the part."""
        file = f"{part}.safetensors"
        try:
            with self._whole(step, file) as path:
                return {f"{part}.{name}": tensor for name, tensor in load_file(path).items()}
        except Unreachable:
            raise
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.storage}/{self.name(step)}/{file}: {error}") from error

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]], push_out: bool = True
    ) -> None:
        """Copy the state to host memory and write it in a thread. `finished` tells how that ended.

        Call `finished` first, since there is only one save at a time. `push_out`: whether older
        ones may be deleted.
        """
        assert self.pending is None
        self._saving_in = self.run
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self.pending = self.writer.submit(self._write, step, copies, list(reports), push_out)

    def finished(self, wait: bool = False) -> int | OSError | None:
        """The result of the last save: its step, its error, or None if there is nothing new."""
        if self.pending is None or not (wait or self.pending.done()):
            return None
        pending, self.pending = self.pending, None
        try:
            step = pending.result()
            self.failed = False
            if self.run and self._saving_in and not self.run.valid(self._saving_in.life, step):
                return None  # a later life began before it
            self.saved = step
            return step
        except OSError as error:  # a full or read-only volume: training goes on, and the next save tries again
            self.failed = True
            return error

    @property
    def owed(self) -> bool:
        """Whether the last save failed and none is running, so that another one should begin soon."""
        return self.failed and self.pending is None

    def _write(
        self, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]], push_out: bool = True
    ) -> int:
        folder, steps = self.name(step), self.steps()
        self._refuse_another_runs(steps)
        if step in steps and self._is_good(step):  # the step was lost and done again
            return step
        # Nothing is deleted first: what is there is replaced, and another node that leaves may be saving this very state.
        try:
            self._write_files(folder, step, tensors, reports)
        except OSError:
            if step not in self.steps():
                self.storage.delete_folder(folder)  # the disk may be full
            elif self._is_good(step):  # another node was quicker, and has tidied up
                return step
            raise
        self.storage.sweep(folder)
        # Only those of the history that leads to this step: a damaged later one must not push out a good one.
        push_out = push_out and not self._abandoned(step)
        for old in sorted({past for past in steps if past < step} | {step})[: -self.keep] if push_out else []:
            try:
                self._delete_manifest(old)  # without it, it is no checkpoint
                self.storage.delete_folder(self.name(old))
            except OSError as error:  # that does not harm the new one
                print(f"warning: {self.name(old)} could not be deleted: {error}", file=sys.stderr, flush=True)
        return step

    def _is_good(self, step: int) -> bool:
        """Whether the checkpoint of a step that is there is whole, and of the run's history."""
        with contextlib.suppress(CheckpointError):
            self._verify(step)
            return not self._abandoned(step)
        return False

    def _delete_manifest(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # another node that leaves was quicker
            self.storage.delete(f"{self.name(step)}/{MANIFEST}")

    def _refuse_another_runs(self, steps: list[int]) -> None:
        """Raise CheckpointError for another run's checkpoints: two runs would load and delete each other's."""
        for manifest in map(self._manifest_if_whole, reversed(steps)):
            with contextlib.suppress(KeyError):  # it is damaged, which is reported elsewhere
                if self.run and manifest and (refusal := self.run.refusal(manifest, str(self.storage))):
                    raise CheckpointError(refusal)

    def _refuse_newer_formats(self, steps: list[int]) -> None:
        """Raise CheckpointError for checkpoints that a newer version wrote."""
        for step in steps:
            manifest = self._manifest_if_whole(step) or {}
            refuse_newer(f"checkpoint {self.storage}/{self.name(step)}", manifest, CHECKPOINT_FORMAT_VERSION)

    def _abandoned(self, step: int) -> bool:
        """Whether a later life of the run began before the step of this checkpoint."""
        life = str((self._manifest_if_whole(step) or {}).get("life"))
        return bool(self.run and life in self.run.lives and not self.run.valid(self.run.lives[life], step))

    def _manifest_if_whole(self, step: int) -> dict[str, Any] | None:
        try:
            manifest = self._manifest(step)
            return manifest if isinstance(manifest, dict) else None
        except Unreachable:
            raise
        except (OSError, ValueError):
            return None

    def _write_files(
        self, folder: str, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]
    ) -> None:
        files = {}
        for part in ("model", "optimizer"):
            inside = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            write = functools.partial(save_tensors, inside)
            files[f"{part}.safetensors"] = self.storage.write_file(f"{folder}/{part}.safetensors", write, _fingerprint)
        # A chain: each manifest names the one before it, which has the digests of its own files.
        earlier = max((past for past in self.steps() if past < step), default=None)
        before = None
        if earlier is not None:
            with contextlib.suppress(FileNotFoundError):  # another node has saved this state, and deleted that one
                before = {"step": earlier, "sha256": self._digest(earlier)}
        there = self.files(step)
        if missing := next((name for name, file in files.items() if there.get(name) != file["bytes"]), None):
            raise OSError(f"{self.storage}/{folder}/{missing} was deleted by another process while it was saved")
        if (self._manifest_if_whole(step) or {}).get("files") == files and not self._abandoned(step):
            return  # another node has saved it meanwhile, and what came after may be chained to that
        manifest = {
            "format_version": CHECKPOINT_FORMAT_VERSION,
            "writer": writer(),
            "exact_sums": EXACT_SUMS,
            "run_id": self.run and self.run.run_id,
            "life": self._saving_in and self._saving_in.name,
            "step": step,
            "before": before,
            "ledger": self._ledger_up_to(None),
            "files": files,
            "reports": reports,
        }
        self.storage.write_text(f"{folder}/MANIFEST.json", strict_json(manifest, indent=1))

    def copy(self, step: int, folder: Path) -> None:
        """Copy one checkpoint, verified, into a folder of checkpoints on this machine."""
        place = folder / self.name(step)
        place.mkdir(parents=True)
        for name in self._manifest(step)["files"]:
            with self._whole(step, name) as path:
                shutil.copyfile(path, place / name)
        (place / MANIFEST).write_text(self.storage.read_text(f"{self.name(step)}/{MANIFEST}"))

    def check_chain(self) -> list[str]:
        """Check each checkpoint of the run's history: its files, the one before it, and the events of the ledger up to it.

        Returns:
            What cannot be checked, in lines: what was deleted, or written by a version that kept no chain.

        Raises:
            CheckpointError: for the first that is damaged or was exchanged.
        """
        steps, gaps = [step for step in self.steps() if not self._abandoned(step)], []
        for step in steps:
            self._verify(step)
            manifest, name = self._manifest(step), self.name(step)
            before, events = manifest.get("before"), manifest.get("ledger")
            if before and before["step"] not in steps:
                gaps.append(f"{name} followed {self.name(before['step'])}, which is no longer there")
            elif before and before["sha256"] != self._digest(before["step"]):
                raise CheckpointError(
                    f"{self.storage}/{name} followed another checkpoint of step {before['step']} than is there:"
                    " one of the two was exchanged"
                )
            if events is None:
                gaps.append(f"{name} does not say which events came before it: an older version wrote it")
            elif events != self._ledger_up_to(events["bytes"]):
                raise CheckpointError(
                    f"{self.ledger} is not what it was when {self.storage}/{name} was saved: events before that were"
                    " changed: restore it from a backup"
                )
        return gaps

    def _ledger_up_to(self, end: int | None) -> dict[str, Any] | None:
        """Length and digest of the ledger's beginning; None: of all its whole lines. It only grows."""
        if self.ledger is None:
            return None
        content = self.ledger.read_bytes() if self.ledger.exists() else b""
        content = content[: content.rfind(b"\n") + 1 if end is None else end]
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _digest(self, step: int) -> str:
        return hashlib.sha256(self.storage.read_text(f"{self.name(step)}/{MANIFEST}").encode()).hexdigest()

    def _verify(self, step: int) -> None:
        try:
            for name in self._manifest(step)["files"]:
                with self._whole(step, name):
                    pass
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError | Unreachable):
                raise
            raise CheckpointError(f"checkpoint {self.storage}/{self.name(step)} is damaged: {error}") from error

    def exact_sums(self, step: int) -> int:
        """How the version that saved this checkpoint sums gradients in exact mode, as EXACT_SUMS says."""
        return self._manifest(step).get("exact_sums", 1)

    def _manifest(self, step: int) -> dict[str, Any]:
        return json.loads(self.storage.read_text(f"{self.name(step)}/MANIFEST.json"))

    @contextlib.contextmanager
    def _whole(self, step: int, name: str) -> Iterator[Path]:
        """A local path of a file of the checkpoint, after checking it against the manifest."""
        with self.storage.open_file(f"{self.name(step)}/{name}") as path:
            if _fingerprint(path) != self._manifest(step)["files"][name]:
                folder = f"{self.storage}/{self.name(step)}"
                raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")
            yield path


def refuse_newer(what: str, facts: dict[str, Any], newest: int) -> None:
    """Raise CheckpointError if a newer version wrote something.

    Args:
        what: what it is, for the message.
        facts: its `format_version` and `writer`, the program and version that wrote it.
        newest: the newest format version that this program reads.
    """
    version = facts.get("format_version", newest)
    if isinstance(version, int) and version > newest:
        needed = facts.get("writer") or "a newer elastic-gpt"
        raise CheckpointError(
            f"{what} has format_version {version}, {writer()} reads up to {newest}: install {needed} or later"
        )


def checkpoints_place(run: Path, place: str | None) -> str:
    """Where the checkpoints of `run` are. `place`: its `checkpoint.dir`; a relative one is below the run directory."""
    if place and "://" in place:
        return place
    mirror = mirror_of(run)
    if mirror and not Path(place or CHECKPOINTS).is_absolute():
        return f"{mirror.url}/{place or CHECKPOINTS}"
    return str((run / (place or CHECKPOINTS)).resolve())


def load_model_weights(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and model state dict of the newest whole checkpoint of a run directory.

    Raises:
        NoCheckpointYet: if the run has no checkpoint yet.
        CheckpointError: if there is no run, a newer version made it, or the numbers in it are not finite.
    """
    if not run.exists():
        raise CheckpointError(f"no run directory {run}: train one with `elastic-gpt train PRESET --run-dir {run}`")
    config = run / CONFIG
    if not config.exists() and not (run / CHECKPOINTS).is_dir():
        raise CheckpointError(
            f"no checkpoint in {run}, which is {_what_it_is(run)}: name a run directory, which training wrote"
        )
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
        place = checkpoints_place(run, settings.get("checkpoint", {}).get("dir"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{config} is damaged: restore the file that training wrote") from error
    refuse_newer(f"the run in {run}", settings, RUN_FORMAT_VERSION)
    checkpoints = Checkpoints(place)
    step = checkpoints.newest_step()
    if step is None:
        raise NoCheckpointYet(
            f"no checkpoint in {checkpoints.storage}, where {run} keeps them, yet: one is written every"
            " checkpoint.interval steps and at the end"
        )
    weights = {name.removeprefix("model."): tensor for name, tensor in checkpoints.read(step, "model").items()}
    if odd := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise CheckpointError(
            f"checkpoint {checkpoints.storage}/{checkpoints.name(step)} is of a broken model, {odd} is not finite:"
            " delete it, and the one before is taken"
        )
    return step, weights


def _what_it_is(path: Path) -> str:
    """In words, what is at a path that is not a run directory."""
    if not path.is_dir():
        return "a file"
    if FOLDER.fullmatch(path.name) and (path / MANIFEST).exists():
        return "one checkpoint"
    if any(path.glob("step_*/MANIFEST.json")):
        return "a folder of checkpoints"
    if (path / "meta.json").exists() or (path / "train.bin").exists():
        return "prepared data" if (path / "train.bin").exists() else "a tokenizer folder"
    if runs := sorted(found.parent.name for found in path.glob("*/config.yaml")):
        return f"a folder of runs ({', '.join(runs[:3])}{', ...' if len(runs) > 3 else ''})"
    return "no run directory" if any(path.iterdir()) else "an empty folder yet"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError if that fails; safetensors itself raises an error of its own."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path} ({error}): make room, or choose another place") from error
