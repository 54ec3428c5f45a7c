"""DLRover's job master, extended: the nodes of a running job follow `replicas` and `suspend`.

    elastic-gpt master --namespace training --job-name gpt      # the command of a job's master pod

DLRover 0.6.1 reads `spec.replicaSpecs.worker.replicas` only once, and `spec.suspend` only keeps it
from starting nodes. This master reads the ElasticJob again and again. So `elastic-gpt job scale`,
`kubectl patch` and `kubectl edit` have the same effect, a client may die half-way, and a replaced
master carries on. Nodes are removed by deleting their pods: they get SIGTERM, finish the current
step, save the state and end.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from elastic_gpt.jobs.manifest import GROUP
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.jobs.status import failure, wanted_nodes
from elastic_gpt.nodes import mend
from elastic_gpt.nodes.job_status import healed
from elastic_gpt.nodes.private import keep_dlrover_files_private
from elastic_gpt.nodes.rendezvous import Leases, wait_for_members
from elastic_gpt.processes import die_with_parent
from prepare.frontdoor import Parser, command, last_word

PORT = 50001  # DLRover's service for the master points there
POLL_SECONDS = 2.0
LOST_SECONDS = 30.0  # a node without a pod for so long was planned by a master that was lost
ALIVE = ("Initial", "Pending", "Running")


class Node(Protocol):
    """What we use of DLRover's record of a node. A replacement has its own record: a higher id, the same rank."""

    id: int
    rank_index: int
    name: str
    status: str
    relaunchable: bool


def decide(nodes: Iterable[Node], wanted: int) -> tuple[list[int], list[Node]]:
    """How to get from `nodes` to `wanted` nodes: the ranks for which to start a node, and the nodes to remove.

    DLRover itself replaces nodes that failed, were killed or were deleted.
    """
    newest: dict[int, Node] = {}
    for node in sorted(nodes, key=lambda node: node.id):
        newest[node.rank_index] = node
    if any(node.status == "Succeeded" for node in newest.values()):
        return [], []  # training is over, and a new node would wait for peers for ever
    # A node that was removed here is Deleted, and marked so that DLRover does not replace it.
    absent = [
        rank
        for rank in range(wanted)
        if rank not in newest or (newest[rank].status == "Deleted" and not newest[rank].relaunchable)
    ]
    leaving = [node for rank, node in sorted(newest.items()) if rank >= wanted and node.status in ALIVE]
    return absent, leaving


