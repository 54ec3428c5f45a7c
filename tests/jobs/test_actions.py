"""actions.py: what each action does to a cluster, prints and refuses."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_gpt.contract import Progress
from elastic_gpt.jobs import actions, client
from elastic_gpt.jobs.manifest import manifests
from elastic_gpt.jobs.spec import JobSpec
from tests.conftest import PATIENCE
from tests.jobs.cluster import StubCluster, entry, later, progress, running

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]


def test_submit_makes_everything_in_order(stub: StubCluster, job: Job, capsys: Output) -> None:
    assert job("submit", "mine", "--gpus", 0) == 0
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert told == [
        "namespace/training", "persistentvolumeclaim/elastic-gpt", "serviceaccount/elastic-gpt-master",
        "role/elastic-gpt-master", "rolebinding/elastic-gpt-master", "job/mine-prepare", "elasticjob/mine",
    ]  # fmt: skip
    tree = stub.get("ElasticJob", "mine")
    assert tree
    assert tree["spec"]["replicaSpecs"]["worker"]["replicas"] == 2


def test_submit_again_changes_nothing_not_even_a_scaled_number(stub: StubCluster, job: Job, capsys: Output) -> None:
    assert job("submit") == 0
    tree = stub.get("ElasticJob", "elastic-gpt")
    assert tree
    tree["spec"]["replicaSpecs"]["worker"]["replicas"] = 4
    tree["spec"]["envs"] = {}  # what a server fills in
    capsys.readouterr()
    assert job("submit") == 0
    assert "elasticjob/elastic-gpt unchanged" in capsys.readouterr().out
    assert tree["spec"]["replicaSpecs"]["worker"]["replicas"] == 4


def test_submit_goes_on_where_a_killed_client_stopped(stub: StubCluster, job: Job) -> None:
    for tree in manifests(JobSpec(), ("namespace", "volume")):
        stub.add(tree)
    assert job("submit") == 0
    assert stub.get("ElasticJob", "elastic-gpt")


def test_submit_refuses_to_change_a_job_that_is_there(stub: StubCluster, job: Job, capsys: Output) -> None:
    assert job("submit") == 0
    assert job("submit", "--", "--steps=5") == 2
    assert "is there with other settings: `elastic-gpt job delete elastic-gpt` first" in capsys.readouterr().err
    tree = stub.get("ElasticJob", "elastic-gpt")
    assert tree
    tree["status"] = {"phase": "Failed"}
    assert job("submit") == 2
    assert "has ended (Failed)" in capsys.readouterr().err


def test_submit_refuses_a_name_that_another_namespace_has(stub: StubCluster, job: Job, capsys: Output) -> None:
    [theirs] = manifests(JobSpec(namespace="theirs"), ("job",))
    stub.add(theirs)
    for words in ([], ["--dry-run=server"]):
        assert job("submit", *words) == 2
        assert "namespace theirs has a job elastic-gpt" in capsys.readouterr().err
    assert not stub.get("ElasticJob", "elastic-gpt")
    assert job("submit", "mine") == 0
    # Who may not look is told what could be, and goes on.
    stub.narrow = {"ElasticJob"}
    capsys.readouterr()
    assert job("submit") == 0
    assert capsys.readouterr().out.startswith("note: you may not look into other namespaces")
    assert stub.get("ElasticJob", "elastic-gpt")


def test_delete_waits_until_the_pods_are_gone_and_submit_for_whoever_did_not(
    stub: StubCluster, job: Job, capsys: Output
) -> None:
    running(stub)
    stub.grace = 5
    assert job("delete", "elastic-gpt", "--timeout", PATIENCE) == 0
    assert "waiting until pod/elastic-gpt-edljob-worker-0" in capsys.readouterr().out
    assert not [key for key in stub.objects if key[0] == "Pod"]

    running(stub)
    assert job("delete", "elastic-gpt", "--no-wait") == 0
    assert [key for key in stub.objects if key[0] == "Pod"]
    capsys.readouterr()
    assert job("submit") == 0
    told = capsys.readouterr().out
    assert told.index("waiting until") < told.index("elasticjob/elastic-gpt created")
    assert not [key for key in stub.objects if key[0] == "Pod"]


def test_submit_finds_a_job_running_that_lost_its_master(stub: StubCluster, job: Job, capsys: Output) -> None:
    assert job("submit") == 0
    tree = stub.get("ElasticJob", "elastic-gpt")
    assert tree
    message = "The job master failover count 1 is beyond the restart count 0."
    tree["status"] = {"phase": "Failed", "status": {"conditions": [{"type": "Failed", "message": message}]}}
    stub.master("elastic-gpt", 1)
    assert job("submit") == 0
    assert "elasticjob/elastic-gpt unchanged" in capsys.readouterr().out
    del stub.objects["Pod", "training", "elasticjob-elastic-gpt-dlrover-master-1"]
    assert job("submit") == 2
    assert "has ended (Failed)" in capsys.readouterr().err


def test_a_user_who_may_not_read_pods_can_submit(stub: StubCluster, job: Job) -> None:
    stub.forbidden = {"Pod"}
    assert job("submit") == 0
    assert job("submit") == 0


def test_submit_waits_for_a_job_that_is_being_deleted(stub: StubCluster, job: Job, capsys: Output) -> None:
    tree = running(stub)
    tree["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:05Z"
    later(stub, lambda: [stub.objects.pop(key) for key in list(stub.objects) if key[0] in ("ElasticJob", "Pod")])
    assert job("submit") == 0
    assert "waiting until elasticjob/elastic-gpt" in capsys.readouterr().out
    made = stub.get("ElasticJob", "elastic-gpt")
    assert made
    assert "deletionTimestamp" not in made["metadata"]


def test_delete_says_what_is_left_when_its_time_is_over(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    stub.grace = 1_000_000
    assert job("delete", "elastic-gpt", "--timeout", 0.2) == 124
    assert "pods of it are there still" in capsys.readouterr().err


def test_a_lost_master_ends_no_wait_and_keeps_scale_and_suspend_going(
    stub: StubCluster, job: Job, capsys: Output
) -> None:
    miscounted = "The job master failover count 1 is beyond the restart count 0."
    condition = {"type": "Failed", "message": miscounted}
    tree = running(stub, phase="Failed", status={"conditions": [condition]})
    stub.master("elastic-gpt", 0, "Failed")
    assert job("wait", "elastic-gpt", "--timeout", 0.2) == 124  # before the operator has made another
    stub.master("elastic-gpt", 1)
    assert job("wait", "elastic-gpt", "--timeout", 0.2) == 124
    assert "but its master runs" in capsys.readouterr().out
    assert job("scale", "elastic-gpt", "--nodes", 2) == 0
    later(
        stub, lambda: [stub.objects.pop(("Pod", "training", f"elastic-gpt-edljob-worker-{rank}")) for rank in range(2)]
    )
    assert job("suspend", "elastic-gpt", "--timeout", PATIENCE) == 0
    assert tree["spec"]["suspend"] is True
    assert job("status", "elastic-gpt") == 0
    assert "Suspended" in capsys.readouterr().out


def test_wait_ends_with_the_run_though_the_operator_says_running(stub: StubCluster, job: Job) -> None:
    running(stub)
    stub.master("elastic-gpt", 0, "Succeeded")
    for rank in range(2):
        stub.worker("elastic-gpt", rank, "Succeeded")
    assert job("wait", "elastic-gpt", "--timeout", PATIENCE) == 0
    assert job("watch", "elastic-gpt") == 0


@pytest.mark.parametrize("time", [0.0, 1e300, -1e300, float("nan")])
def test_an_impossible_time_is_left_out(stub: StubCluster, job: Job, capsys: Output, time: float) -> None:
    running(stub)
    stub.logs["elastic-gpt-edljob-worker-0"] = [entry(1, Progress(time, 10, 100, 2.5).to_line())]
    assert job("status", "elastic-gpt") == 0
    assert "step 10/100 · loss 2.5000\n" in capsys.readouterr().out.replace(" \n", "\n")


def test_dry_runs_keep_nothing(stub: StubCluster, job: Job, capsys: Output) -> None:
    assert job("submit", "--dry-run=client") == 0
    assert stub.requests == []
    assert job("submit", "--dry-run=server") == 2  # the namespace is not there
    assert "kubectl create namespace training" in capsys.readouterr().err
    stub.add({"kind": "Namespace", "metadata": {"name": "training"}})
    before = dict(stub.objects)
    assert job("submit", "--dry-run=server") == 0
    assert stub.objects == before


def test_a_user_who_may_not_make_namespaces_can_submit(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.add({"kind": "Namespace", "metadata": {"name": "training"}})
    stub.forbidden = {"Namespace"}
    assert job("submit") == 0
    assert "namespace/training: not allowed" in capsys.readouterr().out


def test_a_cluster_without_the_operator_is_told_how_to_get_it(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.unknown = {"ElasticJob"}
    for words in (["submit"], ["status", "x"], ["list"], ["scale", "x", "--nodes", "1"]):
        assert job(*words) == 2
        assert "knows no ElasticJobs: install DLRover's operator: kubectl apply -k" in capsys.readouterr().err
    assert stub.objects == {}


def test_forbidden_is_one_line(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.forbidden = {"ElasticJob"}
    assert job("list") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not allowed" in error
    assert "job doctor" in error


@pytest.mark.parametrize("namespace", [None, "mine"])
def test_the_namespace_is_the_flags_then_the_contexts_then_training(
    stub: StubCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job, namespace: str | None
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(stub.kubeconfig(tmp_path, namespace)))
    assert job("list") == 0
    assert stub.requests[-1][1].split("/")[5] == (namespace or "training")
    assert job("list", "-n", "theirs") == 0
    assert stub.requests[-1][1].split("/")[5] == "theirs"
    assert job("list", "--context", "stubb") == 2


def test_no_cluster_at_all_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, job: Job
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    assert job("list") == 2
    assert "set KUBECONFIG or --kubeconfig" in capsys.readouterr().err
    (tmp_path / "broken").write_text("{")
    assert job("list", "--kubeconfig", tmp_path / "broken") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_in_a_pod_its_own_account_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    for name, content in (("token", "secret"), ("ca.crt", "certificate"), ("namespace", "theirs")):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(client, "SERVICE_ACCOUNT", tmp_path / "namespace")
    monkeypatch.setattr(client.client, "ApiClient", lambda settings: SimpleNamespace(configuration=settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    cluster = client.Cluster.connect(kubeconfig=None, context=None, namespace=None, default="training")
    assert (cluster.server, cluster.namespace) == ("https://10.0.0.1:443", "theirs")


def test_a_server_that_does_not_answer_is_one_line(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.close()
    assert job("list") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not answer" in error


def test_status_shows_nodes_step_and_why_a_pod_waits(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub, nodes=3)
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/2 nodes: no nvidia.com/gpu",
    }
    stub.worker("elastic-gpt", 2, "Pending", conditions=[condition])
    assert job("status", "elastic-gpt") == 0
    shown = capsys.readouterr().out
    assert "Running, 2 of 3 nodes (1 to 4 allowed)" in shown
    assert "step 10/100 · loss 2.5000 · 1,234 tokens/s · 3 workers" in shown
    assert "Unschedulable: 0/2 nodes: no nvidia.com/gpu" in shown


def test_scale_patches_waits_for_the_world_and_says_what_it_waits_for(
    stub: StubCluster, job: Job, capsys: Output
) -> None:
    tree = running(stub)
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "Insufficient nvidia.com/gpu",
    }
    stub.worker("elastic-gpt", 2, "Pending", conditions=[condition])

    def start() -> None:
        stub.worker("elastic-gpt", 2)
        time.sleep(0.3)
        stub.logs["elastic-gpt-edljob-worker-0"].append(progress(9, 3))

    later(stub, start)
    assert job("scale", "elastic-gpt", "--nodes", 3, "--timeout", PATIENCE) == 0
    assert tree["spec"]["replicaSpecs"]["worker"]["replicas"] == 3
    told = capsys.readouterr().out
    assert "elastic-gpt-edljob-worker-2: Pending: Unschedulable: Insufficient nvidia.com/gpu" in told
    assert told.index("their world is being formed") < told.index("trains on 3 nodes together")


def test_scale_down_waits_until_the_nodes_are_gone(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    leaving = stub.worker("elastic-gpt", 1)
    leaving["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:05Z"

    def go() -> None:
        del stub.objects["Pod", "training", "elastic-gpt-edljob-worker-1"]
        stub.logs["elastic-gpt-edljob-worker-0"].append(progress(9, 1, step=20))

    later(stub, go)
    assert job("scale", "elastic-gpt", "--nodes", 1, "--timeout", PATIENCE) == 0
    told = capsys.readouterr().out
    assert "elastic-gpt-edljob-worker-1: Leaving" in told
    assert told.strip().endswith("trains on 1 node together, with 1 worker")


def test_scaling_twice_is_scaling_once(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    before = len(stub.requests)
    assert job("scale", "elastic-gpt", "--nodes", 2) == 0
    assert "asked for 2 nodes, as before" in capsys.readouterr().out
    assert not [method for method, _ in stub.requests[before:] if method != "GET"]


@pytest.mark.parametrize("nodes", [0, 5, -1])
def test_scale_refuses_numbers_outside_the_jobs_range(stub: StubCluster, job: Job, capsys: Output, nodes: int) -> None:
    tree = running(stub)
    assert job("scale", "elastic-gpt", f"--nodes={nodes}") == 2
    assert "was started for 1 to 4 nodes" in capsys.readouterr().err
    assert tree["spec"]["replicaSpecs"]["worker"]["replicas"] == 2


def test_scale_that_finds_no_room_ends_with_124(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    assert job("scale", "elastic-gpt", "--nodes", 3, "--timeout", 0.2) == 124
    assert "has not the nodes" in capsys.readouterr().err


def test_suspend_waits_until_no_node_is_left_and_resume_goes_on(stub: StubCluster, job: Job, capsys: Output) -> None:
    tree = running(stub)
    later(
        stub, lambda: [stub.objects.pop(("Pod", "training", f"elastic-gpt-edljob-worker-{rank}")) for rank in range(2)]
    )
    assert job("suspend", "elastic-gpt", "--timeout", PATIENCE) == 0
    assert tree["spec"]["suspend"] is True
    assert "no node is left" in capsys.readouterr().out
    assert job("status", "elastic-gpt") == 0
    assert "Suspended" in capsys.readouterr().out

    def come() -> None:
        for rank in range(2):
            stub.worker("elastic-gpt", rank)
        stub.logs["elastic-gpt-edljob-worker-0"] = [progress(30, 2)]

    later(stub, come)
    assert job("resume", "elastic-gpt", "--timeout", PATIENCE) == 0
    assert tree["spec"]["suspend"] is False


def test_suspend_removes_the_nodes_itself_where_no_master_runs(
    stub: StubCluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ALONE_SECONDS", 0.1)
    running(stub)
    del stub.objects["Pod", "training", "elasticjob-elastic-gpt-dlrover-master-0"]
    assert job("suspend", "elastic-gpt", "--timeout", PATIENCE) == 0
    assert not [key for key in stub.objects if key[0] == "Pod"]


def test_suspend_leaves_the_nodes_to_a_master_that_runs(
    stub: StubCluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ALONE_SECONDS", 0.1)
    running(stub)
    assert job("suspend", "elastic-gpt", "--timeout", 0.5) == 124
    assert len([key for key in stub.objects if key[0] == "Pod"]) == 3


def test_an_old_definition_that_drops_suspend_is_noticed(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    stub.drops = {"suspend"}
    assert job("suspend", "elastic-gpt") == 2
    assert "the newer: kubectl apply -f" in capsys.readouterr().err


@pytest.mark.parametrize(("phase", "code"), [("Succeeded", 0), ("Failed", 1)])
def test_waits_exit_code_is_the_jobs(stub: StubCluster, job: Job, phase: str, code: int, capsys: Output) -> None:
    tree = running(stub)
    condition = {"type": "Failed", "message": "The job master failed with exitcode=1."}

    def end() -> None:
        stub.master("elastic-gpt", 0, phase)
        tree["status"] = {"phase": phase, "status": {"conditions": [condition]}}

    later(stub, end)
    assert job("wait", "elastic-gpt", "--timeout", PATIENCE) == code
    assert ("exitcode=1" in capsys.readouterr().out) == (phase == "Failed")
    assert job("watch", "elastic-gpt") == code


def test_wait_ends_with_124_when_the_time_is_over(stub: StubCluster, job: Job) -> None:
    running(stub)
    assert job("wait", "elastic-gpt", "--timeout", 0.2) == 124


def test_delete_names_what_it_deletes_and_keeps_the_volume(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    assert job("delete", "elastic-gpt") == 0
    told = capsys.readouterr().out
    assert "elasticjob/elastic-gpt deleted\njob/elastic-gpt-prepare deleted\n" in told
    assert "volume elastic-gpt stays" in told
    assert stub.get("PersistentVolumeClaim", "elastic-gpt")
    assert stub.get("ServiceAccount", "elastic-gpt-master")  # other jobs' masters are it, too


def test_delete_with_the_volume_not_while_another_job_uses_it(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    assert job("submit", "other", "--data-of", "elastic-gpt") == 0
    assert job("delete", "elastic-gpt", "--volume") == 2
    assert "used by other" in capsys.readouterr().err
    assert job("delete", "other") == 0
    assert job("delete", "elastic-gpt", "--volume") == 0
    assert not stub.get("PersistentVolumeClaim", "elastic-gpt")


def test_serve_makes_a_deployment_of_the_jobs_image_volume_and_run_and_waits_until_it_answers(
    stub: StubCluster, job: Job, capsys: Output
) -> None:
    tree = running(stub)
    container = tree["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0]
    container["image"] = "registry.example.com/gpt:1"
    container["args"] = [
        "--run-dir=/workspace/elsewhere" if word.startswith("--run-dir=") else word for word in container["args"]
    ]
    ready = {"updatedReplicas": 1, "availableReplicas": 1}
    later(stub, lambda: stub.get("Deployment", "elastic-gpt-serve").update(status=ready))  # type: ignore[union-attr]
    assert job("serve", "elastic-gpt", "--timeout", PATIENCE) == 0
    told = capsys.readouterr().out
    assert told.startswith("deployment/elastic-gpt-serve created\nservice/elastic-gpt-serve created\n")
    assert "-n training port-forward service/elastic-gpt-serve 8080:80" in told
    made = stub.get("Deployment", "elastic-gpt-serve")
    assert made
    [serving] = made["spec"]["template"]["spec"]["containers"]
    assert serving["image"] == "registry.example.com/gpt:1"
    assert serving["args"][:4] == ["elastic-gpt", "serve", "/workspace/elsewhere", "--follow"]

    container["image"] = "registry.example.com/gpt:2"
    assert job("serve", "elastic-gpt") == 0
    assert "deployment/elastic-gpt-serve configured" in capsys.readouterr().out
    assert made["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example.com/gpt:2"
    assert job("delete", "elastic-gpt") == 0
    assert not stub.get("Deployment", "elastic-gpt-serve")
    assert not stub.get("Service", "elastic-gpt-serve")


def test_serve_gives_up_after_its_time_and_says_what_it_waits_for(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    assert job("serve", "elastic-gpt", "--timeout", "0") == 124
    assert "elastic-gpt's server is not ready" in capsys.readouterr().err


URLS = ("--data.dir=s3://bucket/data", "--run-dir", "s3://bucket/run")


def pods_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specifications in a manifest."""
    spec = tree.get("spec", {})
    replicas = [one["template"]["spec"] for one in spec.get("replicaSpecs", {}).values()]
    return [*replicas, spec["template"]["spec"]] if "template" in spec else replicas


