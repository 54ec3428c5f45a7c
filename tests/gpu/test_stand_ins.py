"""A training step as a GPU does it, on the CPU: nobody waits for the device, nothing is compiled twice."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from elastic_gpt import Elastic, devices, exact, reports
from elastic_gpt import batches as batches_room
from elastic_gpt.batches import Batches
from elastic_gpt.order import Order
from elastic_gpt.world import World
from elastic_gpt.worlds import Worlds
from model_zoo.nanogpt import train
from tests.gpu.host_waits import host_waits
from tests.gpu.late_copies import keep_snapshots

STEPS = 7
TOLIST = torch.Tensor.tolist  # which host_waits replaces


@pytest.fixture
def gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is used as a GPU is."""
    keep_snapshots(monkeypatch)
    monkeypatch.setattr("model_zoo.nanogpt.startup.is_host", lambda _: False)
    monkeypatch.setattr(exact, "is_host", lambda _: False)
    for room in ("cross_entropy", "model"):
        monkeypatch.setattr(f"model_zoo.nanogpt.{room}.on_host", lambda _: False)


def training(data: Path, run: Path, *more: str) -> train.Training:
    flags = ["--global-batch=8", "--micro-batch=2", "--model.block-size=32", "--model.n-layer=1", "--model.n-embd=32"]
    flags += [
        "--device=cpu",
        "--observe.tensorboard=false",
        f"--steps={STEPS}",
        f"--data.dir={data}",
        f"--run-dir={run}",
    ]
    return train.Training(*train.check(["debug_cpu", *flags, *more]))


@pytest.mark.usefixtures("gpus_way")
@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype=bfloat16"],
        ["--dtype=float16", "--model.dropout=0.1"],
        ["--dtype=bfloat16", "--elastic.exact", "--model.dropout=0.1"],
        ["--dtype=float32", "--optimizer.clip=0", "--model.positions=rotary", "--model.norm=rms"],
    ],
)
def test_the_host_waits_for_no_step_but_the_one_before(
    data: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, read = [0], []

    def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
        of, numbers = begun[0], TOLIST(values)

        def wait() -> list[float]:
            read.append((of, begun[0]))
            return numbers

        return wait

    monkeypatch.setattr(reports, "to_host", to_host)
    found = []
    run = training(data, tmp_path / "run", "--elastic.snapshot-interval=4", "--evaluate.interval=100", *flags)
    steps = iter(run)
    step = next(steps)
    while step.number < STEPS - 1:
        begun[0] += 1
        # All that happens from the beginning of a step to that of the next one. A step after which the state is saved waits.
        with host_waits() as waits:
            for tokens, targets in step:
                step.backward(run.loss_sum(tokens, targets))
            step.update(1e-3)
            saved = (step.number + 1) % 4 == 0
            step = next(steps)
        found += [] if saved else waits.found
    # In exact mode a micro-batch is searched for large numbers: two answers, and a third if there are any. So is their sum.
    searches = [
        wait for wait in found if any(f" in {place}:" in wait for place in ("_any_large", "_set_aside", "settle"))
    ]
    assert found == searches
    assert len(searches) <= ("--elastic.exact" in flags) * STEPS * (3 * 4 + 1)
    # Of seven steps the last two are still on their way; the fourth was waited for, since a snapshot followed it.
    assert read == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6)]


