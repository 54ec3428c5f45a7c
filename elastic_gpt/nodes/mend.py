"""Mends known faults of DLRover 0.6.1 in the running process: one function for each fault.

`agent` mends a node's agent, `master` and `local_master` a job's master (rendezvous.py has the one
mend that they share). They change DLRover's internals, so `check_version` refuses any other
version; tests/nodes/test_mend.py fails where one of them is no longer needed.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from elastic_gpt.contract import FAILED, NO_WORLD, USERS_MISTAKE
from elastic_gpt.nodes.rendezvous import Ask, Lease
from elastic_gpt.nodes.workers import Workers
from elastic_gpt.settings import SettingsError

VERSION = "0.6.1"
MOST_CRASHES, CRASH_SECONDS = 3, 180.0  # so many failures within so many seconds end the node; lost peers do not count
ADDRESS_SECONDS = 10.0  # for rank 0 of a new world to tell its address, which takes a fraction of a second
STEP_SECONDS = 30.0  # for a worker to finish its step at a membership change; torchelastic gives it as long
LOOK_SECONDS = 0.01
MISTAKE = "UsersMistake: "  # the beginning of an exit reason of our own


class NoAddress(Exception):
    """Rank 0 of a world has not told its address in time."""


class Leaving(BaseException):
    """This node was asked to leave. Not an Exception, so that DLRover's handlers do not swallow it."""


def check_version() -> None:
    """Raises SettingsError if another version of DLRover is installed.

    It is known that 0.7.0.dev0 fails a job that is suspended with its least number of nodes
    (#1712), and that it deletes the pods of workers with their logs when a job ends (#1711).
    """
    import dlrover  # noqa: F401 - if it is not installed, that is told here, not in the log of each process

    found = importlib.metadata.version("dlrover")
    if found != VERSION:
        raise SettingsError(
            f"DLRover {found} is installed, and what is mended here is {VERSION}: pip install dlrover=={VERSION}"
        )


# --- in an agent --------------------------------------------------------------------------------------------------------


def agent(workers: Workers | None) -> None:
    """All mends for an agent.

    Args:
        workers: the workers of this node, which live on at membership changes; None if they cannot.
    """
    poll_the_rendezvous()
    poll_the_store()
    find_a_new_master_soon()
    tell_every_master_the_range()
    lease = hold_a_lease()
    ask_for_a_world_without_end()
    leave_other_jobs_alone()
    have_no_flash_checkpoint()
    leave_when_asked(lease)
    save_before_an_error_ends_it(lease)
    say_the_last_word_once()
    finish_without_a_master()
    end_what_would_fail_again()
    if workers:
        keep_the_living(workers, lease)
        look_when_a_worker_waits(workers)


def poll_the_rendezvous() -> None:
    """0.6.1: agents poll the rendezvous only every 5 s, and each membership change waits for that."""
    from dlrover.python.common.constants import JobConstant

    JobConstant.RENDEZVOUS_DEFAULT_INTERVAL = 0.01


def poll_the_store() -> None:
    """0.6.1: agents look for rank 0's address in the master's store only every 2 s."""
    from dlrover.python.elastic_agent.torch import master_kv_store

    master_kv_store.time = types.SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(min(seconds, 0.01)))


def find_a_new_master_soon() -> None:
    """0.6.1: with gRPC's defaults, an agent waits longer and longer, up to two minutes, before it looks for a master again."""
    import grpc

    channel = grpc.insecure_channel
    soon = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
    grpc.insecure_channel = lambda address, options=(): channel(address, [*options, *soon])


def tell_every_master_the_range() -> None:
    """0.6.1: agents tell --nnodes and --rdzv_conf only once, so a restarted master does not know them."""
    from dlrover.python.elastic_agent.torch.training import MasterRendezvousHandler

    join = MasterRendezvousHandler._join_rendezvous

    def join_rendezvous(self: Any) -> Any:
        wait = int(self._rdzv_params.get("lastcall_timeout", 60))
        self._client.report_rdzv_params(
            self._rdzv_params.min_nodes, self._rdzv_params.max_nodes, wait, 1, self.join_timeout
        )
        return join(self)

    MasterRendezvousHandler._join_rendezvous = join_rendezvous


