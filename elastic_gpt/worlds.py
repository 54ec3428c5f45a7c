"""A run as one worker sees it: what it keeps from world to world, and what it does in each (run.py is built on it)."""

import abc
import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import torch

from elastic_gpt import devices
from elastic_gpt.agent import Agent
from elastic_gpt.batches import Batches
from elastic_gpt.checkpoint import CheckpointError, Checkpoints, checkpoints_place
from elastic_gpt.contract import (
    DONE,
    METRICS,
    NO_WORLD,
    RESTART_ME,
    TENSORBOARD,
    progress_file,
    shared_memory,
)
from elastic_gpt.gradients import Gradients, LossScale, StepSums, not_finite, update
from elastic_gpt.identity import Run
from elastic_gpt.ledger import Ledger
from elastic_gpt.mirror import mirror_of, shown
from elastic_gpt.observers import (
    ConsoleObserver,
    LedgerObserver,
    MetricsObserver,
    ProgressObserver,
    TensorBoardObserver,
)
from elastic_gpt.order import micro_batch_seed
from elastic_gpt.pace import Pace
from elastic_gpt.plan import Plan
from elastic_gpt.reports import Observer, Reporter
from elastic_gpt.rundir import Introduction, Opened
from elastic_gpt.snapshot import SnapshotError, Snapshots
from elastic_gpt.state import Held, Memory, NotFinite, Offer, Restored, broken, restore, training_state
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import NotJoined, PeerLost, Signals, World, join, leave, place
from prepare.frontdoor import last_word

NETWORK_SECONDS = 2.0  # before another try to form a world: a network may need some to be up
MOST_NOT_JOINED = 10  # worlds in a row that could not be formed: then the network is set up wrongly
LAST_CALL_SECONDS = 0.15  # from the first signal: who is asked in the same moment hears it a little later
LEAVE_SECONDS = 1.0  # from the signal to leave, for the peers of a world that forms; then this worker saves alone
TURN_SECONDS = 0.5  # between two nodes that would save the same state; between two looks at whether another one does
STALLED_SECONDS = 3.0  # without a change of its files, after which a save by another node has probably ended
STUCK = "its GPU could not be freed of the sum that a lost peer was to answer"
HALVINGS = 16  # skipped updates in which a float16 run's loss scale may find its size


class Step:
    """One step on this worker.

    Attributes:
        number: updates done before it.
    """

    def __init__(self, worlds: "Worlds", world: World, number: int, batches: Batches) -> None:
        self.number = number
        self._worlds, self._world, self._batches = worlds, world, batches
        self._now: tuple[int, torch.Tensor] | None = None
        self.lost: PeerLost | None = None
        self.did: tuple[float, StepSums, torch.Tensor] | None = None
        """Learning rate, sums over all ranks, and the gradient's norm, when the step is done; None before."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The micro-batches of this worker's share, on the device. There may be none."""
        began = time.perf_counter()
        for index, ids, *tensors in self._batches.step(self.number):
            # Dropout is the same on any rank.
            torch.manual_seed(micro_batch_seed(self._worlds.plan.seed, self.number, index))
            self._now = index, ids
            yield tuple(tensors)
            if not devices.works_on(self._world.device):  # else this is not how long it takes
                self._worlds.gradients.seconds[index] = time.perf_counter() - began
            began = time.perf_counter()

    def backward(self, loss_sum: torch.Tensor) -> None:
        """Add the gradient of a micro-batch.

        Args:
            loss_sum: a scalar, the sum (not the mean) of the loss over its targets. It is divided by the targets of the
                whole step.
        """
        if self._now is None:
            raise RuntimeError("step.backward() belongs into the loop over the step's micro-batches, once in each")
        (index, ids), self._now = self._now, None
        scale = self._worlds.scale
        self._worlds.gradients.backward(index, ids, loss_sum, scale.factor if scale else 1.0)

    def update(self, rate: float | None = None) -> None:
        """Sum the gradient over all workers and do the update. If a worker is lost, the step is dropped and comes again.

        Args:
            rate: learning rate of this update; None: that of the optimizer.
        """
        worlds, plan = self._worlds, self._worlds.plan
        called = False
        if worlds.agent:
            worlds.agent.computed()
            called = worlds.agent.called()
        try:
            sums = worlds.gradients.reduce(worlds.signals.stop or called, worlds.signals.leave)
        except PeerLost as error:
            self.lost = error
            return
        # After the sum over the ranks nothing can fail, so either all ranks do the step or none.
        if worlds.snapshots:
            worlds.snapshots.goes_before()  # here the state begins to change
        if worlds.scale:
            worlds.scale.unscale(worlds.gradients.gradient)
        norm = worlds.gradients.clip(plan.clip)
        if rate is not None:
            for group in worlds.optimizer.param_groups:
                group["lr"] = rate
        update(worlds.optimizer, skip=not_finite(sums, norm))
        worlds.held.step = self.number + 1
        self.did = worlds.optimizer.param_groups[0]["lr"], sums, norm


