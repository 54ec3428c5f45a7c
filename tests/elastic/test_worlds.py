"""worlds.py: who is asked to leave saves what nobody else has, and observers hear of everything in its order."""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from elastic_gpt import Elastic, Observer, checkpoint, world, worlds
from elastic_gpt.checkpoint import Checkpoints, save_tensors
from elastic_gpt.contract import DONE, NO_WORLD, RESTART_ME, WORLDS, Progress
from elastic_gpt.gradients import Gradients, StepSums
from elastic_gpt.identity import Run
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.mirror import Mirror, mirror_of
from elastic_gpt.nodes.workers import Workers
from elastic_gpt.reports import StepReport
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import PeerLost, World
from elastic_gpt.worlds import MOST_NOT_JOINED
from tests.conftest import PATIENCE, until
from tests.elastic.test_run import DATA, linux, model, train


class Kept(Observer):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_step(self, report: StepReport) -> None:
        self.heard.append(str(report.step))

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.heard.append(event["event"])


def agent_of_this_process(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """The agent's side of this process, which is its worker 0."""
    name = f"test-{secrets.token_hex(8)}"
    for variable in ("DLROVER_MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(variable, "none")
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # a world changes them
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv(WORLDS, name)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(world, "die_with_parent", lambda _: None)  # the test's process is to outlive whoever started it
    return Workers(name)


ALONE_WORLD = {"RANK": "0", "WORLD_SIZE": "1"}


@linux
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("often", [False, True])
def test_a_worker_whose_world_cannot_be_formed_keeps_its_state_until_that_was_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], often: bool, trained: bool
) -> None:
    monkeypatch.setattr(worlds, "NETWORK_SECONDS", 0.01)
    workers, heard, given = agent_of_this_process(monkeypatch), Kept(), []
    failures = MOST_NOT_JOINED if often else 2

    def agent() -> None:
        if trained:
            until(lambda: workers.waiting() == {0})
            workers.give({0: ALONE_WORLD})
            until(lambda: "9" in heard.heard)
            workers.call()
        for _ in range(failures):
            until(lambda: workers.waiting() == {0})
            given.append(len(heard.heard))
            # A rank 0 whose peer never comes; nobody listens where another rank looks for it.
            workers.give({0: {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}})
        if often:
            return
        until(lambda: workers.waiting() == {0})
        workers.give({0: ALONE_WORLD})
        until(lambda: len(heard.heard) > given[-1] + 3)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=agent, daemon=True).start()
    sizes = {"global_batch": 16, "micro_batch": 4, "checkpoint_interval": 10**9, "timeout_seconds": 0.2}
    with pytest.raises(SystemExit) as end:
        train(Elastic(tmp_path, *model(), DATA, steps=10**9, observers=[heard], **sizes))
    assert end.value.code == (NO_WORLD if often else DONE)
    assert not (often and workers.waiting())  # else another world would be given to one that ends
    if trained and often:  # its node ends, and so does shared memory
        assert Checkpoints(tmp_path / "checkpoints").newest_step() == len(read_metrics(tmp_path))
    assert len(given) == failures
    assert ("GLOO_SOCKET_IFNAME" in capsys.readouterr().err) == often
    joined = [event for event in Ledger(tmp_path).events() if event["event"] == "joined"]
    restored = [event for event in Ledger(tmp_path).events() if event["event"] == "restored"]
    assert len(joined) == trained + (not often)
    if trained and not often:
        assert joined[1]["stayed"]
        assert restored[1]["dropped"] == 0
        assert restored[1]["step"] >= 9


@linux
def test_a_worker_is_warm_before_anybody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers, waiting = agent_of_this_process(monkeypatch), []

    class Warm(Elastic):
        def warm_up(self) -> None:
            time.sleep(0.2)  # in which the agent would have heard
            waiting.append(workers.waiting())

    def agent() -> None:
        until(lambda: workers.waiting() == {0})
        workers.give({0: ALONE_WORLD})

    threading.Thread(target=agent, daemon=True).start()
    sizes = {"global_batch": 16, "micro_batch": 4}
    assert train(Warm(tmp_path, *model(), DATA, steps=2, **sizes)) == [0, 1]
    assert waiting == [set()]


