"""What each kind of device can do. No other module decides by the kind of device.

A new kind (XPU, for example) is a line in each of these functions and in `Device` in settings.py.
"""

import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from elastic_gpt.settings import Device, SettingsError

# Peaks of dense matrix products (no sparsity), operations per second at 16 bits, from the makers' data sheets, by words of a
# device's name. The first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "4090": 165e12,
    "3090": 71e12,
    "A10": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}


def pick(device: Device, local_rank: int = 0) -> torch.device:
    """The device of a worker; auto: a CUDA GPU, else an Apple GPU, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def find_device(name: str | None) -> torch.device:
    """The device that a person named; None: CUDA if there is one, else the CPU. Raises ValueError if it is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device: give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here: give --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: torch sees no Apple GPU here: give --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name} is no device that a model can be used on: give cpu or cuda")
    return device


def slow_at_few_rows(x: torch.Tensor) -> bool:
    """Whether a matrix product of `x` (rows,width) with one to four rows is slow on its device, and a batch of products is not.

    On AMD's processors MKL reads the matrix at 0.4 of the memory's speed, and at nearly all of it when it is asked for a
    batch of products. With its code for Intel's it is the other way round (dev/LOG.md).
    """
    return is_host(x.device) and x.dtype == torch.float32 and _mkl_on_amd()


@functools.cache
def _mkl_on_amd() -> bool:
    try:
        return torch.backends.mkl.is_available() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def refuse(device: Device, *, exact: bool) -> None:
    """Raise SettingsError if training cannot use `device` on this machine, or cannot use it in exact mode."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda, but torch finds no GPU here: leave --device out, or take --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(
            "device is mps, but torch finds no Apple GPU here: leave --device out, or take --device cpu"
        )
    if exact and pick(device).type == "mps":
        raise SettingsError(
            "elastic.exact needs float64, which Apple GPUs do not have: leave it out, or take --device cpu"
        )


def backend(device: torch.device) -> str:
    """The torch.distributed backends for tensors on the host and on `device`. Makes `device` the current one of this process.

    Beside NCCL, gloo carries what the hosts say to each other, and its connections tell who has gone.
    """
    if device.type != "cuda":
        return "gloo"
    torch.cuda.set_device(device)
    # Else torch's watchdog, or who watches that, ends the process when a collective fails or stands still; torchelastic
    # even asks for it. With the first there is no such thread, and its limit is ours (World.patience).
    os.environ |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    return "cpu:gloo,cuda:nccl"


def queues(device: torch.device) -> bool:
    """Whether collectives of tensors on `device` are queued there, so that the host does not see their end unless it looks."""
    return device.type == "cuda"


def abort(device: torch.device) -> None:
    """End the default group and the collectives that stand still in it, and wait until `device` has done all else.

    May not return, if NCCL or the driver do not. Raises RuntimeError if NCCL cannot, or if the device is lost.
    """
    dist.distributed_c10d._abort_process_group()
    torch.cuda.synchronize(device)


class Connecting:
    """NCCL's connections to all peers being made, to be waited for as for a dist.Work.

    NCCL makes them in the first collective, which does not return before all peers have come, and has no limit of its own.
    So a thread does that one.
    """

    def __init__(self, device: torch.device) -> None:
        self._failed: RuntimeError | None = None
        self._thread = threading.Thread(target=self._connect, args=[device], name="connecting", daemon=True)
        self._thread.start()

    def _connect(self, device: torch.device) -> None:
        try:
            dist.all_reduce(torch.zeros(1, device=device))
        except RuntimeError as error:
            self._failed = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Once they are made, or could not be: raises why not."""
        if self._failed:
            raise self._failed


def works_on(device: torch.device) -> bool:
    """Whether the device works asynchronously, so that reading a number from it has to wait."""
    return device.type == "cuda"


def is_host(device: torch.device) -> bool:
    """Whether `device` is the CPU."""
    return device.type == "cpu"


def repeat_bits(device: torch.device) -> None:
    """Have a GPU compute the same bits from the same numbers. A kernel that cannot raises. CPUs do so anyway.

    Attention's backward pass, above all, adds up in the order in which its blocks happen to end.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW has a fused kernel on the device, which obeys `found_inf`."""
    return device.type in ("cuda", "cpu")


def usual_dtype(device: torch.device) -> torch.dtype:
    """The type for matrix products: bfloat16 on GPUs that have it. On a CPU a measurement decides (precision.py)."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak for matrix products in `dtype`, operations per second; None for CPUs and float32.

    That of a GPU that is not in `PEAKS` is measured.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    words = set(name.replace("-", " ").split())
    return next((peak for known, peak in PEAKS.items() if words.issuperset(known.split())), None) or _peak_of_unknown(
        device, dtype, name
    )


@functools.cache
def _peak_of_unknown(device: torch.device, dtype: torch.dtype, name: str) -> float:
    peak = measured_peak(device, dtype, 8192)
    print(
        f"note: the peak of {name} is not known: MFU is against products measured here, {peak / 1e12:.0f} TFLOP/s",
        file=sys.stderr,
        flush=True,
    )
    return peak


def measured_peak(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Operations per second of a matrix product of width x width, the fastest of eight."""
    a, b = torch.randn(2, width, width, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if works_on(device):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best


def pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` in pinned host memory, from which a GPU copies asynchronously."""
    return values.pin_memory() if device.type == "cuda" else values


def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying a small tensor to the host. The returned function waits for that copy and gives the values."""
    if values.device.type != "cuda":
        numbers: list[float] = values.tolist()
        return lambda: numbers
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied: Any = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return list(np.asarray(host).tolist())

    return read


def lock_pages(memory: np.ndarray, device: torch.device) -> Callable[[], object]:
    """Page-lock host memory, so that `device` copies into it while the host does something else.

    Returns what unlocks it again, which also happens when `memory` is freed. Raises RuntimeError if the driver refuses.
    """
    cudart: Any = torch.cuda.cudart()
    address = memory.ctypes.data
    with torch.cuda.device(device):
        failed = cudart.cudaHostRegister(address, memory.nbytes, 0)
        if int(failed):
            # The runtime keeps the error, and the next kernel would raise it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=device).add_(1)
            raise RuntimeError(cudart.cudaGetErrorString(failed))
    unlock = weakref.finalize(memory, cudart.cudaHostUnregister, address)
    unlock.atexit = False  # the end of the process does it
    return unlock


class SideCopy:
    """A copy into page-locked host memory by a stream of its own, while the device goes on computing.

    It begins when the device has done all that was queued before, and nobody waits for it who does not say so.

    Args:
        pairs: where to, and what is copied. What is on the host already is copied at once.
        device: of the others.
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for host, tensor in pairs:
                host.copy_(tensor, non_blocking=True)
        self._device = device
        self._ended: Any = torch.cuda.Event(blocking=True)  # blocking: who waits for it does not spin
        self._ended.record(stream)

    def goes_before(self) -> None:
        """Have the device end the copy before it does what is queued from now on. The host does not wait."""
        self._ended.wait(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Until it has ended. Raises RuntimeError if the device is lost."""
        self._ended.synchronize()


@functools.cache
def _side_stream(device: torch.device) -> Any:
    # Streams of one priority are a pool, and are handed out in turn. NCCL's are of the usual one, and may stand still.
    return torch.cuda.Stream(device, priority=-1)
