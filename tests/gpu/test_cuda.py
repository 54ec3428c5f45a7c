"""What only a GPU can show: make test-gpu. Elsewhere these are skipped; test_stand_ins.py has what a CPU can show."""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from elastic_gpt import devices
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.worlds import Step
from model_zoo.nanogpt import train
from model_zoo.nanogpt.engine import Request, generate
from model_zoo.nanogpt.model import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]

GPU = "cuda"
SMALL = ["--global-batch=8", "--micro-batch=2", "--model.block-size=128", "--model.n-layer=2", "--model.n-embd=128"]


@pytest.fixture(autouse=True)
def same_settings_afterwards() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


def training(data: Path, run: Path, device: str, steps: int, *more: str) -> train.Training:
    flags = [f"--device={device}", "--observe.tensorboard=false", f"--steps={steps}", "--evaluate.sequences=16"]
    return train.Training(*train.check(["debug_cpu", *SMALL, *flags, f"--data.dir={data}", f"--run-dir={run}", *more]))


def do(run: train.Training, step: Step) -> None:
    for tokens, targets in step:
        step.backward(run.loss_sum(tokens, targets))
    step.update(run.config.optimizer.rate(step.number, run.config.steps))


def losses(data: Path, run: Path, device: str, steps: int, *more: str) -> list[float | None]:
    """The losses of a run's steps (None: skipped), after it has gone on to step `steps`."""
    this = training(data, run, device, steps, *more)
    for step in this:
        do(this, step)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-2), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpus_run_is_the_cpus(data: Path, tmp_path: Path, dtype: str, tolerance: float, compiled: bool) -> None:
    expected = losses(data, tmp_path / "cpu", "cpu", 20, "--dtype=float32")
    flags = [f"--dtype={dtype}", *(["--compile"] if compiled else [])]
    assert losses(data, tmp_path / "gpu", GPU, 20, *flags) == pytest.approx(expected, rel=tolerance)


def test_float16_skips_few_updates_and_learns(data: Path, tmp_path: Path) -> None:
    found = losses(data, tmp_path / "gpu", GPU, 20, "--dtype=float16")
    done = [loss for loss in found if loss is not None]
    assert len(done) >= 16  # a factor that is too large is halved once or twice
    assert done[-1] < done[0] - 0.3


def test_a_run_goes_on_from_a_cpu_to_a_gpu_and_back(data: Path, tmp_path: Path) -> None:
    expected = losses(data, tmp_path / "cpu", "cpu", 15, "--dtype=float32")
    for steps, device in ((5, "cpu"), (10, GPU), (15, "cpu")):
        found = losses(data, tmp_path / "both", device, steps, "--dtype=float32")
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("more", [["--dtype=bfloat16"], ["--dtype=float16"], ["--dtype=bfloat16", "--compile"]])
def test_no_step_waits_for_the_gpu_and_memory_stays_as_it_is(data: Path, tmp_path: Path, more: list[str]) -> None:
    run = training(data, tmp_path / "run", GPU, 40, "--elastic.snapshot-interval=100", *more)
    steps, memory = iter(run), set()
    step = next(steps)
    for number in range(30):
        if number == 10:  # kernels have been loaded and compiled, memory has been taken
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        do(run, step)
        step = next(steps)
        if number >= 10:
            memory.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    torch.cuda.set_sync_debug_mode("default")
    assert len(memory) == 1
    do(run, step)
    for last in steps:
        do(run, last)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in shared memory: the kernel may refuse to lock pages of files on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_snapshot_is_copied_beside_the_work_and_nobody_waits_for_it(in_memory: Path) -> None:
    names = [f"model.{number}" for number in range(8)]
    live = {name: torch.zeros(4 << 20, device=GPU) for name in names} | {"optimizer.step": torch.zeros((), device=GPU)}
    live["model.odd"] = torch.zeros(512, 256, device=GPU).T  # is copied by way of the GPU's own memory
    live["model.buffer"] = torch.zeros(100, device=GPU)
    snapshots = Snapshots(in_memory / "run", "node", "run", live, changed_by_forward=["model.buffer"])
    assert all(torch.from_numpy(buffer).is_pinned() for buffer in snapshots.buffers)
    a = torch.randn(2048, 2048, device=GPU)
    for step in range(1, 6):
        snapshots.goes_before()
        for tensor in live.values():
            tensor.add_(1)
        snapshots.wait()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # cycles: some half a second
        torch.cuda.set_sync_debug_mode("error")
        try:
            snapshots.save(step, 0, live, [])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not torch.cuda.current_stream().query()  # it still sleeps: the host did not wait
        assert not (snapshots.folder / f"{1 - snapshots.turn}.json").exists()
        live["model.buffer"].add_(100)  # the next step: a forward pass, then the update
        a @ a
        snapshots.goes_before()
        for tensor in live.values():
            tensor.add_(100)
        snapshots.wait()
        newest, found = snapshots.newest(lambda _: True), {name: torch.zeros_like(live[name]) for name in live}
        assert newest
        snapshots.load(newest, found)
        assert newest.step == step
        assert all((tensor == step).all() for tensor in found.values())
        for name, tensor in live.items():
            tensor.sub_(200 if name == "model.buffer" else 100)
    snapshots.discard()
    assert not torch.from_numpy(snapshots.buffers[0]).is_pinned()