@linux
def test_a_world_that_a_worker_was_called_away_from_does_not_count_as_one_that_could_not_be_formed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, heard = agent_of_this_process(monkeypatch), Kept()
    monkeypatch.setattr(worlds, "MOST_NOT_JOINED", 2)
    alone_of_two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

    def agent() -> None:
        until(lambda: workers.waiting() == {0})
        workers.give({0: ALONE_WORLD})
        until(lambda: "9" in heard.heard)
        workers.call()
        for called in (False, True, True):  # the first waits for its peer in vain
            until(lambda: workers.waiting() == {0})
            workers.give({0: alone_of_two})
            if called:
                workers.call()
        until(lambda: workers.waiting() == {0})
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=agent, daemon=True).start()
    sizes = {"global_batch": 16, "micro_batch": 4, "checkpoint_interval": 10**9, "timeout_seconds": 2.0}
    with pytest.raises(SystemExit) as end:
        train(Elastic(tmp_path, *model(), DATA, steps=10**9, observers=[heard], **sizes))
    assert end.value.code != NO_WORLD


def test_what_was_saved_in_a_life_that_was_never_written_down_is_saved_anew_and_in_its_place(tmp_path: Path) -> None:
    """The ranks save as soon as they have restored, and rank 0 may die before it has written that the life began."""
    run = Elastic(tmp_path, *model(), DATA, steps=10, global_batch=16, micro_batch=4)

    def begins(life: str, *before: str) -> Snapshots:
        lives = {name: number for number, name in enumerate(before)}
        where = World(0, 1, 0, "a", torch.device("cpu"), True)
        run.snapshots = run._open_snapshots(Run(secret, len(before), [], name=life, lives=lives), where)
        assert run.snapshots
        return run.snapshots

    secret = secrets.token_hex(6)
    begins("first").save(5, 0, run.tensors, [])
    begins("never", "first").save(7, 1, run.tensors, [])
    snapshots = begins("second", "first")
    assert snapshots.step != 7
    snapshots.save(7, 1, run.tensors, [])
    assert begins("third", "first", "second").step == 7
    snapshots.wait()
    newest = {name: snapshots.newest(lambda one, name=name: one.name == name) for name in ("first", "never", "second")}
    assert {name: one and one.step for name, one in newest.items()} == {"first": 5, "never": None, "second": 7}
    snapshots.discard()


@linux
@pytest.mark.parametrize("change", ["in order", "a peer is lost"])
def test_a_checkpoint_on_its_way_holds_up_no_change_of_worlds_and_goes_on_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    written, reduce, left = threading.Event(), Gradients.reduce, []

    def slow(*args: Any) -> None:
        assert written.wait(PATIENCE)
        save_tensors(*args)

    def loses(gradients: Gradients, stop: bool, leave: bool) -> StepSums:
        if "5" in heard.heard and not left:
            left.append(True)
            raise PeerLost("a peer has gone")
        return reduce(gradients, stop, leave)

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    if change == "a peer is lost":
        monkeypatch.setattr(Gradients, "reduce", loses)
    workers, heard = agent_of_this_process(monkeypatch), Kept()

    def agent() -> None:
        until(lambda: workers.waiting() == {0})
        workers.give({0: ALONE_WORLD})
        until(lambda: "5" in heard.heard)
        if change == "in order":
            workers.call()
        until(lambda: workers.waiting() == {0})
        done = len(heard.heard)
        workers.give({0: ALONE_WORLD})
        until(lambda: len(heard.heard) > done + 3)
        written.set()
        until(lambda: any(event["event"] == "saved" for event in Ledger(tmp_path).events()))
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=agent, daemon=True).start()
    sizes = {"global_batch": 16, "micro_batch": 4, "checkpoint_interval": 5, "checkpoint_keep": 9}
    with pytest.raises(SystemExit):
        train(Elastic(tmp_path, *model(), DATA, steps=10**9, observers=[heard], **sizes))
    events = Ledger(tmp_path).events()
    lives = [event["name"] for event in events if event["event"] == "joined"]
    assert next(event["step"] for event in events if event["event"] == "saved") == 5
    manifest = json.loads((tmp_path / "checkpoints" / "step_00000005" / "MANIFEST.json").read_text())
    assert manifest["life"] == lives[0]
    assert len(lives) == 2


