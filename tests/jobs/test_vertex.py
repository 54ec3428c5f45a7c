"""Vertex AI: requests that its own types take, and an entry point that starts our elastic run from CLUSTER_SPEC."""

import contextlib
import copy
import importlib.util
import io
import json
import os
import shlex
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_gpt.jobs import commands, vertex
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.settings import SettingsError
from tests.conftest import PATIENCE, TINY, events, metrics
from tests.examples.schemas import lacking, misspelt, without
from tests.examples.test_torchrun import free_port
from tests.jobs.test_ads import run

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "vertex"
NEEDS = "pip install -c constraints.txt google-cloud-aiplatform"
Tree = dict[str, Any]

DOCUMENTS: dict[str, Tree] = {
    tree["kind"]: tree
    for name in ("job", "serve")
    for tree in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())
}
# What the API's reference calls required.
NEEDED: dict[str, tuple[str, ...]] = {
    "CreateCustomJobRequest": (
        *("parent", "customJob.displayName", "customJob.jobSpec.workerPoolSpecs.machineSpec.machineType"),
        *(f"customJob.jobSpec.workerPoolSpecs.{name}" for name in ("replicaCount", "containerSpec.imageUri")),
        # What the machine of this example, and the entry point, want besides.
        *(f"customJob.jobSpec.workerPoolSpecs.machineSpec.{name}" for name in ("acceleratorType", "acceleratorCount")),
        *(f"customJob.jobSpec.workerPoolSpecs.containerSpec.{name}" for name in ("args", "env.name", "env.value")),
    ),
    "UploadModelRequest": (
        *("parent", "model.displayName", "model.artifactUri", "model.containerSpec.imageUri"),
        *("model.containerSpec.healthRoute", "model.containerSpec.predictRoute", "model.containerSpec.args"),
    ),
    "CreateEndpointRequest": ("parent", "endpoint.displayName"),
    "DeployModelRequest": (
        *("endpoint", "deployedModel.model", "trafficSplit"),
        *(f"deployedModel.dedicatedResources.{name}" for name in ("machineSpec.machineType", "minReplicaCount")),
        *(f"deployedModel.dedicatedResources.machineSpec.{name}" for name in ("acceleratorType", "acceleratorCount")),
    ),
}
every_request = pytest.mark.parametrize("tree", DOCUMENTS.values(), ids=DOCUMENTS)


