"""world.py: joining, leaving, and signals."""

import contextlib
import datetime
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from elastic_gpt import world
from elastic_gpt.contract import FAILED, USERS_MISTAKE
from elastic_gpt.nodes.mend import CRASH_SECONDS, Crashes
from elastic_gpt.world import NotJoined, PeerLost, Signals, World, _listens, join, leave
from prepare.frontdoor import fail
from tests.conftest import PATIENCE, TINY, environment, until
from tests.elastic.worlds import run_world


def collectives(world: World) -> tuple[list[float], list[int], list[float]]:
    summed = torch.tensor([float(world.rank)])
    world.sum(summed)
    sent = torch.full((2,), float(world.rank))
    world.broadcast([sent], source=1)
    return summed.tolist(), world.gather(world.rank), sent.tolist()


def slow_work(world: World, fail: bool) -> tuple[str, list[int]] | str:
    """Work that is not over before the ranks have met three times; and what each rank told meanwhile."""
    met = threading.Semaphore(0)
    gather = World.gather

    def counted(world: World, value: Any) -> list[Any]:
        values = gather(world, value)
        met.release()
        return values

    def work() -> str:
        for _ in range(3):
            assert met.acquire(timeout=PATIENCE), "the ranks do not keep in touch"
        if fail:
            raise ValueError(f"of rank {world.rank}")
        return f"done by {world.rank}"

    World.gather = counted  # type: ignore[method-assign]  # in a process of its own
    try:
        return world.first_does_beside(work, 10 * world.rank)
    except ValueError as error:
        return str(error)


def fails_for(world: World, number: int) -> int:
    """The exit code of a rank when rank 0's work fails for an error of the system."""

    def work() -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("cannot write run directory run") from error

    try:
        world.first_does(work)
    except ValueError as error:
        return fail(error)
    raise AssertionError


def test_what_an_error_came_from_reaches_all_ranks_so_that_a_passing_one_is_no_users_mistake() -> None:
    assert run_world(2, fails_for, errno.ESTALE) == [FAILED] * 2
    assert run_world(2, fails_for, errno.EACCES) == [USERS_MISTAKE] * 2


def test_the_ranks_keep_in_touch_while_one_works_and_its_error_reaches_all() -> None:
    assert run_world(3, slow_work, False) == [("done by 0", [0, 10, 20])] * 3
    assert run_world(3, slow_work, True) == ["of rank 0"] * 3


def test_sums_gathers_and_broadcasts_reach_every_rank() -> None:
    assert run_world(3, collectives) == [([3.0], [0, 1, 2], [1.0, 1.0])] * 3


def dies_in_a_message(world: World) -> tuple[bool, str, bool, float]:
    """Rank 0 is killed as soon as the beginning of what it sends has come. Returns what rank 1 has seen."""
    sender, _ = world.gather(os.getpid())
    broadcast, came = torch.distributed.broadcast, list[torch.Tensor]()

    def watched(flat: torch.Tensor, source: int, async_op: bool) -> torch.distributed.Work | None:
        came.append(flat)
        return broadcast(flat, source, async_op=async_op)

    def kill() -> None:
        until(lambda: came)
        while not came[0][0]:
            pass
        os.kill(sender, signal.SIGKILL)

    torch.distributed.broadcast = watched  # in a process of its own
    if world.rank == 1:
        threading.Thread(target=kill, daemon=True).start()
    object.__setattr__(world, "called", lambda: True)
    try:
        world.broadcast([torch.full((16 << 20,), float(world.rank == 0))], source=0)
    except PeerLost as error:
        lost = f"{error}, given up: {error.given_up}"
    else:
        lost = "whole"
    left = leave()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.TCPStore("127.0.0.1", port, 1, True), rank=0, world_size=1
    )
    alone = torch.ones(1)
    torch.distributed.all_reduce(alone)
    return bool(came[0][-1]), lost, left, float(alone)


def test_a_peer_that_dies_in_the_middle_of_a_message_is_lost_and_its_world_can_be_left() -> None:
    """gloo alone waits for the rest of the message until the collective's time is over, and tells that then."""
    for _ in range(10):
        [(whole, lost, left, alone)] = run_world(2, dies_in_a_message, dies={0})
        if not whole:  # else the machine was busy when the sender was to be killed
            break
    assert "rank 1 of 2 lost a peer" in lost
    assert lost.endswith("given up: True")
    assert "losed by peer" in lost or "reset" in lost
    assert (left, alone) == (True, 1.0)


class Late:
    """A collective that ends just after the time of a wait for it was over."""

    def __init__(self, error: str = "") -> None:
        self.error, self.waits = error, 0

    def is_completed(self) -> bool:
        return self.waits > 0

    def wait(self, _timeout: datetime.timedelta | None = None) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)


