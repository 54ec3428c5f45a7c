"""The one door to DLRover: its job master, and an agent on each node that starts and restarts the workers.

    elastic-gpt launch --nodes 3 -- train debug_cpu --run-dir run     # a master and three nodes on this machine
    elastic-gpt launch --nnodes 2:4 -- train gpt2_124m --run-dir run  # one node of a job: what a pod runs

The second form joins the master that DLRover's environment names (DLROVER_MASTER_ADDR, NODE_RANK ...). The first starts a
master and gives each node such an environment (local.py), so both run the same agent. The agent is DLRover's own, with what
is known to hurt in 0.6.1 mended in `_mend`.
"""

import argparse
import contextlib
import functools
import importlib
import os
import secrets
import signal
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_gpt.cli import COMMANDS
from elastic_gpt.nodes.rendezvous import Lease
from elastic_gpt.nodes.standby import keep
from elastic_gpt.processes import die_with_parent
from elastic_gpt.settings import fail, node_range
from prepare.frontdoor import USERS_MISTAKE

GRACE_SECONDS = 40.0  # torchelastic gives a worker 30 s after SIGTERM
# Exit code of a node's workers: this many in so many seconds end the node. An exception is 1; a world that cannot be formed
# is 4, which may also be a peer's death in that moment. A lost peer and a storage that is away (3) are never too many.
CRASHES = {1: (3, 180.0), 4: (10, 1800.0)}
RESTARTS = 1000  # each loss of a peer costs a survivor one, so it only has to be out of reach


class Leaving(BaseException):
    """This node was asked to leave. No Exception, so that nothing on the way swallows it."""


class MasterError(RuntimeError):
    """DLRover's job master did not start."""


HELP_EXAMPLES = """\
On this machine, with three nodes that can be killed and replaced:
  elastic-gpt launch --nodes 3 -- train debug_cpu --data.dir data --run-dir run
In a pod of an ElasticJob, or on any node where DLRover's environment names the master:
  elastic-gpt launch --nnodes 2:4 -- train gpt2_124m --data.dir /workspace/data --run-dir /workspace/run"""


def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt launch") -> int:
    """Exit codes: the job's (0: finished), 2 a user's mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog, description="Train elastically under DLRover.", epilog=HELP_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, metavar="N", help="start a master and N nodes on this machine")
    parser.add_argument("--nnodes", metavar="MIN:MAX", help="the job's least and most nodes (default: 1:N)")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="workers a node: its GPUs, or 1 (default: 1)")
    parser.add_argument(
        "--network-check", action="store_true", help="test each node and its links before it trains (GPUs)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="as in `-- train PRESET ...`")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        least, most = _nodes(args.nnodes, args.nodes)
        if not command or command[0] != "train":
            raise ValueError("say what to launch, as in `elastic-gpt launch --nodes 3 -- train debug_cpu`")
        if args.nproc < 1:
            raise ValueError(f"--nproc {args.nproc}: a node has at least 1 worker")
        if args.nodes is None:
            return run_node(command, least=least, most=most, workers=args.nproc, network_check=args.network_check)
        # A typo is told once and now, not by each worker of each node.
        if code := _check(command):
            return code
        return run_local(command, nodes=args.nodes, least=least, most=most, workers=args.nproc)
    except (ValueError, MasterError) as error:
        return fail(error)


def _nodes(nnodes: str | None, nodes: int | None) -> tuple[int, int]:
    if nodes is not None and nodes < 1:
        raise ValueError(f"--nodes {nodes}: a job has at least 1 node")
    if nnodes is None:
        if nodes is None:
            raise ValueError(
                "say how many nodes: --nodes 3 starts three here, --nnodes 2:4 joins a job as one of 2 to 4"
            )
        nnodes = f"1:{nodes}"
    least, most = node_range(nnodes)
    if nodes is not None and not least <= nodes <= most:
        raise ValueError(f"--nodes {nodes} is outside --nnodes {nnodes}: start between {least} and {most}")
    return least, most


def _check(command: Sequence[str]) -> int:
    """Let the command look at its own arguments; returns its exit code for a mistake, else 0."""
    room: Any = importlib.import_module(COMMANDS[command[0]][0])
    try:
        room.check(command[1:], f"elastic-gpt {command[0]}")
    except ValueError as error:
        return fail(error)
    return 0


def run_node(command: Sequence[str], *, least: int, most: int, workers: int, network_check: bool = False) -> int:
    """Run DLRover's agent in this process until the job is over or this node is asked to leave (SIGTERM, Ctrl-C, SIGHUP)."""
    if "DLROVER_MASTER_ADDR" not in os.environ:
        raise ValueError("no DLRover master in the environment (DLROVER_MASTER_ADDR): add --nodes N to start one here")
    launcher, finished = os.environ.get("ELASTIC_GPT_LOCAL", ":").split(":", 1)
    if launcher:  # a node of LocalJob leaves nothing behind when that is killed
        die_with_parent(int(launcher))
    worker = _standby(command)  # imports while this process does
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup, whose work torchelastic would undo
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    from dlrover.trainer.torch import elastic_run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _mend()
    arguments = [
        f"--nnodes={least}:{most}",
        f"--nproc_per_node={workers}",
        f"--max_restarts={RESTARTS}",
        # The round closes at once when all MAX nodes are there, else this many seconds after the last one joined.
        "--rdzv_conf=join_timeout=600,lastcall_timeout=1",
        *(["--network-check"] if network_check else []),
        "--no-python",
        *worker,
    ]
    try:
        elastic_run.run(elastic_run.parse_args(arguments))
    except Leaving:
        return 0  # asked to leave, and the workers have saved their state
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return USERS_MISTAKE if codes == {USERS_MISTAKE} else 1
    if finished:  # a node that has left ends with 0 as well
        Path(finished).touch()
    return 0