class Scaling:
    """Gives a running job as many nodes as its ElasticJob says."""

    def __init__(self, job_manager: Any, job_name: str) -> None:
        """Args:
        job_manager: DLRover's DistributedJobManager, started.
        """
        self._manager = job_manager
        self._job_name = job_name
        self._wanted: int | None = None
        self._without_pod: dict[int, float] = {}  # node id to the time when its pod was first missing
        # The master ends with success when all nodes have exited. For a suspended job it has to wait for new ones.
        self._suspended = False
        pending = job_manager.pend_without_workers
        job_manager.pend_without_workers = lambda: self._suspended or pending()

    def start(self) -> None:
        threading.Thread(target=self._run, name="scaling", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._try(self.reconcile)
            time.sleep(POLL_SECONDS)

    def heal(self) -> None:
        """Correct the job's status, but do not change its nodes."""
        self._try(self._read)

    @staticmethod
    def _try(look: Callable[[], object]) -> None:
        try:
            look()
        except Exception as error:  # the API server is away, or a pod has just gone: try again next time
            print(f"scaling: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def reconcile(self) -> None:
        """Read the job once, and start or remove nodes as it says."""
        job = self._read()
        if not job:
            return
        wanted = wanted_nodes(job)
        if wanted != self._wanted:
            print(f"scaling: the job asks for {wanted} nodes", flush=True)
            self._wanted = wanted
        self._suspended = self._suspended or wanted == 0
        manager = self._manager._worker_manager
        nodes = list(manager._get_mutable_nodes().values())
        absent, leaving = decide(nodes, wanted)
        for node in leaving:
            self._remove(node)
        plan = self._plan()
        plan.launch_nodes = [self._new_node(rank) for rank in absent] + self._lost(nodes)
        if plan.launch_nodes:
            print(f"scaling: starting {', '.join(node.name for node in plan.launch_nodes)}", flush=True)
            self._manager._scaler.scale(plan)
        # Nodes take a while to leave, and may be gone at the next look.
        others = plan.launch_nodes or any(node.relaunchable and node.status != "Deleted" for node in nodes)
        self._suspended = wanted == 0 or (self._suspended and not others)

    def _read(self) -> dict[str, Any] | None:
        """Read the job. If the operator called it Failed because the master before was lost, correct that."""
        kubernetes, where = self._manager._k8s_client, {"group": GROUP, "version": "v1alpha1", "plural": "elasticjobs"}
        job: dict[str, Any] | None = kubernetes.get_custom_resource(name=self._job_name, **where)
        if job and (patch := healed(job)):
            print(f"status: {failure(job)}: not so, this master runs it", flush=True)
            kubernetes.api_instance.patch_namespaced_custom_object_status(
                name=self._job_name, namespace=job["metadata"]["namespace"], body=patch, **where
            )
        return job

    def remove_all(self) -> None:
        """Remove all nodes of a job that has failed. They save their state first."""
        for node in list(self._manager._worker_manager._get_mutable_nodes().values()):
            if node.status in ALIVE:
                self._remove(node)

    def _remove(self, node: Any) -> None:
        print(f"scaling: {node.name} is to leave", flush=True)
        node.relaunchable = False
        self._manager._job_context.update_job_node(node)
        plan = self._plan()
        plan.remove_nodes = [node]
        self._manager._scaler._remove_nodes(plan)  # scale(plan) would wait while the job is suspended
        if node.status == "Initial":  # without a pod, no event will say that it has gone
            node.update_status("Deleted")

    def _new_node(self, rank: int) -> Any:
        from dlrover.python.common.node import Node

        manager = self._manager._worker_manager
        number = manager.get_next_node_id()
        resource = self._manager._job_resource.get_node_group_resource("worker").node_resource
        node = Node(
            "worker",
            number,
            config_resource=resource,
            name=manager._new_node_name_fn("worker", number),
            rank_index=rank,
            max_relaunch_count=manager._max_relaunch_num,
            service_addr=manager._new_service_fn("worker", rank),
        )
        manager._update_node(node)
        return node

    def _lost(self, nodes: Iterable[Any]) -> list[Any]:
        """Nodes that a lost master had planned but made no pod for. DLRover's new master does not start them."""
        planned = {
            node.id: node for node in nodes if node.status == "Initial" and node.rank_index < (self._wanted or 0)
        }
        queued = {node.id for node in self._manager._scaler._create_node_queue}
        now = time.monotonic()
        self._without_pod = {number: self._without_pod.get(number, now) for number in planned if number not in queued}
        lost = [planned[number] for number, since in self._without_pod.items() if now - since > LOST_SECONDS]
        for node in lost:
            del self._without_pod[node.id]
        return lost

    @staticmethod
    def _plan() -> Any:
        from dlrover.python.master.scaler.base_scaler import ScalePlan

        return ScalePlan()


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt master") -> int:
    """Returns exit code 0 if the job succeeded, 1 if it failed, 2 for a user's mistake."""
    parser = Parser(
        prog,
        description="DLRover's job master with live scaling: what a job's master pod runs.",
        epilog="example:\n  %(prog)s --namespace training --job-name gpt",
    )
    parser.add_argument("--namespace", required=True, metavar="NAME", help="of the ElasticJob")
    parser.add_argument("--job-name", required=True, metavar="NAME", help="the ElasticJob")
    parser.add_argument(
        "--oom-restarts", type=int, default=JobSpec.oom_restarts, metavar="N",
        help="how often a node that ran out of memory is replaced (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not (os.environ.get("KUBERNETES_SERVICE_HOST") or os.environ.get("KUBECONFIG")):
        raise ValueError("no cluster: this runs in the master pod of an ElasticJob; elsewhere name one with KUBECONFIG")
    # DLRover exits with 0 after an interrupt, and the operator would call that success. So SIGTERM ends with 143.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mend.check_version()
    keep_dlrover_files_private()
    mend.master()
    from dlrover.python.master import dist_master

    class Master(dist_master.DistributedJobMaster):
        def prepare(self) -> None:
            wait_for_members(Leases(), restarted=self.job_manager._has_running_workers())
            mend.judge_ended_nodes(self.job_manager, oom_restarts=args.oom_restarts, end=self._end)
            self.scaling = Scaling(self.job_manager, args.job_name)
            self.scaling.heal()  # if a master is lost before it has done this, the operator makes no other
            super().prepare()  # starts the first nodes, or finds those of an earlier master
            self.scaling.start()

        def _end(self, reason: str) -> None:
            """End the job as failed: a new pod would make the same mistake again."""
            self.request_stop(success=False, reason="UsersMistake", msg=reason)

        def request_stop(self, success: bool, reason: str, msg: str = "") -> None:
            if not success:  # the status of a failed job only has the master's exit code
                last_word(f"error: {msg or reason}")
            super().request_stop(success, reason, msg)

        def run(self) -> int:
            code = int(super().run())
            if code:
                self.scaling.remove_all()
            return code

    dist_master.DistributedJobMaster = Master
    return _run_dlrover(
        "--platform=pyk8s",
        f"--namespace={args.namespace}",
        f"--job_name={args.job_name}",
        f"--port={PORT}",
        "--pre_check_ops=[]",
        "--pending_fail_strategy=0",  # by default the job fails if a node finds no room for 15 minutes
    )


def run_local(port: int, nodes: int, name: str, launcher: int, restarted: bool) -> None:
    """Run the job master for local nodes in this process, as long as the process `launcher` lives.

    Standard input has the number of each node that has ended, one a line, since there are no pods
    to watch.
    """
    die_with_parent(launcher)
    keep_dlrover_files_private()
    leases = Leases()
    wait_for_members(leases, restarted=restarted)

    def listen_for_ends() -> None:
        for line in sys.stdin:
            leases.gone(int(line))

    threading.Thread(target=listen_for_ends, daemon=True).start()
    mend.listen_on_loopback()
    os._exit(_run_dlrover("--platform=local", f"--port={port}", f"--node_num={nodes}", f"--job_name={name}"))


def _run_dlrover(*arguments: str) -> int:
    from dlrover.python.master import main as master

    sys.argv = ["master", *arguments]
    return int(master.main() or 0)
