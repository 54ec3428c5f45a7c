"""DLRover's job master, with what it lacks: a job's nodes follow `replicas` and `suspend` while it runs.

    elastic-gpt master --namespace training --job-name gpt      # what a job's master pod runs

DLRover 0.6.1 reads `spec.replicaSpecs.worker.replicas` once, and `spec.suspend` only keeps it from starting nodes. Here the
ElasticJob is read again and again, so `elastic-gpt job scale`, `kubectl patch` and `kubectl edit` all do the same, a client
may die half-way, and a master that was itself replaced carries on. A node is taken away as Kubernetes takes pods away: SIGTERM,
upon which it finishes the step in flight, saves the state and goes.
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
LOST_SECONDS = 30.0  # a node that has had no pod for this long has been forgotten, by a master that was lost
ALIVE = ("Initial", "Pending", "Running")


class Node(Protocol):
    """What we read of DLRover's record of a node. A replacement is a new record with a higher id and the same rank."""

    id: int
    rank_index: int
    name: str
    status: str
    relaunchable: bool


def decide(nodes: Iterable[Node], wanted: int) -> tuple[list[int], list[Node]]:
    """What makes a job of `nodes` one of `wanted` nodes: the ranks to start a node for, and the nodes that are to go.

    What DLRover replaces of its own accord (failed, killed and deleted nodes) is left to it.
    """
    newest: dict[int, Node] = {}
    for node in sorted(nodes, key=lambda node: node.id):
        newest[node.rank_index] = node
    if any(node.status == "Succeeded" for node in newest.values()):
        return [], []  # the training is over: a node that came now would wait for company for ever
    # A node that was taken away is Deleted, and was marked so that DLRover does not replace it.
    absent = [
        rank
        for rank in range(wanted)
        if rank not in newest or (newest[rank].status == "Deleted" and not newest[rank].relaunchable)
    ]
    leaving = [node for rank, node in sorted(newest.items()) if rank >= wanted and node.status in ALIVE]
    return absent, leaving


class Scaling:
    """Makes a running job's nodes what its ElasticJob says."""

    def __init__(self, job_manager: Any, job_name: str) -> None:
        """Args:
        job_manager: DLRover's DistributedJobManager, started.
        """
        self._manager = job_manager
        self._job_name = job_name
        self._wanted: int | None = None
        self._without_pod: dict[int, float] = {}  # node id to when that was first seen
        # The master ends, with success, when all nodes have exited. That of a suspended job has to wait until it has others.
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
        """Put the job's status right, without its nodes."""
        self._try(self._read)

    @staticmethod
    def _try(look: Callable[[], object]) -> None:
        try:
            look()
        except Exception as error:  # the API server is away, a pod has just gone: the next look finds out
            print(f"scaling: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def reconcile(self) -> None:
        """Read the job once and do what it takes."""
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
        # Nodes that were told to leave may take a while, and go between two looks.
        others = plan.launch_nodes or any(node.relaunchable and node.status != "Deleted" for node in nodes)
        self._suspended = wanted == 0 or (self._suspended and not others)

    def _read(self) -> dict[str, Any] | None:
        """The job. Its operator may have called it Failed because this master's predecessor was lost: that is put right."""
        kubernetes, where = self._manager._k8s_client, {"group": GROUP, "version": "v1alpha1", "plural": "elasticjobs"}
        job: dict[str, Any] | None = kubernetes.get_custom_resource(name=self._job_name, **where)
        if job and (patch := healed(job)):
            print(f"status: {failure(job)}: not so, this master runs it", flush=True)
            kubernetes.api_instance.patch_namespaced_custom_object_status(
                name=self._job_name, namespace=job["metadata"]["namespace"], body=patch, **where
            )
        return job

    def remove_all(self) -> None:
        """The job has failed: its living nodes save their state and go."""
        for node in list(self._manager._worker_manager._get_mutable_nodes().values()):
            if node.status in ALIVE:
                self._remove(node)

    def _remove(self, node: Any) -> None:
        print(f"scaling: {node.name} is to leave", flush=True)
        node.relaunchable = False
        self._manager._job_context.update_job_node(node)
        plan = self._plan()
        plan.remove_nodes = [node]
        self._manager._scaler._remove_nodes(plan)  # scale(plan) would do the same, but waits while a job is suspended
        if node.status == "Initial":  # it never had a pod, so no event will say that it is gone
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
        """Nodes that a lost master had planned and no pod was made for: the new one finds others running and starts none."""
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
    """Exit codes: 0 the job succeeded, 1 it failed, 2 a user's mistake."""
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
    # DLRover takes an interrupt for a good end, and so would the operator: a master that is taken away is lost, 143.
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
            self.scaling.heal()  # a master that is lost before it has done this is the last one
            super().prepare()  # starts the first nodes, or finds those of the master before
            self.scaling.start()

        def _end(self, reason: str) -> None:
            """A mistake that a new pod would make again: the job has failed."""
            self.request_stop(success=False, reason="UsersMistake", msg=reason)

        def request_stop(self, success: bool, reason: str, msg: str = "") -> None:
            if not success:  # the status of a failed job has but the master's exit code
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
        "--pending_fail_strategy=0",  # else the job fails once it has waited 15 minutes for a node that finds no room
    )


def run_local(port: int, nodes: int, name: str, launcher: int, restarted: bool) -> None:
    """The job master for this machine alone, in this process, as long as the process `launcher` lives.

    Standard input tells the numbers of nodes that have ended, a line each: here there are no pods to watch.
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