def hold_a_lease() -> list[Lease]:
    """0.6.1: it forms worlds without nodes that have not noticed the change yet, and with dead nodes (rendezvous.py).

    Returns a list that has the lease when the agent has one.
    """
    from dlrover.python.common import comm, env_utils
    from dlrover.python.common.constants import KeyValueOps
    from dlrover.python.elastic_agent.torch.training import MasterRendezvousHandler

    next_rendezvous = MasterRendezvousHandler.next_rendezvous
    lease: list[Lease] = []

    def report(client: Any, key: str, value: bytes) -> None:
        message = comm.KeyValuePair(key, value)
        message.op = KeyValueOps.SET
        type(client)._report.__wrapped__(client, message)  # without DLRover's retries, which sleep 5 s

    def next_and_hold(self: Any) -> Any:
        if not lease:
            lease.append(Lease(functools.partial(report, self._client), env_utils.get_node_id()))
        nodes = self._rdzv_params
        wait = int(nodes.get("lastcall_timeout", 60))
        rank, workers = self._node_rank, self._local_world_size
        lease[0].ask(Ask(self._name, rank, workers, nodes.min_nodes, nodes.max_nodes, wait))
        found = next_rendezvous(self)
        lease[0].hold()
        return found

    MasterRendezvousHandler.next_rendezvous = next_and_hold
    return lease


def ask_for_a_world_without_end() -> None:
    """0.6.1: where no world forms, it ends living workers, which hold the newest state, and then its node.

    With fewer nodes than the least it does so after `join_timeout`, by a clock that may be set; with a master that is away at
    the third error of a call. Here the node asks again, until it is asked to leave.

    Where rank 0's node dies before it has told its address, the others wait for that for six minutes, and fail. And a node
    that was cut off meanwhile begins in a world that another one has followed, and takes the run from that; or it is awaited
    in vain in the next world, into which the master has taken it for one that still waits.
    """
    import grpc
    from dlrover.python.elastic_agent.torch.training import (
        ElasticTrainingAgent,
        MasterRendezvousHandler,
        RendezvousTimeoutError,
    )

    rendezvous = ElasticTrainingAgent._rendezvous
    get_store = MasterRendezvousHandler._get_store

    def remember_round(self: Any, number: int, group: int) -> Any:
        self.round = number
        return get_store(self, number, group)

    def is_last(handler: Any) -> bool:
        number, _, world = handler._client.get_comm_world(handler._name, handler._node_rank)
        return number == handler.round and handler._node_rank in world  # not in it: somebody has asked for the next one

    def address(self: Any, store: Any) -> Any:
        try:
            return self._get_master_addr_port(store)
        except LookupError as error:
            raise NoAddress from error

    def rendezvous_again(self: Any, group: Any) -> None:
        handler = group.spec.rdzv_handler
        handler._store.set_timeout(datetime.timedelta(seconds=ADDRESS_SECONDS))
        while True:
            try:
                rendezvous(self, group)
                if is_last(handler):
                    return
                why = "another world is formed or asked for meanwhile"
            except NoAddress:
                why = f"no word of rank 0 in {ADDRESS_SECONDS:.0f} s"
            except RendezvousTimeoutError:
                why = f"no world in {handler.join_timeout} s, for want of nodes"
            except grpc.RpcError:  # after ten tries, 5 s apart
                why = "no master answers"
            print(f"warning: {why}: this node asks again", flush=True)

    MasterRendezvousHandler._get_store = remember_round
    ElasticTrainingAgent._safe_get_master_addr_port = address
    ElasticTrainingAgent._rendezvous = rendezvous_again


def leave_other_jobs_alone() -> None:
    """0.6.1: it kills every process whose parent is 1 and that has torchelastic's environment, even of other jobs.

    Our processes die with their agent (processes.py), so there is nothing to kill.
    """
    from dlrover.python.elastic_agent.torch.training import ElasticTrainingAgent

    ElasticTrainingAgent._stop_orphan_workers = lambda *_: None


def have_no_flash_checkpoint() -> None:
    """0.6.1: it has a thread, sockets and files under /tmp/dlrover for Flash Checkpoint. We have our own snapshots."""
    from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver

    AsyncCheckpointSaver.start_async_saving_ckpt = classmethod(lambda _: None)