def test_a_checkpoint_on_its_way_is_saved_to_its_end_before_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any) -> None:
        time.sleep(0.5)
        save_tensors(*args)

    class Fails(Observer):
        def on_step(self, report: StepReport) -> None:
            if report.step == 5:
                raise PeerLost("in the next step")

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    monkeypatch.setattr(os, "_exit", sys.exit)
    sizes = {"global_batch": 16, "micro_batch": 4, "checkpoint_interval": 4}
    with pytest.raises(SystemExit):
        train(Elastic(tmp_path, *model(), DATA, steps=10**9, observers=[Fails()], **sizes))
    assert Checkpoints(tmp_path / "checkpoints").newest_step() == 4
    assert [event["step"] for event in Ledger(tmp_path).events() if event["event"] == "saved"] == [4]


@linux
@pytest.mark.parametrize(
    "asked",
    ["in order", "after a world that lost a peer", "after a world that lost a peer in its first step", "at the end"],
)
def test_a_worker_that_is_asked_to_leave_between_two_worlds_saves_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    lost = asked.startswith("after")
    workers, heard = agent_of_this_process(monkeypatch), Kept()

    def agent() -> None:
        until(lambda: workers.waiting() == {0})
        workers.give({0: {"RANK": "0", "WORLD_SIZE": "1"}})
        until(lambda: "9" in heard.heard)
        workers.call()  # as for a node that comes or goes: nobody has asked this one to leave
        if asked == "at the end":
            return
        until(lambda: workers.waiting() == {0})
        if lost:
            if asked.endswith("first step"):  # this life is in the ledger already
                monkeypatch.setattr(Gradients, "reduce", loses_a_peer)
            else:
                monkeypatch.setattr(worlds, "restore", loses_a_peer)
            workers.give({0: {"RANK": "0", "WORLD_SIZE": "1"}})
            until(lambda: bool(losses) and workers.waiting() == {0})
        os.kill(os.getpid(), signal.SIGUSR1)

    losses: list[PeerLost] = []

    class Late(Observer):
        """Asks the node to leave when those who leave have been counted."""

        def on_event(self, event: Mapping[str, Any]) -> None:
            if event["event"] == "interrupted":
                os.kill(os.getpid(), signal.SIGUSR1)

    observers = [heard, Late()] if asked == "at the end" else [heard]

    def loses_a_peer(*_: object) -> None:
        losses.append(PeerLost("a peer has gone"))
        raise losses[-1]

    threading.Thread(target=agent, daemon=True).start()
    sizes = {"global_batch": 16, "micro_batch": 4, "checkpoint_interval": 10**9}
    with pytest.raises(SystemExit):
        train(Elastic(tmp_path, *model(), DATA, steps=10**9, observers=observers, **sizes))
    assert bool(losses) == lost
    step, ledger = len(read_metrics(tmp_path)), Ledger(tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").newest_step() == step
    manifest = json.loads((tmp_path / "checkpoints" / Checkpoints.name(step) / "MANIFEST.json").read_text())
    assert manifest["life"] in [event["name"] for event in ledger.events() if event["event"] == "joined"]
    assert [(event["event"], event["step"]) for event in ledger.events()[-2:]] == [("saved", step), ("left", step)]


def test_a_save_that_takes_longer_than_the_grace_is_still_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any) -> None:
        time.sleep(0.5)
        save_tensors(*args)

    class Stops(Observer):
        def on_step(self, report: StepReport) -> None:
            if report.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    monkeypatch.setattr(os, "_exit", sys.exit)  # how an unforeseen error would end the process of all tests
    sizes = {"global_batch": 16, "micro_batch": 4, "grace_seconds": 0.1}
    with pytest.raises(SystemExit) as end:
        train(Elastic(tmp_path, *model(), DATA, steps=10**9, observers=[Stops()], **sizes))
    assert end.value.code == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints").newest_step() == len(read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("rank", "others", "told"),
    [
        (0, "gone", ["saved", "left"]),
        (1, "gone", ["saved", "left"]),
        (1, "saving", ["left"]),
        (1, "training on", []),
    ],
)
def test_of_nodes_that_leave_with_one_state_one_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, others: str, told: list[str]
) -> None:
    monkeypatch.setattr("elastic_gpt.worlds.STALLED_SECONDS", PATIENCE)  # however slow this machine is
    run = Elastic(tmp_path, *model(), DATA, steps=10, global_batch=16, micro_batch=4, grace_seconds=3.0)
    for life in range(2 if others == "training on" else 1):
        run.ledger.begin_life(["a", "b"], 2, 0, "start", 0, f"life {life}")
    known, place = Run("run", 0, [], name="life 0"), tmp_path / "checkpoints"
    run.last, run.checkpoints = (World(rank, 2, 0, "ab"[rank], torch.device("cpu"), True), known), Checkpoints(place)
    run.held.step, run.held.life = 5, 0
    run.signals._asked(signal.SIGUSR1, None)
    before, first = len(run.ledger.events()), Checkpoints(place, run=known)

    def save() -> None:
        """As rank 0 does: its files grow until long after the other's turn has come."""
        for size in range(6):
            (place / "step_00000005").mkdir(parents=True, exist_ok=True)
            (place / "step_00000005" / "model.safetensors.0.partial").write_bytes(bytes(size))
            time.sleep(0.5)
        first.save(5, run.tensors, [])
        assert first.finished(wait=True) == 5

    writer = threading.Thread(target=save)
    if others == "saving":
        writer.start()
    run.part()
    assert [event["event"] for event in run.ledger.events()[before:]] == told
    assert Checkpoints(place, run=known).newest_step() == (5 if told else None)
    if others == "saving":
        writer.join()


