"""world.py on a GPU: who waits for a lost peer on the device is freed of it, or says that it cannot be.

NCCL stands still in the device's queue, so a stand-in does here what torch documents of it: a collective is completed when it
is done or aborted, `_abort_process_group` aborts (or does not return, or raises), and only then the device can be waited for.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from elastic_gpt import Elastic, devices, world
from elastic_gpt.exact import ExactSum
from elastic_gpt.gradients import Gradients
from elastic_gpt.world import PeerLost, World, join, leave
from elastic_gpt.worlds import Step
from tests.conftest import PATIENCE
from tests.elastic.test_gradients import NO_IDS
from tests.elastic.test_run import DATA, model
from tests.elastic.worlds import run_world

NO_GPU = "no GPU here: NCCL itself was never run"


class Sum:
    """A collective that is queued on a device. `ends`: when it is asked for the n-th time whether it has ended; 0: never."""

    def __init__(self, ends: int = 0, error: str = "") -> None:
        self.ends, self.error, self.looks = ends, error, 0
        self.aborted = self.ordered = False

    def is_completed(self) -> bool:
        self.looks += 1
        return self.aborted or 0 < self.ends <= self.looks

    def wait(self) -> None:
        assert self.is_completed(), "the host would stand still"
        if self.error:
            raise RuntimeError(self.error)

    def block_current_stream(self) -> None:
        self.ordered = True


class Nccl:
    """A default group, and the device on which its collectives are queued."""

    def __init__(self) -> None:
        self.queue: list[Sum] = []
        self.ends = 0  # of the next collectives
        self.alive, self.aborts, self.hangs, self.error = True, True, False, ""
        self.lost_device = False
        self.peers: Callable[[], None] = lambda: None  # raises where a peer's connection is closed

    def begin(self, *_: Any, **__: Any) -> Sum:
        self.queue.append(Sum(self.ends))
        return self.queue[-1]

    def abort(self) -> None:
        if self.hangs:
            threading.Event().wait()
        if self.error:
            raise RuntimeError(self.error)
        self.alive = False
        for one in self.queue:
            one.aborted = self.aborts

    def synchronize(self, _device: torch.device) -> None:
        if self.lost_device:
            raise RuntimeError("CUDA error: unspecified launch failure")
        if any(not one.is_completed() for one in self.queue):
            threading.Event().wait()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Nccl:
    group = Nccl()
    monkeypatch.setattr(devices, "queues", lambda _device: True)
    monkeypatch.setattr(dist, "all_reduce", group.begin)
    monkeypatch.setattr(dist, "all_to_all_single", group.begin)
    monkeypatch.setattr(dist, "is_initialized", lambda: group.alive)
    monkeypatch.setattr(dist, "irecv", lambda *_, **__: group.peers())
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", group.abort)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it waits for the device"))
    monkeypatch.setattr(torch.cuda, "synchronize", group.synchronize)
    monkeypatch.setattr(world, "STILL_TIMEOUT", world.STILL_TIMEOUT / 30)
    monkeypatch.setattr(world, "LEAVE_SECONDS", 0.5)
    return group


def of_two(called: Callable[[], bool] = lambda: True, patience: float = PATIENCE) -> World:
    return World(0, 2, 0, "node", torch.device("cpu"), True, called, patience)


def closed() -> None:
    raise RuntimeError("Connection closed by peer")


def lost(here: World) -> PeerLost:
    here.sum(torch.ones(1))
    with pytest.raises(PeerLost) as error:
        here.settle()
    return error.value


def test_a_sum_is_only_queued_and_settled_with_the_last_one(nccl: Nccl) -> None:
    here = of_two(called=lambda: False)
    nccl.ends = 3
    for _ in range(world.QUEUED):
        here.sum(torch.ones(1))
    assert [one.looks for one in nccl.queue] == [0] * world.QUEUED
    here.sum(torch.ones(1))  # so many that the launch of one more could block: the oldest is waited for
    assert [one.looks > 0 for one in nccl.queue] == [True] + [False] * world.QUEUED
    here.settle()
    assert [one.looks > 0 for one in nccl.queue] == [True] + [False] * (world.QUEUED - 1) + [True]
    here.settle()  # nothing is left
    assert not any(one.ordered for one in nccl.queue)  # so a backward pass goes on beside the sums
    here.exchange(torch.ones(2, 1))
    assert nccl.queue[-1].ordered  # but what comes next works on what came
    assert nccl.alive


def test_a_slow_peer_is_waited_for_and_one_that_has_gone_is_not(nccl: Nccl) -> None:
    asked: list[None] = []
    nccl.peers = lambda: asked.append(None)
    nccl.ends = 1000
    here = of_two()
    here.sum(torch.ones(1))
    here.settle()
    assert asked
    assert nccl.alive
    nccl.ends, nccl.peers = 0, closed
    error = lost(of_two())
    assert "Connection closed by peer" in str(error)
    assert (error.noticed_by, error.stuck, error.given_up, nccl.alive) == ("node", False, False, False)


def test_a_peer_that_nobody_calls_lost_is_waited_for_as_long_as_agreed(nccl: Nccl) -> None:
    error = lost(of_two(called=lambda: False, patience=0.05))
    assert "a peer has not answered for 0.05 s" in str(error)
    assert not nccl.alive


def test_what_nccl_itself_reports_is_a_lost_peer(nccl: Nccl) -> None:
    here = of_two(called=lambda: False)
    with pytest.raises(PeerLost, match="remote process exited"):
        here._collective(lambda: cast(Any, Sum(1, "ncclRemoteError: remote process exited")))
    assert not nccl.alive


@pytest.mark.parametrize("way", ["hangs", "raises", "does nothing", "loses the device"])
def test_a_device_that_cannot_be_freed_is_told_in_bounded_time(
    nccl: Nccl, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nccl.peers = closed
    nccl.hangs, nccl.aborts = way == "hangs", way != "does nothing"
    nccl.error = "NCCL error: internal error" if way == "raises" else ""
    nccl.lost_device = way == "loses the device"
    assert lost(of_two()).stuck
    told = {"raises": "NCCL error: internal error", "loses the device": "CUDA error: unspecified launch failure"}
    assert told.get(way, "") in capsys.readouterr().err


def test_connections_that_are_never_made_are_given_up(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL makes them in the first collective, which blocks the host, so a thread does it; it cannot be aborted there."""
    comes = threading.Event()
    monkeypatch.setattr(dist, "all_reduce", lambda *_: comes.wait())
    nccl.peers = closed
    with pytest.raises(PeerLost) as error:
        of_two()._collective(lambda: cast(Any, devices.Connecting(torch.device("cpu"))))
    assert error.value.stuck
    nccl.alive, nccl.peers = True, lambda: None
    comes.set()
    of_two()._collective(lambda: cast(Any, devices.Connecting(torch.device("cpu"))))
    assert nccl.alive