def leave_when_asked(lease: list[Lease]) -> None:
    """0.6.1 with torch 2.13: SIGTERM is swallowed.

    torchelastic's handler raises an Exception, and DLRover repeats whatever was interrupted: the
    start of the workers, or a call to the master. Our handler tells the workers that this node
    leaves for good. Then the agent ends, for which it sends them SIGTERM and waits.
    """
    from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver
    from torch.distributed.elastic.multiprocessing import api as multiprocessing

    def leave(signum: int, frame: types.FrameType | None) -> None:  # noqa: ARG001 - a handler has these
        _tell_that_it_leaves(lease)
        raise Leaving

    multiprocessing._terminate_process_handler = leave
    AsyncCheckpointSaver.register_signal_handler = classmethod(lambda _: None)


def save_before_an_error_ends_it(lease: list[Lease]) -> None:
    """0.6.1: an error of the agent's own ends its workers with SIGTERM, which to them is a restart: they save nothing.

    Here they are told before that the node leaves. torchelastic gives them 30 s after SIGTERM, as where it is asked to leave.
    """
    from dlrover.python.elastic_agent.torch.training import ElasticTrainingAgent

    invoke_run = ElasticTrainingAgent._invoke_run

    def invoke_and_save(self: Any, *role: str) -> Any:
        try:
            return invoke_run(self, *role)
        except Exception:  # Leaving is none
            _tell_that_it_leaves(lease)
            raise

    ElasticTrainingAgent._invoke_run = invoke_and_save


def _tell_that_it_leaves(lease: list[Lease]) -> None:
    """Tell workers and master that this node leaves for good."""
    import psutil

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # a second signal has no effect
    # The workers first: the others are called for the lease, and all save the step in flight if one of them leaves.
    for worker in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGUSR1)
    for held in lease:
        held.release()


def _tried_once(report: Callable[..., Any]) -> Callable[[Any], None]:
    """`report` without retries and errors, since there may be no master any more."""

    def once(self: Any) -> None:
        self._report = functools.partial(type(self)._report.__wrapped__, self)
        with contextlib.suppress(Exception):
            report(self)

    return once


def say_the_last_word_once() -> None:
    """0.6.1: if the master has gone too (a deleted job), an agent repeats its last report ten times, 5 s apart."""
    from dlrover.python.elastic_agent.master_client import MasterClient

    MasterClient.report_failed_exited = _tried_once(MasterClient.report_failed_exited)
    MasterClient.report_succeeded_exited = _tried_once(MasterClient.report_succeeded_exited)


def finish_without_a_master() -> None:
    """0.6.1: if a run finishes while there is no master, the agent tries to reach it for two minutes, and fails.

    It does so when it asks whether others want to join, when it does not notice that its workers
    have ended, and when it waits for the other agents through the master's store. All our workers
    end together, after the last step.
    """
    from dlrover.python.common import comm
    from dlrover.python.elastic_agent.master_client import MasterClient
    from dlrover.python.elastic_agent.torch.training import ElasticTrainingAgent

    def num_nodes_waiting(self: Any, rdzv_name: str) -> int:
        with contextlib.suppress(Exception):  # the master is away, so nobody waits to join
            request = comm.WaitingNodeNumRequest(rdzv_name=rdzv_name)
            return int(type(self)._get.__wrapped__(self, request).waiting_num)
        return 0

    MasterClient.num_nodes_waiting = num_nodes_waiting
    ElasticTrainingAgent._exit_barrier = lambda _: None


def end_what_would_fail_again() -> None:
    """0.6.1: it restarts workers whatever they failed with.

    A user's mistake would be made again, and so would a crash soon after each start; a worker that could form no world has
    tried often enough.
    """
    from dlrover.python.diagnosis.common.constants import DiagnosisActionType
    from dlrover.python.elastic_agent.diagnosis.diagnosis_agent import DiagnosisAgent

    diagnose = DiagnosisAgent.diagnose_training_failure
    crashes = Crashes()

    def diagnose_training_failure(self: Any) -> Any:
        action = diagnose(self)
        codes = {failure.exitcode for failure in self._agent_context.run_result.failures.values()}
        if crashes.too_many(codes) or codes & {USERS_MISTAKE, NO_WORLD}:
            action._action_type = DiagnosisActionType.RELAUNCH_WORKER  # the action that ends this agent
        return action

    DiagnosisAgent.diagnose_training_failure = diagnose_training_failure


