"""What happens to nodes, on a real API server and under the real DLRover master: the run comes out the same."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from elastic_gpt.checkpoint import Checkpoints
from elastic_gpt.ledger import Ledger
from tests.cluster.conftest import NODES, SHORT, TRAINING, Job
from tests.conftest import assert_same_run, events, metrics

Make = Callable[..., Job]
Undisturbed = Callable[[Job], Path]


def assert_same_so_far(job: Job, undisturbed: Undisturbed) -> None:
    """Each step once, the same sequences, the same losses bit for bit, as far as the run has come."""
    done = job.step()
    kept = [line for line in metrics(job.run) if line["step"] <= done]
    assert [line["step"] for line in kept] == list(range(1, done + 1))
    for mine, theirs in zip(kept, metrics(undisturbed(job)), strict=False):
        assert (mine["sequence_hash"], mine["loss"]) == (theirs["sequence_hash"], theirs["loss"]), mine["step"]


def dropped(job: Job) -> list[int]:
    """Steps done again in each life after the first."""
    return [event["dropped"] for event in events(job.run, "restored")][1:]


def training_process(job: Job, pod: str) -> int:
    """The process in a pod that trains: the child of its standby process."""
    for pid in job.pod(pod).pids():
        words = psutil.Process(pid).cmdline()
        if any("elastic_gpt.nodes.standby" in word for word in words) and (children := psutil.Process(pid).children()):
            return children[0].pid
    raise AssertionError(f"no worker in {pod}\n{job.story()}")


def test_a_job_goes_from_apply_to_succeeded(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job(steps=SHORT)
    job.submit()
    job.finish()
    assert_same_run(job.run, undisturbed(job))
    assert {pod.status.phase for pod in job.pods().values()} <= {"Succeeded"}


def test_a_run_with_losses_of_all_kinds_is_the_undisturbed_run(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job()
    job.submit()
    job.wait_world(2)
    job.wait_steps(10)

    # A worker is killed: its agent starts another one in the same pod.
    before = job.running()
    os.kill(training_process(job, before[0]), signal.SIGKILL)
    job.wait_life()
    job.wait_steps(5)
    assert job.running() == before
    assert_same_so_far(job, undisturbed)

    # A pod is deleted, as a drain does it: SIGTERM and a grace time; no step is lost, and DLRover replaces it.
    job.cluster.kubectl("delete", "pod", "-n", job.spec.namespace, before[0], "--wait=false")
    job.wait("a replacement", lambda: before[0] not in job.pods() and len(job.running()) == 2)
    job.wait_world(2)
    job.wait_steps(5)
    assert dropped(job)[1:] == [0] * len(dropped(job)[1:])
    assert_same_so_far(job, undisturbed)

    # A container ends with 137, as one does that was killed for its memory by the machine.
    victim = job.running()[-1]
    job.pod(victim).signal(signal.SIGKILL)
    job.wait("exit code 137", lambda: exit_code(job, victim) == 137)
    job.wait("a replacement", lambda: victim not in job.running() and len(job.running()) == 2)
    job.wait_world(2)
    job.wait_steps(5)
    assert_same_so_far(job, undisturbed)

    # The machine vanishes with its pods.
    victim = job.running()[0]
    machine = job.pods()[victim].spec.node_name
    job.cluster.kubelet.lose_node(machine)
    try:
        job.wait("a replacement", lambda: victim not in job.running() and len(job.running()) == 2)
        job.wait_world(2)
        job.wait_steps(5)
        assert_same_so_far(job, undisturbed)
    finally:
        job.cluster.kubelet.add_node(machine, NODES[machine])


def exit_code(job: Job, name: str) -> int | None:
    pod = job.pods().get(name)
    ended = pod and pod.status.container_statuses[0].state.terminated
    return ended.exit_code if ended else None


def test_scaling_up_and_down_loses_no_step(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job()
    job.submit()
    job.wait_world(2)
    said = job.command("scale", job.spec.name, "--nodes", 3)
    assert "3" in said
    job.wait_world(3)  # the command waited for it
    job.wait_steps(5)
    # The same, said twice and in kubectl's words; 2 nodes leave.
    for _ in range(2):
        job.patch({"spec": {"replicaSpecs": {"worker": {"replicas": 1}}}})
    job.wait_world(1)
    job.wait("two nodes gone", lambda: len(job.pods()) == 1)
    job.wait_steps(5)
    # Beyond the maximum: the client refuses, and what kubectl wrote is held to the maximum.
    refused = job.command("scale", job.spec.name, "--nodes", 9, code=2)
    assert "4" in refused
    assert_same_so_far(job, undisturbed)
    assert set(dropped(job)) == {0}


def test_a_scaling_for_which_there_is_no_room_is_told_and_taken_back(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job(cpus=2)  # a machine each, and the master's machine has no room
    job.submit()
    job.wait_world(2)
    said = job.command("scale", job.spec.name, "--nodes", 4, "--timeout", 30, code=124)
    assert "Insufficient cpu" in said, said
    job.wait_steps(3)
    job.command("scale", job.spec.name, "--nodes", 2)
    job.wait("the pending pods gone", lambda: len(job.pods()) == 2)
    assert_same_so_far(job, undisturbed)


def test_three_lost_masters_cost_no_step(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job()
    job.submit()
    job.wait_world(2)
    job.wait_steps(5)
    lives = len(events(job.run, "joined"))
    job.lose_master(job.kill)
    job.lose_master(job.delete_pod)
    job.lose_master(job.kill)
    job.wait_steps(10)
    assert len(events(job.run, "joined")) == lives  # training did not notice
    assert "Running" in job.command("status", job.spec.name)
    # The last one does what the first one did: it replaces a pod, and scales.
    victim = job.running()[0]
    job.cluster.kubectl("delete", "pod", "-n", job.spec.namespace, victim, "--wait=false")
    job.wait("a replacement", lambda: victim not in job.pods() and len(job.running()) == 2)
    job.wait_world(2)
    job.command("scale", job.spec.name, "--nodes", 3)
    job.wait_steps(5)
    assert_same_so_far(job, undisturbed)
    assert set(dropped(job)) <= {0}


def test_a_suspended_job_goes_on_where_it_was_when_resumed(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job()
    job.submit()
    job.wait_world(2)
    job.wait_steps(5)
    job.command("suspend", job.spec.name)
    assert not job.running()
    steps = job.step()
    time.sleep(3)
    assert job.step() == steps
    # Of two nodes that are told a moment apart, the first may leave with the state saved while the second awaits company.
    told = Ledger(job.run).events()
    assert told[-1]["event"] in ("stopped", "left"), told[-8:]
    assert Checkpoints(job.run / "checkpoints").newest_step() == steps
    assert "Suspended" in job.command("status", job.spec.name)
    job.lose_master(job.kill)
    assert "Suspended" in job.command("status", job.spec.name)
    job.command("resume", job.spec.name)
    job.wait_world(2)
    job.wait_steps(5)
    assert_same_so_far(job, undisturbed)
    assert set(dropped(job)) == {0}
    # The master goes first, and the nodes do not wait for it: none is killed at the end of its grace time.
    pods = [job.pod(name) for name in job.running()]
    job.command("delete", job.spec.name)
    job.wait("no pods", lambda: not job.cluster.core.list_namespaced_pod(job.spec.namespace).items, gone=True)
    assert not any(pod.killed for pod in pods)


def test_a_users_mistake_ends_the_job_with_the_workers_word(make_job: Make) -> None:
    job = make_job(arguments=(*TRAINING, "--stepz=5"))
    job.submit()
    job.wait("Failed", lambda: job.phase() == "Failed", gone=True)
    workers = {name: pod.status.phase for name, pod in job.pods().items()}
    assert len(workers) <= 2, workers  # none was made again
    assert "Running" not in workers.values()
    (master,) = job.pods("dlrover-master").values()
    word = "error: unknown setting 'stepz' in the flags: did you mean 'steps'?"
    assert word in master.status.container_statuses[0].state.terminated.message
    assert "did you mean 'steps'" in job.command("status", job.spec.name, code=None)


def test_a_worker_out_of_memory_is_replaced_as_often_as_is_said(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job(oom_restarts=1)
    job.submit()
    job.wait_world(2)
    job.wait_steps(5)
    victim = job.running()[-1]
    job.pod(victim).run_out_of_memory()
    job.wait("a replacement", lambda: victim not in job.running() and len(job.running()) == 2)
    job.wait_world(2)
    job.wait_steps(5)
    victim = next(name for name in job.running() if name not in (victim, job.running()[0]))
    job.pod(victim).run_out_of_memory()
    job.wait_world(1)
    job.wait_steps(5)
    assert len(job.running()) == 1
    assert "more --memory" in job.command("status", job.spec.name)
    assert "the job goes on with fewer nodes" in job.command("logs", job.spec.name, "--of", "master")
    assert_same_so_far(job, undisturbed)


def test_a_run_that_ends_while_its_master_is_gone_ends_well(make_job: Make) -> None:
    job = make_job(steps=SHORT)
    job.submit()
    job.wait_world(2)
    job.cluster.operator.stop()  # nobody makes another master
    try:
        job.kill(job.master())
        job.wait("both ended", lambda: {pod.status.phase for pod in job.pods().values()} == {"Succeeded"})
        assert job.step() == SHORT
    finally:
        job.cluster.operator.start()


def test_without_an_operator_a_job_is_new_and_says_why(make_job: Make) -> None:
    job = make_job()
    job.cluster.operator.stop()
    try:
        job.submit()
        said = job.command("status", job.spec.name)
        assert "New" in said
        assert "DLRover's operator has not taken it up yet" in said
        assert not job.pods("dlrover-master")
    finally:
        job.cluster.operator.start()
    job.wait("the master", lambda: bool(job.pods("dlrover-master")))


def test_an_image_that_cannot_be_pulled_is_named(make_job: Make) -> None:
    job = make_job(image="elastic-gpt:typo")
    job.submit()
    job.wait("the pods", lambda: bool(job.pods("dlrover-master")))
    told = 'ImagePullBackOff: Back-off pulling image "elastic-gpt:typo"'
    job.wait("the reason", lambda: told in job.command("status", job.spec.name))
    assert "deleted" in job.command("delete", job.spec.name)
    job.wait("no pods", lambda: not job.pods("dlrover-master") and not job.pods(), gone=True)


def test_a_volume_that_is_missing_is_named_and_awaited(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job(without=("volume",))
    job.submit()
    reason = 'persistentvolumeclaim "elastic-gpt" not found'
    job.wait("the reason", lambda: reason in job.command("status", job.spec.name))
    job.apply(("volume",))
    job.wait_steps(5)
    assert_same_so_far(job, undisturbed)


def test_wait_and_logs_and_doctor_and_list(make_job: Make, undisturbed: Undisturbed) -> None:
    job = make_job(steps=SHORT)
    job.submit()
    assert job.spec.name in job.command("list")
    job.wait_world(2)
    assert "Running" in job.command("status", job.spec.name)
    assert "step " in job.command("logs", job.spec.name, "--tail", 5)
    job.command("doctor", code=None)
    job.command("wait", job.spec.name)
    job.wait("the operator's word", lambda: job.phase() == "Succeeded")
    assert_same_run(job.run, undisturbed(job))