def _standby(command: Sequence[str]) -> list[str]:
    """Have a standby process on this node; returns the command line of a worker."""
    if not hasattr(os, "pidfd_open"):  # not Linux
        return [sys.executable, "-m", "elastic_gpt.cli", *command]
    name = f"elastic-gpt-{os.getpid()}-{secrets.token_hex(8)}"
    # What is imported only at its first use, which is in each worker: TensorBoard's writer, and for optimizers torch._dynamo.
    modules = [COMMANDS[command[0]][0], "torch.utils.tensorboard", "torch._dynamo"]
    keep(name, modules)
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("standby.py")), name, *command]


def _mend() -> None:
    """What hurts in DLRover 0.6.1, mended in this process."""
    import grpc
    from dlrover.python.common import comm, env_utils
    from dlrover.python.common.constants import JobConstant, KeyValueOps
    from dlrover.python.diagnosis.common.constants import DiagnosisActionType
    from dlrover.python.elastic_agent.diagnosis.diagnosis_agent import DiagnosisAgent
    from dlrover.python.elastic_agent.master_client import MasterClient
    from dlrover.python.elastic_agent.torch import master_kv_store
    from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver
    from dlrover.python.elastic_agent.torch.training import ElasticTrainingAgent, MasterRendezvousHandler
    from torch.distributed.elastic.multiprocessing import api as multiprocessing

    # The agents poll the rendezvous every 5 s; a membership change waits for that.
    JobConstant.RENDEZVOUS_DEFAULT_INTERVAL = 0.2

    # The agents wait for rank 0's address in the master's store by looking every 2 s.
    master_kv_store.time = types.SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(min(seconds, 0.05)))

    # gRPC waits ever longer, up to two minutes, before it looks for a master that was away.
    channel = grpc.insecure_channel
    soon = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
    grpc.insecure_channel = lambda address, options=(): channel(address, [*options, *soon])

    # A master that was started anew knows nothing of the agents' --nnodes and --rdzv_conf, which they tell it only once.
    join = MasterRendezvousHandler._join_rendezvous

    def join_rendezvous(self: Any) -> Any:
        wait = int(self._rdzv_params.get("lastcall_timeout", 60))
        self._client.report_rdzv_params(
            self._rdzv_params.min_nodes, self._rdzv_params.max_nodes, wait, 1, self.join_timeout
        )
        return join(self)

    MasterRendezvousHandler._join_rendezvous = join_rendezvous

    # It forms a new world without the nodes that have not noticed yet (rendezvous.py).
    next_rendezvous = MasterRendezvousHandler.next_rendezvous
    lease: list[Lease] = []

    def report(client: Any, key: str, value: bytes) -> None:
        message = comm.KeyValuePair(key, value)
        message.op = KeyValueOps.SET
        type(client)._report.__wrapped__(client, message)  # not the retries, which sleep 5 s

    def next_and_hold(self: Any) -> Any:
        found = next_rendezvous(self)
        if not lease:
            lease.append(Lease(functools.partial(report, self._client), env_utils.get_node_id()))
        lease[0].hold()
        return found

    MasterRendezvousHandler.next_rendezvous = next_and_hold

    # It kills every process whose parent is 1 and whose environment is torchelastic's, other jobs' too. Ours die with
    # their agent (processes.py), so there is nothing to kill.
    ElasticTrainingAgent._stop_orphan_workers = lambda *_: None

    # We keep our own snapshots: no thread, sockets and files under /tmp/dlrover for the ones of Flash Checkpoint.
    AsyncCheckpointSaver.start_async_saving_ckpt = classmethod(lambda _: None)

    # The handler that torchelastic sets at each start of the workers raises an Exception, which DLRover swallows: it retries
    # that start, and each call to the master. Ours tells the workers that this node leaves for good; on its way out the agent
    # then sends them SIGTERM and waits.
    def leave(signum: int, frame: types.FrameType | None) -> None:  # noqa: ARG001 - a handler has these
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # once is enough
        for held in lease:
            held.release()
        for worker in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGUSR1)
        raise Leaving

    multiprocessing._terminate_process_handler = leave
    AsyncCheckpointSaver.register_signal_handler = classmethod(lambda _: None)

    # Its last word to the master is repeated ten times, 5 s apart, where that has gone as well, as when a job is deleted.
    report_failed_exited = MasterClient.report_failed_exited

    def report_once(self: Any) -> None:
        self._report = functools.partial(type(self)._report.__wrapped__, self)
        with contextlib.suppress(Exception):
            report_failed_exited(self)

    MasterClient.report_failed_exited = report_once

    # It restarts whatever fails. A worker that ends with a user's mistake would make it again, and so would one that crashes
    # of itself soon after each start.
    diagnose = DiagnosisAgent.diagnose_training_failure
    crashes = Crashes()

    def diagnose_training_failure(self: Any) -> Any:
        action = diagnose(self)
        codes = {failure.exitcode for failure in self._agent_context.run_result.failures.values()}
        if crashes.too_many(codes) or USERS_MISTAKE in codes:
            action._action_type = DiagnosisActionType.RELAUNCH_WORKER  # which ends this agent
        return action

    DiagnosisAgent.diagnose_training_failure = diagnose_training_failure


