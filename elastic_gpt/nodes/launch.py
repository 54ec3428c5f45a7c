"""Launches DLRover's job master, and an agent on each node, which starts and restarts the workers.

    elastic-gpt launch --nodes 3 -- train debug_cpu --run-dir run     # a master and three nodes on this machine
    elastic-gpt launch --nnodes 2:4 -- train gpt2_124m --run-dir run  # one node of a job: what a pod runs

The second form joins the master that the environment names (DLROVER_MASTER_ADDR, NODE_RANK ...).
The first one starts a master and gives each node such an environment (local.py), so both run the
same agent: DLRover's, with its known faults mended (mend.py).
"""

import importlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_gpt.cli import COMMANDS
from elastic_gpt.contract import WORLDS
from elastic_gpt.nodes import mend
from elastic_gpt.nodes.local import LocalJob
from elastic_gpt.nodes.private import keep_dlrover_files_private, refuse_anothers_network_check
from elastic_gpt.nodes.standby import keep
from elastic_gpt.nodes.workers import Workers
from elastic_gpt.processes import die_with_parent
from elastic_gpt.settings import node_range
from prepare.frontdoor import REMAINDER, USERS_MISTAKE, Parser, command, whole

GRACE_SECONDS = 40.0  # torchelastic gives a worker 30 s after SIGTERM
MOST_LOCAL = 256  # workers on one machine; more are probably a typo
RESTARTS = 1000  # each loss of a peer costs a survivor one, so it must never be reached


HELP_EXAMPLES = """\
On this machine, with three nodes that can be killed and replaced:
  elastic-gpt launch --nodes 3 -- train debug_cpu --data.dir data --run-dir run
In a pod of an ElasticJob, or on any node where DLRover's environment names the master:
  elastic-gpt launch --nnodes 2:4 -- train gpt2_124m --data.dir /workspace/data --run-dir /workspace/run"""


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt launch") -> int:
    """Returns the exit code of the job (0: finished), 2 for a user's mistake, 130 after Ctrl-C."""
    parser = Parser(prog, description="Train elastically under DLRover.", epilog=HELP_EXAMPLES)
    most_here = whole(1, MOST_LOCAL)
    parser.add_argument("--nodes", type=most_here, metavar="N", help="start a master and N nodes on this machine")
    parser.add_argument("--nnodes", metavar="MIN:MAX", help="the job's least and most nodes (default: 1:N)")
    parser.add_argument(
        "--nproc", type=most_here, default=1, metavar="N", help="workers a node: its GPUs, or 1 (default: 1)"
    )
    parser.add_argument(
        "--network-check", action="store_true", help="test each node and its links before it trains (GPUs)"
    )
    parser.add_argument(
        "command", nargs=REMAINDER, metavar="-- COMMAND", help="as in `-- train PRESET ...`, or `-- run SCRIPT ...`"
    )
    args = parser.parse_args(argv)
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    least, most = _nodes(args.nnodes, args.nodes)
    if not words or words[0] not in ("train", "run"):
        raise ValueError("say what to launch, as in `elastic-gpt launch --nodes 3 -- train debug_cpu`")
    if args.nodes is None:
        return run_node(words, least=least, most=most, workers=args.nproc, network_check=args.network_check)
    if args.network_check:
        raise ValueError("--network-check is for the nodes of a cluster: leave it out with --nodes")
    if args.nodes * args.nproc > MOST_LOCAL:
        raise ValueError(f"{args.nodes} nodes with {args.nproc} workers each: one machine takes {MOST_LOCAL} workers")
    mend.check_version()

    # So that a typo is told once and now, and not by each worker of each node.
    _check(words)
    return run_local(words, nodes=args.nodes, least=least, most=most, workers=args.nproc)


def _nodes(nnodes: str | None, nodes: int | None) -> tuple[int, int]:
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


def _check(command: Sequence[str]) -> None:
    """Let the command check its own arguments. Raises ValueError for a mistake."""
    _room(command).check(command[1:], f"elastic-gpt {command[0]}")


def _room(command: Sequence[str]) -> Any:
    return importlib.import_module(COMMANDS[command[0]][0])


def run_node(command: Sequence[str], *, least: int, most: int, workers: int, network_check: bool = False) -> int:
    """Run DLRover's agent in this process until the job is over or this node is asked to leave (SIGTERM, Ctrl-C, SIGHUP)."""
    if "DLROVER_MASTER_ADDR" not in os.environ:
        raise ValueError("no DLRover master in the environment (DLROVER_MASTER_ADDR): add --nodes N to start one here")
    mend.check_version()
    launcher, finished = os.environ.get("ELASTIC_GPT_LOCAL", ":").split(":", 1)
    if launcher:  # a node of a LocalJob ends when its launcher is killed
        die_with_parent(int(launcher))
    os.environ["ELASTIC_GPT_AGENT"] = str(os.getpid())  # see claim.process: this process keeps the node in the job
    name = f"elastic-gpt-{os.getpid()}-{secrets.token_hex(8)}"
    linux = hasattr(os, "pidfd_open")
    if linux:
        os.environ[WORLDS] = f"{name}-worlds"
    worker = _standby(command, name) if linux else [sys.executable, "-m", "elastic_gpt.cli", *command]
    if command[0] == "train" and any("://" in word for word in [*command, os.environ.get("EGPT__DATA__DIR", "")]):
        _room(command).prepare_node(command[1:], f"elastic-gpt {command[0]}")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # started with nohup; torchelastic would handle the signal
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    keep_dlrover_files_private()
    if network_check:
        refuse_anothers_network_check()
    from dlrover.trainer.torch import elastic_run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    mend.agent(Workers(os.environ[WORLDS]) if linux else None)
    arguments = [
        f"--nnodes={least}:{most}",
        f"--nproc_per_node={workers}",
        f"--max_restarts={RESTARTS}",
        "--monitor_interval=0.05",
        # A round closes at once if MAX nodes are there, else so many seconds after the last one joined.
        "--rdzv_conf=join_timeout=600,lastcall_timeout=1",
        *(["--network-check"] if network_check else []),
        "--no-python",
        *worker,
    ]
    try:
        elastic_run.run(elastic_run.parse_args(arguments))
    except mend.Leaving:
        return 0  # the node was asked to leave, and the workers have saved their state
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return USERS_MISTAKE if USERS_MISTAKE in codes else 1
    if finished:  # 0 alone does not tell: a node that left ends with 0 as well
        Path(finished).touch()
    return 0


def _standby(command: Sequence[str], name: str) -> list[str]:
    """Start the standby process of this node, which imports at the same time. Returns the command line of a worker."""
    # Modules that each worker would import at their first use: TensorBoard's writer, and torch._dynamo for optimizers.
    modules = [COMMANDS[command[0]][0], "torch.utils.tensorboard", "torch._dynamo"]
    keep(name, modules)
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("standby.py")), name, *command]


def run_local(command: Sequence[str], *, nodes: int, least: int, most: int, workers: int) -> int:
    """Run a master and `nodes` nodes on this machine. Ctrl-C saves and stops, a second one stops at once."""
    job = LocalJob(command, least=least, most=most, workers=workers)
    asked: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        asked.append(number)

    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
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
