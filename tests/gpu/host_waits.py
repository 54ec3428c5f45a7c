"""A stand-in for torch.cuda.set_sync_debug_mode on the CPU: what would make the host wait for a GPU, and where."""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {  # item(), bool(), float(), and what has as many elements as the values say
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


class HostWaits(TorchDispatchMode):
    """Notes each wait of this thread for a device, were the tensors on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        """What waited, and the line of ours that did it."""

    def note(self, what: str) -> None:
        ours = [
            frame
            for frame in traceback.extract_stack()
            if "elastic_gpt/" in frame.filename or "model_zoo/" in frame.filename
        ]
        self.found.append(f"{what} in {ours[-1].name}: {ours[-1].line}" if ours else what)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            self.note(str(function))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_waits() -> Iterator[HostWaits]:
    """Within it, each wait is noted. Copies from one memory to the same one are seen by how they are asked for."""
    waits = HostWaits()
    assign, to, make = Tensor.__setitem__, Tensor.to, torch.tensor

    def assigned(self: Tensor, index: Any, value: Any) -> None:
        if isinstance(value, (int, float, bool)):  # a GPU copies it from memory that is not pinned
            waits.note("assignment of a number")
        assign(self, index, value)

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], (str, torch.device)) and not kwargs.get("non_blocking"):
            waits.note("Tensor.to")
        return to(self, *args, **kwargs)

    def made(*args: Any, **kwargs: Any) -> Tensor:
        waits.note("torch.tensor")
        return make(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, waits:
        patch.setattr(Tensor, "__setitem__", assigned)
        patch.setattr(Tensor, "to", moved)
        patch.setattr(torch, "tensor", made)
        for name in ("tolist", "numpy", "cpu"):
            there = getattr(Tensor, name)
            patch.setattr(
                Tensor,
                name,
                lambda self, *of, _name=name, _there=there: (waits.note(f"Tensor.{_name}"), _there(self, *of))[1],
            )
        yield waits