class Worlds(abc.ABC):
    """A run as one worker sees it: what it keeps from world to world, and what it does in each.

    A subclass defines how the run directory is opened and what the batches are.
    """

    def __init__(
        self, plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scale: LossScale | None = None
    ) -> None:
        self.plan, self.model, self.optimizer, self.scale = plan, model, optimizer, scale
        self.signals, self.agent = Signals(), Agent.of_this_node()
        self.ledger = Ledger(plan.run_dir)
        self.held = Held()
        device = place(plan.device)
        if plan.exact:
            devices.repeat_bits(device)
        self.gradients = Gradients(
            model.parameters(),
            World(0, 1, 0, "", device, False),
            micro_batches=plan.global_batch // plan.micro_batch,
            global_batch=plan.global_batch,
            tokens=plan.global_batch * plan.targets,
            exact=plan.exact,
            traffic=plan.traffic,
        )
        self.tensors = training_state(model, optimizer, scale.state if scale else None)
        self.snapshots: Snapshots | None = None
        self.checkpoints: Checkpoints | None = None
        self.last: tuple[World, Run] | None = None  # the last ones in which this worker has done a step
        self.stored = -1  # step that the last world saved on storage at its end
        self.left = False  # whether the ledger has been told that this node leaves
        self.reporter: Reporter | None = None
        self.slow: set[str] = set()  # nodes
        # Waits until the group of the last world is left, and tells whether that was in time.
        self.group_left: Callable[[], bool] = lambda: True
        self.not_joined = 0  # worlds in a row that could not be formed
        self.observers: list[Observer] = []
        """The user's own observers, which hear of steps and events on the first worker."""

    # --- what a subclass defines

    evaluates = False
    """Whether there is a validation loss."""

    @abc.abstractmethod
    def open(self, world: World, me: Introduction) -> Opened[Any]:
        """Open the run directory in a world, and claim it (rundir.open_together)."""

    @abc.abstractmethod
    def batches(self, world: World) -> Batches:
        """This rank's micro-batches of each step."""

    def evaluate(self, world: World) -> float:
        """The validation loss, computed by all ranks together."""
        raise NotImplementedError

    def speed(self, world: World) -> tuple[int, float | None]:  # noqa: ARG002 - a subclass may need it
        """Operations per target, forward and backward; and the device's peak in operations per second, if known."""
        return 0, None

    def introduce(self, world: World, restored: Restored) -> list[str]:  # noqa: ARG002 - a subclass may need it
        """Lines for a person at the beginning of a life."""
        return []

    def warm_up(self) -> None:  # noqa: B027 - a subclass may need it
        """Do what is slow the first time, such as compiling. It is called where nobody waits for this worker yet."""

    # --- the loop

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left, in one world after the other. Returns only if the run is finished; else the process ends."""
        try:
            yield from self.in_all_worlds()
        finally:  # it may be the newest state, and nobody else has it
            if self.checkpoints:
                _tell_saved(self.checkpoints, self.ledger, print, wait=True)

    def in_all_worlds(self) -> Generator[Step, None, None]:
        """As iterating, but a checkpoint may be on its way at the end."""
        if self.agent:
            self.warm_up()
            self.agent.waits(self.held.step)
        while True:
            try:
                if self.agent and not self.agent.next_world(lambda: self.signals.stop):
                    self.part()
                    raise SystemExit(RESTART_ME)
                if not self.group_left():
                    self.part()
                    raise SystemExit(RESTART_ME)
                world = join(self.plan.device, self.plan.timeout_seconds, self.called_away)
                self.not_joined = 0
                code = yield from self.in_world(world)
            except PeerLost as error:
                lost_at = self.held.step
                if error.noticed_by:
                    self.ledger.write("interrupted", node=error.noticed_by, cause="lost a peer")
                if error.noticed_by and error.stuck:
                    self.ledger.write("replaced", node=error.noticed_by, cause=STUCK)
                no_world = isinstance(error, NotJoined)
                self.not_joined += no_world
                if self.agent and self.not_joined == MOST_NOT_JOINED:
                    self.part(ends=True)
                    cure = "name the network between the nodes in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
                    last_word(f"error: {error}, {MOST_NOT_JOINED} times in a row: {cure}")
                    raise SystemExit(NO_WORLD) from error
                if self.agent is None or error.stuck or not leave() or not self.keep(no_world=no_world):
                    raise
                keeps = f"keeps step {lost_at} and " if lost_at >= 0 else ""
                print(f"{error}; this worker {keeps}waits for a new world", file=sys.stderr, flush=True)
            else:
                if self.agent is None or code != RESTART_ME or self.signals.stop or not self.keep():
                    if code != DONE or self.held.step < self.plan.steps:
                        self.part()
                        raise SystemExit(code)
                    self.group_left()  # the user's code may make a group of its own
                    return

    def called_away(self) -> bool:
        """Whether the members change again, or this node leaves with a state to save: then it waits no longer for peers."""
        leaves = self.signals.leave and self.signals.waited > LEAVE_SECONDS and self.held.step >= 0
        return self.agent is not None and (leaves or self.agent.called())

    def part(self, *, ends: bool = False) -> None:
        """Save this worker's state if its node leaves and nobody has it: all nodes may leave, and memory goes with them.

        Where the nodes of a world are asked in one step, they have saved it together. But one may be asked
        between two worlds, or so late that the others are done; and each may be the last.

        Args:
            ends: whether the node ends although nobody has asked it to leave.
        """
        step = self.held.step
        if not (self.signals.leave or ends) or self.stored == step or step < 0 or not self.last or broken(self.tensors):
            return
        (world, run), checkpoints = self.last, self.checkpoints
        if not world.first_of_node or not checkpoints:
            return
        checkpoints.run = run  # a life that has begun since may be unknown to the ledger
        try:
            _tell_saved(checkpoints, self.ledger, print, wait=True)  # this worker's own, which may be of this step
            if self._others_went_on(world, checkpoints):
                print(f"step {step} is not saved by this node, which leaves: the others have gone on from it")
                return
            if checkpoints.saved != step and checkpoints.newest_step(newer_than=step - 1) is None:
                reports = list(self.reporter.recent) if self.reporter else self.held.reports
                checkpoints.save(step, self.tensors, reports)
                _tell_saved(checkpoints, self.ledger, print, wait=True)
                if checkpoints.saved != step:
                    raise OSError("the checkpoint could not be written")
            if not self.left:
                self.ledger.write("left", node=world.node, step=step)
        except (OSError, CheckpointError) as error:
            print(f"warning: this node leaves, and step {step} is not saved: {error}", file=sys.stderr, flush=True)

    def _others_went_on(self, world: World, checkpoints: Checkpoints) -> bool:
        """Wait for this node's turn to save, or until another one has saved this step. Whether a later life has begun.

        Rank 0 of the last world is the first. The others look whether it does that, so that not all write the
        same state at once into storage that they share.
        """
        step, began = self.held.step, time.monotonic() - self.signals.waited
        turn = min(self.plan.grace_seconds / 3 + world.rank * TURN_SECONDS, self.plan.grace_seconds / 2)
        files = checkpoints.files(step)
        while True:
            if mirror := mirror_of(self.plan.run_dir):
                mirror.reopen()  # as a reader: another worker may be its writer now
            if self.ledger.lives() > self.held.life + 1:  # of that life nobody may have done a step
                return True
            if checkpoints.saved == step or not world.rank or step in checkpoints.steps():
                return False
            if (now := checkpoints.files(step)) != files:  # another one is writing it
                files, turn = now, max(turn, time.monotonic() - began + STALLED_SECONDS)
            if time.monotonic() - began > turn:
                return False
            time.sleep(TURN_SECONDS)

    def report_last(self, step: Step) -> None:
        """Report a step after which the caller left the loop."""
        if self.reporter and step.did:
            self.reporter.step(step.number + 1, *step.did)
            self.reporter.drain()

    def keep(self, *, no_world: bool = False) -> bool:
        """Wait for another world, and keep this worker's state: in its tensors, and in shared memory in case it dies as well.

        Args:
            no_world: whether the last world could not be formed. One that this worker was called away from might have been.

        Returns:
            Whether the state is whole, or that with which a run begins.
        """
        untouched = no_world and self.held.life < 0  # no world has given this worker a state
        whole = untouched or (self.held.step >= 0 and not broken(self.tensors))
        if self.agent and whole:  # it finds the next world meanwhile
            if no_world and self.not_joined > 1:  # one may be a peer that died in that moment
                time.sleep(NETWORK_SECONDS)
            self.agent.waits(self.held.step)
        if self.reporter:
            self.reporter.drain()
            self.reporter.close()
            self.held.reports, self.reporter = list(self.reporter.recent), None
        if whole and self.snapshots and self.snapshots.step < self.held.step:
            self.snapshots.save(self.held.step, self.held.life, self.tensors, self.held.reports)
            self.snapshots.wait()
        return whole

    def in_world(self, world: World) -> Generator[Step, None, int]:
        """One life of the run, until the run is over or the world changes. Returns the exit code."""
        joined = time.time()
        memory = Memory(self.held, None)

        def offer(run: Run) -> Offer:
            self.snapshots = memory.snapshots = self._open_snapshots(run, world)
            return memory.offer(run, world.node)

        because = self.agent.started_because if self.agent else ""
        opened = self.open(world, Introduction(self.held.life >= 0, because, offer))
        claim, over = opened.claim, False
        try:
            over, code = yield from self._live(world, opened, memory, joined)
        except ValueError:  # a user's mistake: another try would not help
            over = True
            raise
        finally:
            if claim and over:
                claim.release()
        return code

    def _live(
        self, world: World, opened: Opened[Any], memory: Memory, joined: float
    ) -> Generator[Step, None, tuple[bool, int]]:
        """Restore the state, then train to the end or until the world changes.

        Args:
            memory: what this worker has offered the others.
            joined: when the world was formed, seconds since 1970.

        Returns:
            Whether the job is over, and the exit code.
        """
        plan, tensors, ledger, signals = self.plan, self.tensors, self.ledger, self.signals
        run, snapshots = opened.run, memory.snapshots
        self.gradients.world = world
        batches = self.batches(world)
        max_skipped = plan.max_skipped + (HALVINGS if self.scale else 0)

        # --- restore the state
        checkpoints = self._open_checkpoints(run)
        restored = restore(tensors, memory, opened.offers, checkpoints, run, world, plan.resume)
        if name := broken(tensors):
            raise NotFinite(f"{restored.source} is not finite ({name}): delete it, and an older state is taken")
        here = opened.members
        nodes, stayed = sorted({one.node for one in here}), sorted({one.node for one in here if one.lived_on})
        pace = Pace([one.node for one in here], plan.global_batch // plan.micro_batch, self.slow)
        observers, last_step = self._open_observers(run, nodes, stayed, world, restored)
        for one in here if world.first else []:
            if one.started_because:
                ledger.write("replaced", node=one.node, cause=one.started_because)
        # --- reports
        back = time.time()
        flops, peak = self.speed(world)
        reporter = self.reporter = Reporter(
            observers,
            world,
            recent=restored.reports,
            keep=max(2 * plan.snapshot_interval, max_skipped),
            tokens_per_step=plan.global_batch * plan.targets,
            flops_per_token=flops,
            peak=peak,
        )
        for line in [*self.introduce(world, restored), run.note, restored.choice]:
            if line:
                reporter.say(line)
        # --- save what the membership change left unsaved
        if snapshots and snapshots.step != restored.step:
            snapshots.save(restored.step, run.life, tensors, restored.reports)  # so that every node has it
        due = restored.step - checkpoints.listed >= plan.checkpoint_interval
        if world.first and due and not checkpoints.pending:
            checkpoints.save(restored.step, tensors, restored.reports)  # it was due, but lost with its writer

        if restored.step >= plan.steps:
            reporter.say(f"nothing to do at step {restored.step} of {plan.steps}: a larger --steps goes on from there")

        def give_up(step: int, good: int, what: str) -> NoReturn:
            """End the run: the states after `good` up to `step` are useless, and the ledger says so to later lives."""
            if world.first:
                ledger.write("diverged", step=step, good=good)
            older = world.first_does(lambda: max((one for one in checkpoints.steps() if one <= good), default=None))
            last = (
                f"the last good checkpoint is {checkpoints.name(older)}" if older else "there is no good checkpoint yet"
            )
            reporter.close()
            raise NotFinite(f"{what}: {last}; the same command with a smaller --optimizer.learning-rate goes on")

        def keep_finite(step: int) -> None:
            """Called before a state is saved: ends the run if it is not finite."""
            if name := broken(tensors):
                give_up(step, step - 1, f"the update of step {step} made the state infinite or not a number ({name})")

        step, stopping, leaving = restored.step, 0, 0
        with contextlib.closing(batches), _on_its_way(snapshots):
            while step < plan.steps and not stopping:
                if self.evaluates and step > 0 and plan.evaluate_interval > 0 and step % plan.evaluate_interval == 0:
                    # Evaluates after the state is saved. If this world has to stop, the next one evaluates.
                    reporter.evaluation(step, self.evaluate(world))
                # --- one step: the gradient of the whole batch, then one update
                if self.agent:
                    self.agent.computes(step)
                self.gradients.zero()
                this = Step(self, world, step, batches)
                yield this
                if this.lost:
                    raise this.lost
                if this.did is None:
                    raise RuntimeError("step.update() was not called: it ends each step")
                self.last = world, run  # all ranks have come so far, so the ledger knows this life
                rate, sums, norm = this.did
                reporter.all_did()  # all ranks have come to this step, so they have done the ones before
                step += 1

                # --- its report, and whether the run can go on
                snapshot = step % plan.snapshot_interval == 0
                save = step % plan.checkpoint_interval == 0 or (snapshot and checkpoints.owed)
                reporter.step(step, rate, sums, norm)
                # A GPU computes while the step before is reported. But before a save, all reports are written.
                if world.first and ledger.superseded():
                    raise PeerLost(f"another world trains into {shown(plan.run_dir)} since this one was formed")
                stopping, leaving = reporter.drain(
                    behind=int(devices.works_on(world.device) and not (snapshot or save))
                )
                if world.first and step == restored.step + 1:
                    ledger.recovered(last_step, joined, back)
                for slow in pace.step([] if devices.works_on(world.device) else sums.seconds.tolist()):
                    if world.first:
                        ledger.write("slow", node=slow.node, step=step, seconds=slow.seconds, others=slow.others)
                        reporter.say(f"WARNING: {slow}")
                if reporter.skipped >= max_skipped:
                    what = f"loss or gradient not finite in {reporter.skipped} updates in a row, up to step {step}"
                    give_up(step, step - reporter.skipped, f"{what} (optimizer.max_skipped)")
                if reporter.skipped:  # the state may be bad, so it must not replace a good one
                    snapshot = save = False
                if snapshot or save:
                    keep_finite(step)
                # --- save it: in memory, and on storage
                if snapshots and snapshot:
                    snapshots.save(step, run.life, tensors, list(reporter.recent))
                    snapshots.drop_others(nodes)
                _tell_saved(checkpoints, ledger, reporter.say)
                if world.first and save:
                    if checkpoints.pending:
                        reporter.say(f"WARNING: no checkpoint at step {step}: the one before is still being written")
                    else:
                        checkpoints.save(step, tensors, list(reporter.recent))

            # --- the end of this life: save the last state, and write to the ledger how it ended
            # All ranks leave the loop after the same step: at the end, or because a worker was asked to stop.
            reporter.drain()
            keep_finite(step)
            # Now all of them have done the last step, and those have heard it whose leaving was why the others were called.
            told = world.gather((signals.leave, signals.waited, checkpoints.saved == step))
            leaving, asked = sum(one for one, *_ in told), time.monotonic() - max(waited for _, waited, _ in told)
            *_, saved = told[0]
            reporter.all_did()
            finished = step >= plan.steps
            if finished and restored.step < step and self.evaluates:
                reporter.evaluation(step, self.evaluate(world))
            if world.first and not finished:
                ledger.write("interrupted", node=world.node, cause="asked to stop", step=step)
            if snapshots:
                if not finished and snapshots.step != step:
                    snapshots.save(step, run.life, tensors, list(reporter.recent))
                snapshots.wait()
            if world.first and leaving and not checkpoints.pending and checkpoints.saved != step:
                checkpoints.save(step, tensors, list(reporter.recent), push_out=not reporter.skipped)
            if 0 < leaving < world.size and not finished:
                time.sleep(max(0.0, asked + LAST_CALL_SECONDS - time.monotonic()))
                leaving = sum(world.gather(signals.leave))
            deadline = asked + plan.grace_seconds

            def settle() -> bool:
                """Save this step on storage at the end, and if nodes leave (all may). Returns whether it is there."""

                def wait() -> None:
                    while checkpoints.pending and (finished or time.monotonic() < deadline):
                        time.sleep(0.01)
                        _tell_saved(checkpoints, ledger, reporter.say)

                wait()
                if (finished or leaving) and checkpoints.saved != step and not checkpoints.pending:
                    checkpoints.save(step, tensors, list(reporter.recent), push_out=not reporter.skipped)
                    wait()
                return checkpoints.saved == step

            if finished or leaving:  # else nothing is to be saved; what is on its way goes on in the next world
                saved = world.first_does(settle)
            self.stored = step if saved else -1
            self.left = signals.leave and saved  # else `part` saves, and tells it then
            if world.first_of_node and self.left and not finished:
                ledger.write("left", node=world.node, step=step)
            if world.first and not finished and leaving == world.size:
                ledger.write("stopped", step=step)
                where = f"saved in {shown(plan.run_dir)}" if saved else "NOT saved on storage"
                reporter.say(f"stopped after step {step}, {where}; the same command goes on from there")
            if world.first and finished and saved and restored.step < step:
                ledger.write("finished", step=step)
            reporter.close()
            if snapshots and saved and (finished or leaving == world.size):
                snapshots.discard()
        # --- the exit code
        # gloo takes 20 ms, in which the agent can begin.
        self.group_left = ThreadPoolExecutor(1, "leave").submit(leave).result
        if finished and not saved:
            raise OSError(
                f"{shown(plan.run_dir)} holds no checkpoint of the last step: make room, then run again to save it"
            )
        over = finished or leaving == world.size or not world.elastic
        if finished or (world.elastic and signals.released):
            return over, DONE
        return over, RESTART_ME if world.elastic else 128 + signals.number

    def _open_checkpoints(self, run: Run) -> Checkpoints:
        if self.checkpoints:
            self.checkpoints.begin_life(run)
        else:
            place = checkpoints_place(self.plan.run_dir, self.plan.checkpoint_dir)
            self.checkpoints = Checkpoints(place, self.plan.checkpoint_keep, run, self.ledger.path)
        return self.checkpoints

    def _open_snapshots(self, run: Run, world: World) -> Snapshots | None:
        """This node's snapshots, on its first worker. If shared memory is too small, says so and goes on without."""
        if not world.first_of_node:
            return None
        if self.snapshots and self.snapshots.folder.exists():
            self.snapshots.begin_life(run.name, run.lives)
            return self.snapshots
        if self.snapshots:  # others took this node for one that has gone
            self.snapshots.wait()
            self.snapshots.discard()
        try:
            folder, metrics = shared_memory() / run.run_id, self.plan.run_dir / METRICS
            # A mirror may be ahead of the store, with which the next life begins.
            history = None if mirror_of(metrics) else metrics
            buffers = {f"model.{name}" for name, _ in self.model.named_buffers(remove_duplicate=False)}
            return Snapshots(
                folder,
                world.node,
                run.run_id,
                self.tensors,
                name=run.name,
                history=history,
                changed_by_forward=self.tensors.keys() & buffers,
            )
        except SnapshotError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return None

    def _open_observers(
        self, run: Run, nodes: list[str], stayed: list[str], world: World, restored: Restored
    ) -> tuple[list[Observer], float | None]:
        """Open the observers of a world, on its first worker, and write the beginning of this life to the ledger.

        Returns the observers, and the time of the last step before, in seconds since 1970 (None: no
        step yet).
        """
        plan, ledger = self.plan, self.ledger
        ledger.listeners = []
        if not world.first:
            return [], None
        metrics = MetricsObserver(plan.run_dir / METRICS, restored.step, restored.reports, plan.snapshot_interval)
        ledger.listeners = [observer.on_event for observer in self.observers]
        try:
            ledger.begin_life(nodes, world.size, restored.step, restored.source, metrics.dropped, run.name, stayed)
        except Unreachable:
            raise
        except OSError as error:
            where = f"{shown(plan.run_dir)}/{ledger.path.name}"
            raise OSError(f"cannot write {where} ({error.strerror}): make room") from error
        observers: list[Observer] = [
            ConsoleObserver(plan.steps, restored.step, plan.observe_interval),
            metrics,
            LedgerObserver(ledger),
        ]
        if file := progress_file():  # only in a pod
            start, interval = restored.step, plan.observe_interval
            told = ProgressObserver(plan.steps, start, interval, workers=world.size, file=file, slow=self.slow)
            observers.append(told)
        if plan.tensorboard and not mirror_of(plan.run_dir):  # it appends to its files, which no store can
            observers.append(TensorBoardObserver(plan.run_dir / TENSORBOARD, restored.step))
        return observers + self.observers, metrics.last_step


@contextlib.contextmanager
def _on_its_way(snapshots: Snapshots | None) -> Iterator[None]:
    """If a peer is lost while a snapshot is being made, wait until it is whole: it may be the newest one."""
    try:
        yield
    except (PeerLost, NotFinite) as error:
        if not (isinstance(error, PeerLost) and error.stuck):
            leave()  # first, since others may be waiting for this worker
        if snapshots:
            snapshots.wait()
        raise
    finally:
        if snapshots:
            snapshots.goes_before()  # whoever left the loop may change the state


def _tell_saved(checkpoints: Checkpoints, ledger: Ledger, say: Callable[[str], None], wait: bool = False) -> None:
    """Write to the ledger whether a checkpoint was saved. One that failed is tried again with each snapshot, and told once."""
    again, result = checkpoints.failed, checkpoints.finished(wait)
    if isinstance(result, OSError) and not again:
        ledger.write("save_failed", error=str(result))
        say(f"WARNING: the checkpoint could not be written ({result}); training goes on, and it is tried again")
    elif isinstance(result, int):
        ledger.write("saved", step=result, checkpoint=checkpoints.name(result), place=str(checkpoints.storage))
