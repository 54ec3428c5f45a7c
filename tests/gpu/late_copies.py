"""A stand-in on the CPU for copies that a GPU makes beside its work: each is made as late as whoever waits for it allows."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from elastic_gpt import devices
from elastic_gpt.snapshot import Snapshots


class LateCopy:
    """In the place of devices.SideCopy. What changes before the copy is made is copied changed, as on a GPU."""

    begun: "list[LateCopy]"

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], _device: torch.device) -> None:
        self.pairs, self.made = list(pairs), threading.Event()
        self.begun.append(self)

    @torch.no_grad()
    def make(self) -> None:
        """The device makes the copy now, if it has not yet."""
        if not self.made.is_set():
            for host, tensor in self.pairs:
                host.copy_(tensor)
        self.made.set()

    def goes_before(self) -> None:
        self.make()  # what the caller does next comes after it

    def wait(self) -> None:
        assert self.made.wait(60), "nobody lets the copy be made"


def copy_late(monkeypatch: pytest.MonkeyPatch) -> list[LateCopy]:
    """From now on the CPU copies snapshots as a GPU does. Returns the copies that have begun."""
    monkeypatch.setattr(LateCopy, "begun", [], raising=False)

    def lock_pages(_memory: Any, _device: torch.device) -> Callable[[], object]:
        return lambda: None

    monkeypatch.setattr(devices, "works_on", lambda _: True)
    monkeypatch.setattr(devices, "lock_pages", lock_pages)
    monkeypatch.setattr(devices, "SideCopy", LateCopy)
    return LateCopy.begun


def keep_snapshots(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """As `copy_late`, for whole runs: a copy is made at last when the run waits for it. Returns what was committed, by step."""
    begun, kept, layout = copy_late(monkeypatch), {}, {}
    save, wait, commit = Snapshots.save, Snapshots.wait, Snapshots._commit

    def note_and_save(self: Snapshots, step: int, life: int, tensors: dict[str, torch.Tensor], reports: Any) -> None:
        layout.update(tensors)
        save(self, step, life, tensors, reports)

    def make_and_wait(self: Snapshots) -> None:
        for copy in begun:
            copy.make()
        wait(self)

    def commit_and_read(self: Snapshots, number: int, header: dict[str, Any], copy: Any) -> None:
        commit(self, number, header, copy)
        kept[header["step"]] = {
            name: saved.clone() for name, saved in self._views(self.buffers[number], layout).items()
        }

    monkeypatch.setattr(Snapshots, "save", note_and_save)
    monkeypatch.setattr(Snapshots, "wait", make_and_wait)
    monkeypatch.setattr(Snapshots, "_commit", commit_and_read)
    return kept