@pytest.mark.parametrize("more", [["--dtype=bfloat16"], ["--dtype=float16"], ["--dtype=bfloat16", "--compile"]])
def test_each_snapshot_of_a_run_is_the_state_of_its_step(data: Path, tmp_path: Path, more: list[str]) -> None:
    run = training(data, tmp_path / "run", GPU, 20, "--elastic.snapshot-interval=1", *more)
    states: dict[int, dict[str, torch.Tensor]] = {}
    for step in run:
        states[step.number] = {name: tensor.clone() for name, tensor in run.tensors.items()}
        do(run, step)
        assert run.snapshots
        run.snapshots.wait()
        newest = run.snapshots.newest(lambda _: True)
        assert newest
        expected = states[newest.step]  # an earlier step's after a skipped update, with which none is saved
        found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        run.snapshots.load(newest, found)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_memory_that_the_driver_does_not_lock_leaves_no_error_behind() -> None:
    memory = np.zeros(1 << 20, np.uint8)
    unlock = devices.lock_pages(memory, torch.device(GPU))
    with pytest.raises(RuntimeError, match="registered"):
        devices.lock_pages(memory, torch.device(GPU))
    assert torch.ones(10, device=GPU).sum().item() == 10
    unlock()


def test_exact_runs_are_equal_bit_for_bit(data: Path, tmp_path: Path) -> None:
    flags = ["--elastic.exact", "--model.dropout=0.1"]
    first, second = (losses(data, tmp_path / name, GPU, 10, *flags) for name in ("one", "two"))
    assert first == second


def test_a_snapshot_is_what_the_gpu_holds(data: Path, tmp_path: Path) -> None:
    run = training(data, tmp_path / "run", GPU, 9, "--elastic.snapshot-interval=4")
    for step in run:
        if step.number == 8:
            assert run.snapshots is not None
            run.snapshots.wait()
            newest = run.snapshots.newest(lambda _: True)
            assert newest is not None
            assert newest.step == 8
            copies = {name: torch.empty_like(tensor) for name, tensor in run.tensors.items()}
            run.snapshots.load(newest, copies)
            assert all(torch.equal(copies[name], tensor) for name, tensor in run.tensors.items())
        do(run, step)


def test_the_head_of_gpt2_takes_no_memory_for_all_logits() -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=1)).to(GPU)
    tokens = torch.randint(50257, (12, 1024), device=GPU)
    found = []
    for forward in (model, torch.compile(model, dynamic=False, fullgraph=True)):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(GPU, torch.bfloat16):
            loss = forward(tokens, tokens)
        loss.backward()
        # All logits are 1.2 GB in bfloat16, 2.5 GB in float32, and their gradient as much again.
        assert torch.cuda.max_memory_allocated() - before < 3.2e9
        found.append(loss.item() / tokens.numel())
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] == pytest.approx(math.log(50257), rel=0.05)


def test_torch_takes_cudnns_attention_on_hopper_and_flash_attention_elsewhere() -> None:
    q = torch.randn(2, 12, 1024, 64, device=GPU, dtype=torch.bfloat16)
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        pytest.skip("no flash attention on this GPU")
    cudnn = (major, minor) in ((9, 0), (10, 0)) and (torch.backends.cudnn.version() or 0) > 91500
    expected = SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION
    assert SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)) == expected


def test_greedy_tokens_are_the_cpus() -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(65, 64, n_layer=2, n_head=2, n_embd=64)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    request = Request((1, 2, 3), max_new_tokens=50, temperature=0.0)
    expected = list(generate(model, request))
    assert list(generate(model.to(GPU), request)) == expected