def test_a_sum_that_ends_just_after_a_look_is_done_and_one_that_fails_then_says_why() -> None:
    world = World(0, 2, 0, "node", torch.device("cpu"), elastic=True)
    world._collective(lambda: cast(Any, Late()))
    with pytest.raises(PeerLost, match="Connection closed by peer"):
        world._collective(lambda: cast(Any, Late("Connection closed by peer")))


def meets_a_slow_peer(world: World) -> list[float]:
    """Two ranks wait for the third in a collective, and look again and again whether it is there."""
    looks = threading.Semaphore(0)
    object.__setattr__(world, "called", lambda: looks.release() or True)
    store = torch.distributed.distributed_c10d._get_default_store()
    if world.rank == 2:
        until(lambda: store.add("looks", 0) == 2)
    else:
        threading.Thread(
            target=lambda: [looks.acquire() for _ in range(3)] and store.add("looks", 1), daemon=True
        ).start()
    found = []
    for number in range(3):
        values = torch.full((1 << 18,), float(world.rank + number))
        world.sum(values)
        found.append(float(values.mean()))
        rows = torch.arange(3.0)[:, None].repeat(1, 1 << 10)
        assert world.exchange(rows).eq(world.rank).all()
    return found


def test_a_slow_peer_is_waited_for_when_the_members_change() -> None:
    assert run_world(3, meets_a_slow_peer) == [[3.0, 6.0, 9.0]] * 3


def test_a_world_that_cannot_be_formed_is_told_and_not_tried_without_end(data: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = ["train", "debug_cpu", *TINY, f"--data.dir={data}", f"--run-dir={tmp_path / 'run'}"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "elastic_gpt.cli", *command],
            env=environment(**place, RANK=str(rank), GLOO_SOCKET_IFNAME="nonesuch", TORCHELASTIC_RUN_ID="job"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]  # which an agent tries again a few times only
    for number, text in enumerate(told):
        assert f"\nwarning: rank {number} of 2 could not join its peers: " in f"\n{text}"


def test_a_node_that_crashes_again_and_again_ends_and_lost_peers_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    crashes = Crashes()
    assert not any(crashes.too_many({3}) or crashes.too_many({-9}) for _ in range(100))
    assert [crashes.too_many({1}) for _ in range(3)] == [False, False, True]
    now += CRASH_SECONDS + 1
    assert not crashes.too_many({1, 3})  # the others were long ago


@pytest.mark.parametrize(
    ("agent", "number", "leaves"),
    [
        (True, signal.SIGTERM, False),
        (True, signal.SIGUSR1, True),
        (True, signal.SIGHUP, True),
        (True, signal.SIGINT, True),
        (False, signal.SIGTERM, True),
        (False, signal.SIGINT, True),
    ],
)
def test_an_agents_sigterm_is_a_stop_and_all_else_may_be_leaving_for_good(
    monkeypatch: pytest.MonkeyPatch, agent: bool, number: signal.Signals, leaves: bool
) -> None:
    monkeypatch.delenv("DLROVER_MASTER_ADDR", raising=False)
    if agent:
        monkeypatch.setenv("DLROVER_MASTER_ADDR", "127.0.0.1:1")
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    try:
        signals = Signals()
        assert not signals.stop
        assert signals.waited == 0.0
        os.kill(os.getpid(), number)
        assert (signals.stop, signals.leave) == (True, leaves)
        assert signals.released == (number == signal.SIGUSR1 or not agent)
        time.sleep(0.02)
        assert 0.02 <= signals.waited < PATIENCE  # the grace time runs from the first signal on
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def test_a_rank_that_comes_before_rank_0_makes_no_client_which_would_look_again_only_much_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, clients = iter(range(1000)), list[object]()
    monkeypatch.setattr(world.dist, "TCPStore", lambda *args, **_: clients.append(args))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        with pytest.raises(PeerLost):  # called away while it looks
            world._meet(1, 2, PATIENCE, lambda: next(looks) == 3)
    assert clients == []


def test_a_process_whose_world_could_not_be_formed_can_be_in_the_next_one() -> None:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(2)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in listeners]
    assert run_world(2, joins_the_second, ports) == [[0, 1]] * 2


def joins_the_second(world: World, ports: list[int]) -> list[int]:
    leave()
    os.environ["MASTER_PORT"] = str(ports[0])
    if world.rank == 0:
        with pytest.raises(NotJoined, match="could not join its peers"):
            join("cpu", 1.0)
    else:  # it comes to the store of the first, and is gone when the group is made
        until(lambda: _listens(("127.0.0.1", ports[0])))
        store = torch.distributed.TCPStore("127.0.0.1", ports[0], 2, False, wait_for_workers=False)
        store.add("there", 1)
    os.environ["MASTER_PORT"] = str(ports[1])
    return join("cpu", PATIENCE).gather(world.rank)