@pytest.mark.parametrize("harm", ["a full disk", "another run's checkpoints", "no storage"])
def test_a_node_that_leaves_and_cannot_save_says_so_and_is_not_taken_for_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    run = Elastic(tmp_path, *model(), DATA, steps=10, global_batch=16, micro_batch=4)
    run.ledger.begin_life(["a"], 1, 0, "start", 0, "life 0")
    checkpoints = Checkpoints(tmp_path / "checkpoints", run=Run("run", 0, [], name="life 0"))
    run.last, run.checkpoints = (
        (World(0, 1, 0, "a", torch.device("cpu"), True), Run("run", 0, [], name="life 0")),
        checkpoints,
    )
    run.held.step, run.held.life = 5, 0
    run.signals._asked(signal.SIGUSR1, None)
    if harm == "a full disk":
        monkeypatch.setattr(checkpoint, "save_tensors", Mock(side_effect=OSError("No space left on device")))
    elif harm == "no storage":
        monkeypatch.setattr(checkpoints.storage, "manifests", Mock(side_effect=Unreachable("it does not answer")))
    else:
        other = Checkpoints(tmp_path / "checkpoints", run=Run("other", 0, [], name="life 7"))
        other.save(7, run.tensors, [])
        assert other.finished(wait=True) == 7
    before = len(run.ledger.events())
    run.part()  # its exit code stays what it was
    told = [event["event"] for event in run.ledger.events()[before:]]
    assert told == (["save_failed"] if harm == "a full disk" else [])
    assert "warning: this node leaves, and step 5 is not saved: " in capsys.readouterr().err
    assert run.stored == -1


def test_a_node_whose_snapshots_others_have_deleted_keeps_new_ones(tmp_path: Path) -> None:
    run, here = Elastic(tmp_path / "run", *model(), DATA, steps=10, global_batch=16, micro_batch=4), Run("run", 0, [])
    world = World(0, 1, 0, f"node-{secrets.token_hex(4)}", torch.device("cpu"), True)
    first = run._open_snapshots(here, world)
    assert first
    run.snapshots = first
    assert run._open_snapshots(here, world) is first
    Snapshots(first.run, "another", "run", run.tensors).drop_others(["another"])  # of a world without this node
    second = run._open_snapshots(here, world)
    assert second
    second.save(5, 0, run.tensors, [])
    second.wait()
    newest = second.newest(lambda _: True)
    assert newest
    assert newest.step == 5
    second.discard()