def clones(run: Worlds) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.tensors.items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # float16's scale is a part of the state
def test_a_snapshot_is_the_state_of_its_step_though_the_copy_is_made_beside_the_next(
    data: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, states = keep_snapshots(monkeypatch), {}
    run = training(data, tmp_path / "run", "--elastic.snapshot-interval=1", "--dtype=" + dtype)
    for step in run:
        states[step.number] = clones(run)
        for tokens, targets in step:
            step.backward(run.loss_sum(tokens, targets))
        step.update(1e-3)
    assert sorted(kept) == list(range(STEPS + 1))  # the last one is of the end of the life, or of its interval
    assert all(equal(kept[step], state) for step, state in states.items())


class Counts(torch.nn.Module):
    """Counts its forward passes, in a buffer."""

    passes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return x @ self.weight


def own(run: Path) -> Elastic:
    model = Counts()
    examples = torch.utils.data.TensorDataset(torch.ones(16, 2), torch.ones(16))
    sizes = {"steps": 3, "global_batch": 4, "micro_batch": 2, "snapshot_interval": 1}
    return Elastic(run, model, torch.optim.SGD(model.parameters(), lr=0.1), examples, device="cpu", **sizes)


def test_what_a_forward_pass_changes_is_in_the_snapshot_as_it_was_before_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, run = keep_snapshots(monkeypatch), own(tmp_path)
    for step in run:
        for inputs, wanted in step:
            step.backward(((run.model(inputs) - wanted) ** 2).sum())
        step.update()
    assert {step: one["model.passes"].item() for step, one in kept.items()} == {0: 0, 1: 2, 2: 4, 3: 6}


def test_who_leaves_the_loop_may_change_the_state_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, run = keep_snapshots(monkeypatch), own(tmp_path)
    steps = iter(run)
    next(steps)
    steps.close()  # type: ignore[attr-defined]  # as a for loop does that is left
    with torch.no_grad():
        run.model.weight.fill_(7.0)
    assert run.snapshots
    run.snapshots.wait()
    assert kept[0]["model.weight"].tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("gpus_way")
def test_exact_mode_has_only_operations_that_repeat_their_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def repeat_bits(device: torch.device) -> None:
        asked.append(device)
        torch.use_deterministic_algorithms(True)

    monkeypatch.setattr(devices, "repeat_bits", repeat_bits)
    try:
        training(data, tmp_path / "inexact")
        assert asked == []
        run = training(data, tmp_path / "run", "--elastic.exact", "--dtype=bfloat16", "--model.dropout=0.1")
        for step in run:  # an operation that torch knows no such kernel for raises
            for tokens, targets in step:
                step.backward(run.loss_sum(tokens, targets))
            step.update(1e-3)
        assert asked == [torch.device("cpu")]
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_exact_sum_asks_a_gpu_once_where_its_large_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is waited for, and in an untrained model a micro-batch has large numbers nearly everywhere."""
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 0.01
    sums = []
    for on_host in (True, False):
        monkeypatch.setattr(exact, "is_host", lambda _, there=on_host: there)
        gradient, blocks = values.clone(), torch.zeros(-(-len(values) // exact.BLOCK))
        summed = exact.ExactSum(gradient, blocks, 8)
        with host_waits() as waits:
            summed.count()
        assert blocks.sum() > 10
        assert on_host or len(waits.found) == 3  # the least, the greatest, and which are beyond what fits
        summed.close(slice(0, len(gradient)))
        summed.settle(World(0, 1, 0, "", torch.device("cpu"), False))
        sums.append(gradient)
    assert torch.equal(*sums)


def test_the_stand_in_sees_what_would_wait() -> None:
    x = torch.arange(4.0)
    with host_waits() as waits:
        x.fill_(1.0)
        x.add_(x.sum()).isfinite().all().float()
        x.to("cpu", non_blocking=True)
        assert waits.found == []
        for wait in (x.sum().item, lambda: bool(x[0] > 0), x.tolist, x.cpu, x.nonzero, lambda: x.to("cpu"), x.numpy):
            wait()
        x[0] = 2.0
        torch.tensor([1.0])
    assert len(waits.found) == 9


@pytest.mark.usefixtures("gpus_way")
@pytest.mark.parametrize("flags", [[], ["--model.dropout=0.1", "--dtype=bfloat16"]])
def test_a_whole_run_compiles_one_graph_for_training_and_one_for_evaluation(
    data: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    # Three micro-batches a step, evaluations of 25 sequences in 12 of two (and none of one).
    more = ["--compile", "--evaluate.interval=3", "--evaluate.sequences=25", "--global-batch=6", *flags]
    run = training(data, tmp_path / "run", *more)
    graphs = []
    for step in run:
        for tokens, targets in step:
            step.backward(run.loss_sum(tokens, targets))
        step.update(1e-3)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 2, 2, 2, 2]
    assert counter.frame_count == 2


def test_batches_are_pinned_a_step_ahead_copied_without_waiting_and_never_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.Tensor] = []

    def pinned(values: torch.Tensor, _device: torch.device) -> torch.Tensor:
        asked.append(values.clone())  # a block of its own, as pin_memory gives
        return asked[-1]

    monkeypatch.setattr(batches_room, "pinned", pinned)
    copies: list[tuple[torch.Tensor, bool]] = []
    to = torch.Tensor.to

    def moved(self: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        copies.append((self, non_blocking))  # a copy that takes its time: it reads this memory later
        return to(self, device)

    tokens, world = np.arange(2000, dtype=np.uint16), World(0, 1, 0, "single", torch.device("cpu"), elastic=False)
    batches = Batches(tokens, 8, 2, Order(200, 6, seed=1), world)
    expected = []
    for step in range(4):
        for _, *tensors in batches.step(step):
            expected += [tensor.clone() for tensor in tensors]
        batches.ahead[1].result()  # type: ignore[index]
        assert len(asked) == 9 * (step + 2)  # three tensors of three micro-batches, a step ahead
    batches = Batches(tokens, 8, 2, Order(200, 6, seed=1), world)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    for step in range(4):
        for _ in batches.step(step):
            pass
    batches.ahead[1].result()  # type: ignore[index]
    assert all(non_blocking for _, non_blocking in copies)
    for (source, _), values in zip(copies, expected, strict=True):
        assert any(source is one for one in asked)
        assert torch.equal(source, values)  # still, though later steps have been loaded
    assert len({source.data_ptr() for source, _ in copies}) == len(copies)
