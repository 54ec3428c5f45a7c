"""devices.py: what each kind of device can do; no other module decides by it."""

import ast
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_gpt import devices
from elastic_gpt.settings import SettingsError

ROOT = Path(__file__).parents[2]
KINDS = {"cuda", "mps", "nccl"}
LISTED = {"elastic_gpt/devices.py", "elastic_gpt/settings.py"}  # the room, and the values that the flag takes


def words_of(path: Path) -> set[str]:
    """The strings and attributes in a file that name a kind of device. Words in longer messages do not count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS:
            found.add(node.value)
        if isinstance(node, ast.Attribute) and node.attr in KINDS:
            found.add(node.attr)
    return found


def test_no_other_room_knows_kinds_of_devices() -> None:
    rooms = [path for root in ("elastic_gpt", "model_zoo", "prepare") for path in (ROOT / root).rglob("*.py")]
    knowing = {path.relative_to(ROOT).as_posix() for path in rooms if words_of(path)}
    assert knowing == LISTED


def test_a_cpu_is_found_where_there_is_nothing_else() -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU here")
    assert devices.pick("auto") == devices.find_device(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:99", "mps", "meta", "vulkan", "cpu:x", "", "xla:1", "\n"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str) -> None:
    if (name in ("", "cuda") and torch.cuda.is_available()) or (name == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it is here")
    if not name:
        assert devices.find_device(name).type == "cpu"
        return
    with pytest.raises(ValueError, match=r"give cpu or cuda|give --device cpu"):
        devices.find_device(name)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_training_on_a_device_that_is_not_here_is_refused(name: devices.Device) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SettingsError, match=rf"device is {name}, but torch finds no .*GPU here"):
        devices.refuse(name, exact=False)


def test_exact_sums_are_refused_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SettingsError, match="Apple GPUs do not have"):
        devices.refuse("mps", exact=True)
    devices.refuse("mps", exact=False)
    devices.refuse("cpu", exact=True)


def test_a_cpu_has_no_known_peak_and_nothing_to_wait_for() -> None:
    here = torch.device("cpu")
    assert devices.peak_flops(here, torch.bfloat16) is None
    assert (devices.backend(here), devices.works_on(here), devices.usual_dtype(here)) == ("gloo", False, torch.float32)
    values = torch.tensor([1.0, 2.0])
    read = devices.to_host(values)
    values.zero_()
    assert read() == [1.0, 2.0]
    assert devices.pinned(values, here) is values


class Cudart:
    """In the place of torch.cuda.cudart(): notes what is registered; from the second time on it refuses."""

    def __init__(self) -> None:
        self.registered: list[int] = []

    def cudaHostRegister(self, address: int, _size: int, _flags: int) -> int:
        if self.registered:
            return 2
        self.registered.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


def test_pages_are_locked_until_they_are_unlocked_or_their_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, drained = Cudart(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    def ones(_size: int, device: torch.device) -> None:
        drained.append(device)
        raise RuntimeError("CUDA error: out of memory")  # of the refusal, though nothing is wrong with this kernel

    monkeypatch.setattr(torch, "ones", ones)
    here, memory = torch.device("cpu"), np.zeros(10, np.uint8)
    unlock = devices.lock_pages(memory, here)
    assert cudart.registered == [memory.ctypes.data]
    with pytest.raises(RuntimeError, match="error 2"):
        devices.lock_pages(np.zeros(10, np.uint8), here)
    assert drained == [here]
    unlock()
    assert cudart.registered == []
    devices.lock_pages(memory, here)
    del memory
    assert cudart.registered == []


def test_a_side_copy_comes_after_what_was_queued_and_before_what_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stream:
        def __init__(self, *_: object, **how: int) -> None:
            self.name = f"side stream of priority {how['priority']}" if how else "computing"

        def wait_stream(self, other: "Stream") -> None:
            done.append(f"{self.name} waits for {other.name}")

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Stream) -> None:
            done.append(f"event on {stream.name}")

        def wait(self, stream: Stream) -> None:
            done.append(f"{stream.name} waits for the event")

        def synchronize(self) -> None:
            done.append("the host waits for the event")

    class Source(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            done.append(f"{function.__name__} {kwargs}")
            return super().__torch_function__(function, types, args, kwargs or {})

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(devices, "_side_stream", devices._side_stream.__wrapped__)
    host, values = torch.zeros(2), torch.ones(2)
    copy = devices.SideCopy([(host, values.as_subclass(Source))], torch.device("cpu"))  # type: ignore[arg-type]
    assert host.tolist() == [1.0, 1.0]
    copy.goes_before()
    copy.wait()
    side = "side stream of priority -1"
    assert done == [
        f"{side} waits for computing",
        "copy_ {'non_blocking': True}",
        f"event on {side}",
        "computing waits for the event",
        "the host waits for the event",
    ]


def test_few_rows_are_slow_in_float32_on_amds_processors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_mkl_on_amd", lambda: True)
    assert devices.slow_at_few_rows(torch.zeros(1, 2))
    assert not devices.slow_at_few_rows(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert not devices.slow_at_few_rows(torch.zeros(1, 2, device="meta"))
    monkeypatch.setattr(devices, "_mkl_on_amd", lambda: False)
    assert not devices.slow_at_few_rows(torch.zeros(1, 2))


def test_a_gpu_is_asked_to_repeat_its_bits_and_a_cpu_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    devices.repeat_bits(torch.device("cpu"))
    assert asked == []
    devices.repeat_bits(torch.device("cuda"))
    assert asked == [True]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_a_gpus_peak_is_known_by_a_whole_word_of_its_name(
    name: str, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert devices.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert devices.peak_flops(torch.device("cuda"), torch.float32) is None


def test_the_peak_of_an_unknown_gpu_is_measured_once_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Tomorrow 1")
    monkeypatch.setattr(devices, "measured_peak", lambda *of: asked.append(of[2]) or 42e12)
    peaks = {devices.peak_flops(torch.device("cuda"), torch.bfloat16) for _ in range(3)}
    assert (peaks, asked) == ({42e12}, [8192])
    told = "note: the peak of NVIDIA Tomorrow 1 is not known: MFU is against products measured here, 42 TFLOP/s\n"
    assert capsys.readouterr().err == told


def test_a_measured_peak_counts_the_operations_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 5.0, 7.0, *[7.0, 11.0] * 6])
    monkeypatch.setattr("elastic_gpt.devices.time.perf_counter", lambda: next(clock))
    assert devices.measured_peak(torch.device("cpu"), torch.float32, 10) == 2 * 10**3 / 2.0
