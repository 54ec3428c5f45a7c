"""Kubeflow Pipelines: text -> tokens -> model -> numbers and an export, as one pipeline; and two others from the same commands.

    pip install kfp                                    # in an environment of its own: it wants an older kubernetes and protobuf
    IMAGE=registry.example.com/elastic-gpt-kfp:0.1.0 python examples/pipelines/gpt.py gpt gpt.yaml

- `gpt` prepares, trains, evaluates and exports, each in a pod of its own; tokens, run and export are artifacts.
- `gpt_trainjobs` makes Kubeflow Trainer's three TrainJobs (examples/kubeflow/), one after the other, and waits for each.
- `gpt_vertex` is `gpt` and then an endpoint of Vertex AI that answers with the model; IMAGE is then made from the one of
  examples/vertex/Dockerfile.

Each step is a function whose source travels alone: it imports what it needs. IMAGE is of examples/pipelines/Dockerfile.
"""

import os
import sys

from kfp import compiler, dsl

IMAGE = os.environ.get("IMAGE", "registry.example.com/elastic-gpt-kfp:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(text: str, tokenizer: str, data: dsl.Output[dsl.Dataset]) -> None:
    """Text (a URL that fsspec knows, or nothing for the sample) to tokens."""
    import json
    import pathlib
    import subprocess

    words = [text or "--sample", f"--tokenizer={tokenizer}", f"--output-dir={data.path}"]
    subprocess.run(["elastic-gpt", "prepare", *words], check=True)
    data.metadata.update(json.loads((pathlib.Path(data.path) / "meta.json").read_text()))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(preset: str, flags: list, data: dsl.Input[dsl.Dataset], run: dsl.Output[dsl.Model]) -> None:
    """The run directory: configuration, checkpoints, metrics, ledger and tokenizer."""
    import subprocess

    words = [preset, f"--data.dir={data.path}", f"--run-dir={run.path}", *flags]
    subprocess.run(["elastic-gpt", "train", *words], check=True)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(run: dsl.Input[dsl.Model], data: dsl.Input[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]) -> None:
    """Loss, perplexity and bits per byte on the text that was held out."""
    import json
    import subprocess

    words = [run.path, f"--data={data.path}", "--json"]
    told = subprocess.run(["elastic-gpt", "evaluate", *words], check=True, stdout=subprocess.PIPE).stdout
    for name, value in json.loads(told).items():
        if isinstance(value, (int, float)):
            metrics.log_metric(name, value)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(run: dsl.Input[dsl.Model], model: dsl.Output[dsl.Model]) -> None:
    """The model and its tokenizer for Hugging Face's transformers, and for `elastic-gpt serve`."""
    import subprocess

    subprocess.run(["elastic-gpt", "export", run.path, model.path], check=True)
    model.metadata["framework"] = "transformers"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(name: str, image: str, project: str, region: str, model: dsl.Input[dsl.Model]) -> None:
    """The exported model in Vertex AI's registry, and on an endpoint of its own."""
    import subprocess
    import sys

    words = [name, "--as=vertex", "--only=model,endpoint,deployment", f"--image={image}"]
    render = ["elastic-gpt", "job", "render", *words]
    requests = subprocess.run(render, check=True, text=True, stdout=subprocess.PIPE).stdout
    for word, value in {
        f"gs://<bucket>/{name}/model": model.uri,
        "<project>": project,
        "<region>": region,
    }.items():
        requests = requests.replace(word, value)
    subprocess.run([sys.executable, "/opt/elastic-gpt/vertex/send.py"], check=True, text=True, input=requests)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def trainjob(step: str, options: list) -> None:
    """Makes a TrainingRuntime and its TrainJob and waits. Raises RuntimeError if the TrainJob fails.

    Objects that exist already stay as they are, so that a step that is tried again waits for those of its first try.
    """
    import subprocess
    import time

    import yaml
    from kubernetes import client, config

    words = ["elastic-gpt", "job", "render", "--as=trainjob", f"--only={step}", *options]
    rendered = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout
    config.load_config()
    api = client.CustomObjectsApi()
    for tree in yaml.safe_load_all(rendered):
        group, version = tree["apiVersion"].split("/")
        where = (group, version, tree["metadata"]["namespace"], f"{tree['kind'].lower()}s")
        try:
            api.create_namespaced_custom_object(*where, tree)
        except client.ApiException as error:
            if error.status != 409:
                raise
    while True:
        status = api.get_namespaced_custom_object(*where, tree["metadata"]["name"]).get("status", {})
        ended = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
        if "Complete" in ended:
            return
        if "Failed" in ended:
            raise RuntimeError(f"trainjob {tree['metadata']['name']} failed: {ended['Failed'].get('message', '')}")
        time.sleep(2)


@dsl.pipeline(name="gpt", description="Text to a model that was measured and exported")
def gpt(text: str = "", tokenizer: str = "gpt2", preset: str = "gpt2_124m", flags: list = []) -> dsl.Model:  # noqa: B006
    data = prepare(text=text, tokenizer=tokenizer).outputs["data"]
    # A step's result is kept and taken again while its inputs are the same. For a GPU, here and below:
    # .set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)
    run = train(preset=preset, flags=flags, data=data).outputs["run"]
    evaluate(run=run, data=data)
    return export(run=run).outputs["model"]


# The toy of examples/kubeflow/, whose volume of 128 Mi has room for its 11 MB a checkpoint, and not for GPT-2's 1.5 GB.
TOY = [f"--image={IMAGE}", "--volume=gpt-pvc", "--gpus=0", "--preset=kubeflow_toy", "--tokenizer=word"]


@dsl.pipeline(
    name="gpt-trainjobs", description="Kubeflow Trainer's three steps; the last one ends when its person does"
)
def gpt_trainjobs(options: list = TOY) -> None:
    before = None
    for step in ("load-corpus", "train-gpt", "generative-prompt"):
        task = trainjob(step=step, options=options).set_caching_options(False).set_display_name(step)
        before = task.after(before) if before else task


@dsl.pipeline(name="gpt-vertex", description="Text to an endpoint of Vertex AI")
def gpt_vertex(
    project: str,
    region: str,
    name: str = "elastic-gpt",
    text: str = "",
    tokenizer: str = "gpt2",
    preset: str = "gpt2_124m",
    flags: list = [],  # noqa: B006
) -> None:
    model = gpt(text=text, tokenizer=tokenizer, preset=preset, flags=flags).output
    task = deploy(name=name, image=IMAGE, project=project, region=region, model=model)
    task.set_caching_options(False)  # what it made may be gone


PIPELINES = {"gpt": gpt, "gpt_trainjobs": gpt_trainjobs, "gpt_vertex": gpt_vertex}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PIPELINES:
        sys.exit(f"error: python gpt.py PIPELINE FILE: PIPELINE is one of {', '.join(PIPELINES)}")
    compiler.Compiler().compile(PIPELINES[sys.argv[1]], sys.argv[2])