@pytest.fixture(scope="module")
def send() -> Any:
    """examples/vertex/send.py, with google-cloud-aiplatform behind it."""
    pytest.importorskip("google.cloud.aiplatform_v1", reason=NEEDS)
    spec = importlib.util.spec_from_file_location("send", FOLDER / "send.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["job.yaml", "serve.yaml"])
def test_an_example_is_what_the_command_in_its_first_line_renders(name: str) -> None:
    text = (FOLDER / name).read_text()
    words = shlex.split(text.partition("\n")[0].removeprefix("# "))
    rendered = io.StringIO()
    with contextlib.redirect_stdout(rendered):
        assert commands.main(words[2:]) == 0
    assert rendered.getvalue() == text, f"after a change of the renderer: {shlex.join(words)} > examples/vertex/{name}"


@every_request
def test_vertex_ais_types_take_it_and_give_it_back(send: Any, tree: Tree) -> None:
    from google.protobuf import json_format

    back = json_format.MessageToDict(send.request(tree)._pb)
    given = {name: value for name, value in copy.deepcopy(tree).items() if name != "kind"}
    for pool in given.get("customJob", {}).get("jobSpec", {}).get("workerPoolSpecs", []):
        pool["replicaCount"] = str(pool["replicaCount"])  # 64 bits are text in JSON
    assert back == given


@every_request
def test_a_misspelt_field_is_refused(send: Any, tree: Tree) -> None:
    cases = [case for case in misspelt(tree, free=("trafficSplit",)) if case[0] != "kind"]
    assert len(cases) >= 3
    for where, broken in cases:
        with pytest.raises(ValueError, match=f"{where.rpartition('.')[2]}x"):
            send.request(broken)


@every_request
def test_it_has_what_the_api_asks_for_and_a_missing_field_is_caught(tree: Tree) -> None:
    needed = NEEDED[tree["kind"]]  # proto-plus' types do not tell
    assert lacking(tree, needed) == []
    for path in needed:
        assert path in lacking(without(tree, path), needed)


class Google:
    """A stand-in for the API: takes requests over gRPC, as the client sends them, and answers with finished operations."""

    def __init__(self) -> None:
        import grpc
        from google.cloud import aiplatform_v1
        from google.longrunning import operations_pb2

        self.seen: list[Any] = []
        made = {
            "CreateCustomJob": (aiplatform_v1.CreateCustomJobRequest, aiplatform_v1.CustomJob(name="jobs/1"), False),
            "UploadModel": (
                aiplatform_v1.UploadModelRequest,
                aiplatform_v1.UploadModelResponse(model="models/2"),
                True,
            ),
            "CreateEndpoint": (
                aiplatform_v1.CreateEndpointRequest,
                aiplatform_v1.Endpoint(name="projects/p/locations/r/endpoints/3"),
                True,
            ),
            "DeployModel": (aiplatform_v1.DeployModelRequest, aiplatform_v1.DeployModelResponse(), True),
        }

        def handler(details: Any) -> Any:
            kind, answer, waits = made[details.method.rpartition("/")[2]]

            def answered(data: bytes, _: Any) -> bytes:
                self.seen.append(kind.deserialize(data))
                if not waits:
                    return bytes(type(answer).serialize(answer))
                operation = operations_pb2.Operation(name="operations/1", done=True)
                operation.response.Pack(type(answer).pb(answer))
                return bytes(operation.SerializeToString())

            return grpc.unary_unary_rpc_method_handler(answered)

        self.server = grpc.server(ThreadPoolExecutor(1))
        generic = type("Handler", (grpc.GenericRpcHandler,), {"service": lambda _, details: handler(details)})
        self.server.add_generic_rpc_handlers([generic()])
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}")
        self.server.start()

    def client(self, kind: Any) -> Any:
        return lambda **_: kind(transport=kind.get_transport_class("grpc")(channel=self.channel))


def known(tree: Tree) -> Tree:
    """With the words that only a project knows filled in, but for what requests before it make."""
    text = json.dumps(tree).replace("<project>", "p").replace("<region>", "r")
    for word in ("bucket", "repository"):
        text = text.replace(f"<{word}>", word.replace(" ", "-"))
    return dict(json.loads(text))