class Crashes:
    """What this node's workers ended with, and when."""

    def __init__(self) -> None:
        self.ends: dict[int, list[float]] = {code: [] for code in CRASHES}  # exit code to times of a monotonic clock

    def too_many(self, codes: set[int]) -> bool:
        """Whether the workers that have just ended with `codes` should not be started again."""
        now = time.monotonic()
        for code in codes & CRASHES.keys():
            self.ends[code].append(now)
        recent = {code: sum(now - end < CRASHES[code][1] for end in ends) for code, ends in self.ends.items()}
        return any(recent[code] >= CRASHES[code][0] for code in recent)


def _children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children()]


def run_local(command: Sequence[str], *, nodes: int, least: int, most: int, workers: int) -> int:
    """A master and `nodes` nodes here, until the job is over. Ctrl-C saves and stops; a second one stops at once."""
    from elastic_gpt.nodes.local import LocalJob  # imports torch, which a pod's agent does in its own time

    job = LocalJob(command, least=least, most=most, workers=workers)
    asked: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        asked.append(number)

    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, ask)
    try:
        with job:
            for _ in range(nodes):
                job.add_node()
            while job.running() and job.can_go_on() and not asked:
                time.sleep(0.1)
            if asked:
                print("stopping: the step in flight is finished, then the state is saved; Ctrl-C again to stop at once")
                for node in job.running():
                    job.terminate(node)
                deadline = time.monotonic() + GRACE_SECONDS
                while job.running() and len(asked) < 2 and time.monotonic() < deadline:
                    time.sleep(0.1)
        if asked:
            return 128 + asked[0]
        return job.exit_code()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