def test_a_job_whose_data_and_run_are_urls_needs_no_volume_and_waits_for_nothing(
    stub: StubCluster, job: Job, capsys: Output
) -> None:
    assert job("submit", "mine", "--env-secret=keys", "--", *URLS) == 0
    assert {kind for kind, _, _ in stub.objects} == {"Namespace", "ServiceAccount", "Role", "RoleBinding", "ElasticJob"}
    tree = stub.get("ElasticJob", "mine")
    assert tree
    master, worker = pods_of(tree)
    assert "initContainers" not in worker
    assert {volume["name"] for volume in worker["volumes"]} == {"snapshots", "scratch"}
    assert {mount["name"] for mount in worker["containers"][0]["volumeMounts"]} == {"snapshots", "scratch"}
    assert worker["containers"][0]["args"][-3:] == [*URLS]
    assert worker["containers"][0]["args"].count("--run-dir") == 1
    assert worker["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert "envFrom" not in master["containers"][0]
    # Progress is in the pods' logs, wherever metrics.jsonl is.
    tree["status"] = {"phase": "Running"}
    stub.master("mine")
    stub.worker("mine", 0)
    stub.logs["mine-edljob-worker-0"] = [progress(1, 1, step=10, loss=2.5), entry(2, "hello")]
    capsys.readouterr()
    assert job("status", "mine") == 0
    assert "step 10/100 · loss 2.5000" in capsys.readouterr().out
    assert job("logs", "mine") == 0
    assert "hello" in capsys.readouterr().out
    tree["status"] = {"phase": "Succeeded"}
    assert job("wait", "mine") == 0
    capsys.readouterr()
    assert job("delete", "mine", "--volume", "--no-wait") == 2
    assert "job mine has no volume: leave --volume out" in capsys.readouterr().err
    assert job("delete", "mine") == 0
    assert "volume" not in capsys.readouterr().out


def test_text_for_data_at_a_url_is_prepared_there_and_waited_for(stub: StubCluster, job: Job) -> None:
    assert job("submit", "mine", "--env-secret=keys", "--text=https://example.com/a.txt", "--", *URLS) == 0
    made, tree = stub.get("Job", "mine-prepare"), stub.get("ElasticJob", "mine")
    assert made
    assert tree
    [container] = pods_of(made)[0]["containers"]
    assert "--output-dir=s3://bucket/data" in container["args"]
    [waiting] = pods_of(tree)[1]["initContainers"]
    assert waiting["args"] == ["elastic-gpt", "prepare", "--wait", "--output-dir=s3://bucket/data"]
    assert container["envFrom"] == waiting["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert stub.get("PersistentVolumeClaim", "elastic-gpt") is None


@pytest.mark.parametrize(
    "words",
    [
        ["--", "--data.dir=s3://bucket/data"],
        ["--", "--run-dir=s3://bucket/run"],
        ["--text=/workspace/a.txt", "--", *URLS],
        ["--", *URLS, "--checkpoint.dir=/workspace/checkpoints"],
    ],
    ids=["its run", "its data", "its text", "its checkpoints"],
)
def test_what_is_left_on_the_volume_needs_it(stub: StubCluster, job: Job, words: list[str]) -> None:
    assert job("submit", "mine", *words) == 0
    assert stub.get("PersistentVolumeClaim", "elastic-gpt")
    tree = stub.get("ElasticJob", "mine")
    assert tree
    assert actions.job_claim(tree) == "elastic-gpt"


def test_the_model_of_a_run_on_an_object_store_is_talked_to_and_served_from_there(stub: StubCluster, job: Job) -> None:
    job("submit", "mine", "--env-secret=keys", "--", *URLS)
    assert job("serve", "mine", "--no-wait") == 0
    served = stub.get("Deployment", "mine-serve")
    assert served
    [pod] = pods_of(served)
    assert pod["containers"][0]["args"][:3] == ["elastic-gpt", "serve", "s3://bucket/run"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {volume["name"] for volume in pod["volumes"]} == {"scratch"}


def test_data_of_another_job_and_data_at_a_url_exclude_each_other(stub: StubCluster, job: Job, capsys: Output) -> None:
    assert stub
    assert job("submit", "mine", "--data-of=other", "--", *URLS) == 2
    assert "--data-of other and --data.dir s3://bucket/data: leave one out" in capsys.readouterr().err