def keep_the_living(workers: Workers, lease: list[Lease]) -> None:
    """0.6.1 and torchelastic: each membership change ends all workers and starts new ones.

    Here a worker is started before there is a world, makes its model, and waits. At a membership
    change, living workers get their place in the next world. Only dead ones are started again, and
    meanwhile the other nodes train on without this one. The workers of one node live and die
    together.
    """
    from dlrover.python.elastic_agent.torch.training import ElasticTrainingAgent
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, WorkerState

    changed = ElasticTrainingAgent._membership_changed
    restart = ElasticTrainingAgent._restart_workers
    initialize = SimpleElasticAgent._initialize_workers

    # --- which workers live, wait or hang

    def processes(agent: Any) -> list[Any]:
        return [handler.proc for handler in agent._pcontext.subprocess_handlers.values()] if agent._pcontext else []

    def all_live(agent: Any) -> bool:
        found = processes(agent)
        return bool(found) and all(process.poll() is None for process in found)

    def all_wait(agent: Any, seconds: float) -> bool:
        """Wait until all workers of this node wait for a world. False if one ends first, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while len(workers.waiting()) < agent._worker_group.spec.local_world_size:
            end_hung(agent, workers.hung())
            if not all_live(agent) or time.monotonic() > deadline:
                return False
            time.sleep(LOOK_SECONDS)
        return all_live(agent)

    def end_hung(agent: Any, hung: dict[int, str]) -> None:
        for rank, why in hung.items():
            print(f"warning: a worker is killed: {why}", flush=True)
            # Kills the client; its worker dies with it, even if it is stopped.
            agent._pcontext.subprocess_handlers[rank].proc.kill()

    def start(agent: Any, group: Any, *, in_world: bool = False) -> None:
        if not all_live(agent):
            workers.forget()
            if not in_world:
                for held in lease:
                    held.pause()
                group.store, group.master_addr, group.master_port = group.store or workers, "", 0  # not known yet
            if agent._pcontext:  # the living of this node, which nothing would end any more, nor give a world
                agent._pcontext.close(signal.SIGKILL)
            agent._start_workers(group)
        for rank, process in enumerate(processes(agent)):
            group.workers[rank].id = process.pid

    def membership_changed(self: Any, role: str, handler: Any) -> bool:
        end_hung(self, workers.hung())
        return bool(workers.waiting()) or bool(changed(self, role, handler))

    def restart_workers(self: Any, group: Any) -> None:
        if all_live(self):
            workers.call()
            if all_wait(self, STEP_SECONDS):
                self._initialize_workers(group)
                return
            if not all_live(self):
                return  # it has finished or failed, which the next look shows
            why = dict.fromkeys(range(len(processes(self))), f"its step did not end in {STEP_SECONDS:.0f} s")
            workers.started_because(why)
            end_hung(self, why)
        restart(self, group)

    def initialize_workers(self: Any, group: Any) -> None:
        if type(self) is not ElasticTrainingAgent:  # another agent: that of the network check
            initialize(self, group)
            return
        start(self, group)
        if all_wait(self, float("inf")):  # until then no other node waits for this one
            self._rendezvous(group)
            # What has ended meanwhile. The lease stays: without it others would form a world beside the one given here.
            start(self, group, in_world=True)
            places = {
                "RANK": "global_rank",
                "WORLD_SIZE": "world_size",
                "ROLE_RANK": "role_rank",
                "ROLE_WORLD_SIZE": "role_world_size",
            }
            common = {
                "MASTER_ADDR": group.master_addr,
                "MASTER_PORT": group.master_port,
                "GROUP_RANK": group.group_rank,
                "GROUP_WORLD_SIZE": group.group_world_size,
            }
            worlds = {}
            for worker in group.workers:
                mine = common | {name: getattr(worker, attribute) for name, attribute in places.items()}
                worlds[worker.local_rank] = {name: str(value) for name, value in mine.items()}
            if all_wait(self, STEP_SECONDS):
                workers.give(worlds)
        group.state = WorkerState.HEALTHY

    ElasticTrainingAgent._membership_changed = membership_changed
    ElasticTrainingAgent._restart_workers = restart_workers
    SimpleElasticAgent._initialize_workers = initialize_workers  # type: ignore[method-assign]


def look_when_a_worker_waits(workers: Workers) -> None:
    """0.6.1: it looks after its workers once in an interval, and one that has left its world waits for that look."""
    from dlrover.python.elastic_agent.torch import training

    training.time = types.SimpleNamespace(time=time.time, sleep=workers.sleep)


class Crashes:
    """Counts how often this node's workers have crashed."""

    def __init__(self) -> None:
        self.times: list[float] = []  # on a monotonic clock

    def too_many(self, codes: set[int]) -> bool:
        """Whether the workers that have just ended with `codes` should not be started again."""
        now = time.monotonic()
        self.times = [then for then in self.times if now - then < CRASH_SECONDS] + [now] * (FAILED in codes)
        return len(self.times) >= MOST_CRASHES