def test_job_model_and_endpoint_are_made_and_the_model_is_deployed_on_the_endpoint(
    send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    google = Google()
    try:
        clients = {kind: (google.client(client), method) for kind, (client, method) in send.SENT.items()}
        monkeypatch.setattr(send, "SENT", clients)
        names = send.send([known(tree) for tree in DOCUMENTS.values()])
    finally:
        google.server.stop(None)
    place = "projects/p/locations/r/endpoints/3"
    assert names == ["jobs/1", "models/2", place, place]
    job, model, _, deployment = google.seen
    assert [pool.replica_count for pool in job.custom_job.job_spec.worker_pool_specs] == [1, 1]
    assert model.model.container_spec.args == ["elastic-gpt", "serve"]
    assert (deployment.endpoint, deployment.deployed_model.model) == (place, "models/2")
    assert dict(deployment.traffic_split) == {"0": 100}


def test_a_word_that_only_the_project_knows_is_asked_for(send: Any) -> None:
    with pytest.raises(ValueError, match=r"<project> in 'projects/<project>/locations/<region>': replace it"):
        send.send([DOCUMENTS["CreateEndpointRequest"]])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (JobSpec(upload=(("a.txt", "one"),)), r"a\.txt: Vertex AI takes no file from here"),
        (JobSpec(node_selector=(("a", "b"),)), "--node-selector: no effect on Vertex AI; leave it out"),
        (JobSpec(cpus=64), "--cpus: no effect on Vertex AI beside GPUs"),
        (JobSpec(arguments=("--run-dir=/there/run",)), r"--run-dir /there/run: a folder of one machine.*<bucket>/run"),
        (JobSpec(gpus=3), "--gpus 3: machines on Vertex AI have 1, 2, 4 or 8"),
        (JobSpec(gpus=0, cpus=64), "largest machine"),
    ],
)
def test_what_vertex_ai_has_not_is_refused(spec: JobSpec, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        vertex.job(spec)


def test_a_bucket_that_vertex_ai_mounts_is_a_place() -> None:
    [tree] = vertex.job(JobSpec(arguments=("--run-dir=/gcs/bucket/run",)))
    assert "--run-dir=/gcs/bucket/run" in tree["customJob"]["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]


def test_a_job_on_spot_machines_with_one_node_has_one_pool() -> None:
    [tree] = vertex.job(JobSpec(nodes=1, min_nodes=1, gpus=0, spot=True))
    body = tree["customJob"]["jobSpec"]
    assert body["scheduling"]["strategy"] == "SPOT"
    assert [pool["replicaCount"] for pool in body["workerPoolSpecs"]] == [1]


@pytest.mark.parametrize(
    "told", ["", "{}", '{"cluster": {"workerpool0": []}, "task": {"type": "workerpool0", "index": 0}}']
)
def test_a_replica_without_its_cluster_spec_says_who_sets_it(told: str) -> None:
    replica = run(FOLDER / "replica.py", ["debug_cpu", "--data.dir=x"], {"CLUSTER_SPEC": told})
    said, _ = replica.communicate(timeout=PATIENCE)
    assert replica.returncode == 2
    assert said == f"error: CLUSTER_SPEC ({told}): start this as a CustomJob of Vertex AI, which sets it\n"


@pytest.mark.slow
def test_two_replicas_train_together_from_their_cluster_spec(s3_server: str, tmp_path: Path) -> None:
    """An S3 server (moto) stands in for Cloud Storage."""
    pytest.importorskip("torch")
    from tests.nanogpt.test_places import fetched

    assert s3_server
    bucket = f"s3://bucket/{uuid.uuid4().hex}"
    flags = (*TINY, "--steps=40", "--evaluate.interval=0")
    [tree] = vertex.job(JobSpec(nodes=2, min_nodes=2, gpus=0, tokenizer="char", arguments=flags))
    port = str(free_port())
    cluster = {f"workerpool{number}": ["127.0.0.1:2222"] for number in range(2)}
    replicas = []
    for number, pool in enumerate(tree["customJob"]["jobSpec"]["workerPoolSpecs"]):
        container = pool["containerSpec"]
        task = {"type": f"workerpool{number}", "index": 0}
        more = {one["name"]: one["value"] for one in container["env"]} | {"RENDEZVOUS_PORT": port}
        more["CLUSTER_SPEC"] = json.dumps({"cluster": cluster, "environment": "cloud", "task": task, "job": "{}"})
        more["XDG_CACHE_HOME"] = str(tmp_path / str(number))  # each replica has a disk of its own
        words = [word.replace(vertex.BUCKET, bucket) for word in container["args"][2:]]
        replicas.append(run(FOLDER / "replica.py", words, more))
    try:
        said = [replica.communicate(timeout=PATIENCE)[0] for replica in replicas]
    finally:
        for replica in replicas:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(replica.pid, signal.SIGKILL)
    assert [replica.returncode for replica in replicas] == [0, 0], said
    folder = fetched(f"{bucket}/elastic-gpt", tmp_path / "run")
    assert len(metrics(folder)) == 40
    assert [event["world_size"] for event in events(folder, "joined")] == [2]
    assert list(folder.glob("checkpoints/step_00000040/model.safetensors"))
    assert all(list((tmp_path / str(number) / "elastic-gpt" / "data").iterdir()) for number in range(2))