def test_nothing_of_the_state_is_touched_before_the_sum_was_seen_to_end(nccl: Nccl, tmp_path: Path) -> None:
    run = Elastic(tmp_path, *model(), DATA, steps=10, global_batch=16, micro_batch=4)
    run.held.step, here = 5, of_two()
    run.gradients.world = here
    before = {name: tensor.clone() for name, tensor in run.tensors.items()}

    def step() -> Step:
        run.gradients.zero()
        now = Step(run, here, 5, cast(Any, None))
        for index in range(2):
            run.gradients.backward(index, NO_IDS, sum(one.sum() for one in run.model.parameters()))
        now.update()
        return now

    nccl.peers = closed
    this = step()
    assert this.lost
    assert not this.lost.stuck
    assert this.did is None
    assert run.held.step == 5
    assert all(torch.equal(before[name], tensor) for name, tensor in run.tensors.items())
    nccl.alive, nccl.ends = True, 2
    assert step().did  # and the same step in another world is done
    assert run.held.step == 6
    assert any(not torch.equal(before[name], tensor) for name, tensor in run.tensors.items())


def test_an_exact_sum_is_read_only_when_it_was_seen_to_end(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    sizes = {"micro_batches": 2, "global_batch": 2, "tokens": 2}
    gradients, nccl.ends = Gradients([weight], of_two(), exact=True, **sizes), 2
    seen, settle = [], ExactSum.settle

    def look(self: ExactSum, world: World) -> None:
        seen.append(nccl.queue[-1].looks >= nccl.ends)
        settle(self, world)

    monkeypatch.setattr(ExactSum, "settle", look)
    gradients.zero()
    gradients.backward(0, NO_IDS, (weight * 1e6).sum())  # so large that some of it is set aside, and travels by itself
    gradients.reduce(stop=False, leave=False)
    assert seen == [True]
    # The numbers, what the ranks agree on, and what was set aside; they end in their order.
    assert [one.looks >= nccl.ends for one in nccl.queue] == [False, True, True]


def lives_on(here: World) -> tuple[bool, float, int]:
    """Rank 2 dies in the middle of a step; the others leave its world as on a GPU, and join another one in the same process."""
    if here.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    devices.queues = lambda _: True  # in a process of its own
    devices.abort = lambda _: dist.distributed_c10d._abort_process_group()
    devices.Connecting = lambda _: dist.all_reduce(torch.zeros(1), async_op=True)  # type: ignore[assignment,misc]
    store, port = dist.distributed_c10d._get_default_store(), ""
    if here.rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store.set("port", str(free.getsockname()[1]))
    port = store.get("port").decode()
    values, process = torch.ones(1 << 20), os.getpid()
    here.sum(values)
    with pytest.raises(PeerLost) as error:
        here.settle()
    stuck = error.value.stuck
    del error, store  # the last that refers to the group
    assert leave()
    os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": port}
    there, address = join("cpu", PATIENCE), values.data_ptr()
    values.fill_(1.0)
    there.sum(values)
    there.settle()
    return not stuck and process == os.getpid() and values.data_ptr() == address, float(values.mean()), there.size


def test_survivors_go_on_together_in_the_processes_that_they_had() -> None:
    assert run_world(3, lives_on, dies={2}) == [(True, 2.0, 2)] * 2


def test_torch_is_told_to_leave_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchelastic sets it: a lost peer ends the process
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert devices.backend(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"
    assert devices.queues(torch.device("cuda"))
    assert not devices.queues(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_a_gpus_group_is_aborted_and_another_one_made_with_the_same_tensors() -> None:
    """One GPU is enough for a group of one. NCCL refuses two ranks on one GPU, so a peer that dies needs two."""
    device = devices.pick("cuda")
    values, seen = torch.ones(1 << 20, device=device), set()
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        store = dist.TCPStore("127.0.0.1", port, 1, True)
        dist.init_process_group(devices.backend(device), store=store, rank=0, world_size=1)
        alone = World(0, 2, 0, "node", device, True, patience=PATIENCE)
        alone._collective(lambda: cast(Any, devices.Connecting(device)), device)
        torch.cuda._sleep(1 << 24)  # the sum stands behind it
        alone.sum(values)
        alone.settle()
        alone.sum(values)
        assert leave(device)
        assert float(values.mean()) == 1.0
        assert not dist.is_initialized()
        seen.add((os.getpid(), values.data_ptr()))
    assert len(seen) == 1