def test_who_leaves_after_its_life_is_no_longer_the_writer_of_a_run_directory_on_a_store(url: str) -> None:
    run = Elastic(url, *model(), DATA, steps=10, global_batch=16, micro_batch=4)
    mine = mirror_of(run.plan.run_dir)
    assert mine
    mine.begin_writing("life 0")
    run.ledger.begin_life(["a", "b"], 2, 0, "start", 0, "life 0")
    run.last = World(0, 2, 0, "a", torch.device("cpu"), True), Run("run", 0, [], name="life 0")
    run.checkpoints = Checkpoints(f"{url}/checkpoints")
    run.held.step, run.held.life = 5, 0
    run.signals._asked(signal.SIGUSR1, None)
    other = Mirror(url)  # the others have gone on, and another worker is the writer
    other.reopen()
    other.begin_writing("life 1")
    Ledger(other.folder).begin_life(["b"], 1, 5, "worker of node b", 0, "life 1")
    run.part()
    assert not mine.writes
    other.reopen()
    names = [event["name"] for event in Ledger(other.folder).events() if event["event"] == "joined"]
    assert names == ["life 0", "life 1"]


def test_an_observer_hears_of_checkpoints_and_skipped_updates_in_their_order(tmp_path: Path) -> None:
    kept = Kept()
    plan = {"steps": 3, "global_batch": 16, "micro_batch": 16, "checkpoint_interval": 1, "observers": [kept]}
    run = Elastic(tmp_path, *model(), DATA, **plan)
    for step in run:
        for inputs, targets in step:
            loss = ((run.model(inputs) - targets) ** 2).sum()
            step.backward(loss * float("nan") if step.number == 1 else loss)
        step.update()
    assert [word for word in kept.heard if word != "saved"] == (
        ["joined", "restored", "1", "skipped", "2", "3", "finished"]
    )
    assert kept.heard.count("saved") == len([one for one in Ledger(tmp_path).events() if one["event"] == "saved"]) > 0


@linux
@pytest.mark.parametrize("stuck", [True, False])
def test_a_worker_whose_device_cannot_be_freed_of_a_lost_peers_sum_is_started_anew_and_the_ledger_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: bool
) -> None:
    name = f"test-{secrets.token_hex(8)}"
    for variable in ("DLROVER_MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(variable, "none")
    monkeypatch.setenv(WORLDS, name)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(world, "die_with_parent", lambda _: None)  # the test's process is to outlive whoever started it
    monkeypatch.setattr(os, "_exit", sys.exit)
    reduce = Gradients.reduce

    def loses(gradients: Gradients, *, stop: bool, leave: bool) -> StepSums:
        if run.held.step == 5:
            lost = PeerLost("a peer has gone")
            lost.noticed_by, lost.stuck = "single", stuck
            raise lost
        return reduce(gradients, stop, leave)

    monkeypatch.setattr(Gradients, "reduce", lambda gradients, stop, leave: loses(gradients, stop=stop, leave=leave))
    workers = Workers(name)
    run = Elastic(tmp_path, *model(), DATA, steps=10, global_batch=16, micro_batch=4)
    keep, kept = run.keep, list[int]()
    monkeypatch.setattr(run, "keep", lambda **how: kept.append(run.held.step) or keep(**how))

    def agent() -> None:
        until(lambda: workers.waiting() == {0})
        workers.give({0: {"RANK": "0", "WORLD_SIZE": "1"}})
        if not stuck:
            until(lambda: run.held.step == 5 and workers.waiting() == {0})
            os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=agent, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        train(run)
    assert end.value.code == RESTART_ME
    assert kept == ([] if stuck else [5])
    told = [(event["event"], event.get("cause")) for event in Ledger(tmp_path).events()]
    assert ("interrupted", "lost a peer") in told
    assert (("replaced", worlds.STUCK) in told) is stuck
    assert ("saved" in dict(told)) is not stuck  # it lived on, and saved what it held


def test_the_progress_of_a_pod_names_the_nodes_that_were_found_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("POD_NAME", "gpt-worker-0")
    monkeypatch.setenv("ELASTIC_JOB_NAME", "gpt")
    monkeypatch.delenv("ELASTIC_GPT_LOCAL", raising=False)
    run = Elastic(tmp_path / "run", *model(), DATA, steps=2, global_batch=16, micro_batch=4)
    run.slow.add("gpt-worker-1")
    train(run)
    told = Progress.from_line((tmp_path / "elastic-gpt-progress-gpt-worker-0").read_text())
    assert told
    assert (told.step, told.slow) == (2, ("gpt-worker-1",))