# --- in a master --------------------------------------------------------------------------------------------------------


def master() -> None:
    """All mends for a master on Kubernetes, except `judge_ended_nodes`."""
    count_no_lost_pods()
    look_for_the_end_often()
    tell_users_mistakes_apart()


def count_no_lost_pods() -> None:
    """0.6.1: it ends the job when five pods have failed or were killed, whatever the job's restartCount is."""
    from dlrover.python.master.node import dist_job_manager

    dist_job_manager._MAX_POD_RELAUNCH_COUNT = sys.maxsize


def look_for_the_end_often() -> None:
    """0.6.1: it checks only every 30 s whether the job is over."""
    from dlrover.python.master import dist_master

    dist_master.time = types.SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(min(seconds, 2.0)))


def tell_users_mistakes_apart() -> None:
    """0.6.1: exit code 2 of a pod is an unknown error to it. Here the exit reason is MISTAKE and the pod's last line."""
    from dlrover.python.master.watcher import k8s_watcher

    exit_reason = k8s_watcher._get_pod_exit_reason

    def reason(pod: Any) -> str:
        (ended, *_) = [one.state.terminated for one in pod.status.container_statuses or []] or [None]
        if ended and ended.exit_code == USERS_MISTAKE:
            return MISTAKE + " ".join((ended.message or "").split())
        return str(exit_reason(pod))

    k8s_watcher._get_pod_exit_reason = reason


def judge_ended_nodes(manager: Any, *, oom_restarts: int, end: Callable[[str], None]) -> None:
    """0.6.1: it replaces a pod that ended with a user's mistake (restartCount times), but never one that ran out of memory.

    Args:
        manager: DLRover's DistributedJobManager.
        oom_restarts: how often each rank may run out of memory and be replaced.
        end: called with the reason if the job has to end.
    """
    from dlrover.python.common.constants import NodeExitReason

    should_relaunch = manager._should_relaunch

    def judge(node: Any, change: Any) -> bool:
        reason = str(node.exit_reason or "")
        if reason.startswith(MISTAKE):
            end(reason.removeprefix(MISTAKE) or f"{node.name}: exit code {USERS_MISTAKE}: see its log")
            return False
        if reason != NodeExitReason.OOM:
            return bool(should_relaunch(node, change))
        nodes = list(manager.get_job_nodes()["worker"].values())
        times = sum((other.rank_index, other.exit_reason) == (node.rank_index, reason) for other in nodes)
        if times > oom_restarts:
            print(
                f"memory: {node.name} ran out of memory and is not replaced, rank {node.rank_index} having done so {times}"
                " times: the job goes on with fewer nodes; submit it again with more --memory",
                flush=True,
            )
            return False
        print(f"memory: {node.name} ran out of memory: replacement {times} of {oom_restarts}", flush=True)
        node.exit_reason = NodeExitReason.KILLED  # the exit reason of a pod that was killed for other reasons
        try:
            return bool(should_relaunch(node, change))
        finally:
            node.exit_reason = reason

    manager._should_relaunch = judge


def listen_on_loopback() -> None:
    """0.6.1: the local master listens on all network interfaces."""
    import grpc

    server = grpc.server

    def loopback_server(*args: Any, **kwargs: Any) -> Any:
        made = server(*args, **kwargs)
        listen = made.add_insecure_port
        made.add_insecure_port = lambda address: listen(address.replace("[::]", "127.0.0.1"))
        return made

    grpc.server = loopback_server
