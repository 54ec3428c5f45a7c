"""Sends the requests in a YAML stream to Vertex AI, in their order, and waits for the results.

    pip install google-cloud-aiplatform pyyaml
    elastic-gpt job render mine --as vertex > job.yaml              # then replace the words in <brackets>
    python examples/vertex/send.py < job.yaml

Each document is a request message of google-cloud-aiplatform, with the message's name as `kind`.
<endpoint> and <model> become the names of what the requests before made.
"""

import re
import sys
from typing import Any

import yaml
from google.cloud import aiplatform_v1
from google.protobuf import json_format

Tree = dict[str, Any]

SENT = {
    "CreateCustomJobRequest": (aiplatform_v1.JobServiceClient, "create_custom_job"),
    "UploadModelRequest": (aiplatform_v1.ModelServiceClient, "upload_model"),
    "CreateEndpointRequest": (aiplatform_v1.EndpointServiceClient, "create_endpoint"),
    "DeployModelRequest": (aiplatform_v1.EndpointServiceClient, "deploy_model"),
}


def request(tree: Tree) -> Any:
    """The request message. Raises ValueError for an unknown field or kind."""
    fields = dict(tree)
    kind = fields.pop("kind", None)
    if kind not in SENT:
        raise ValueError(f"kind {kind}: choose from {', '.join(SENT)}")
    message = getattr(aiplatform_v1, kind)()
    try:
        json_format.ParseDict(fields, message._pb)
    except json_format.ParseError as error:
        raise ValueError(f"{kind}: {error}") from error
    return message


def send(trees: list[Tree]) -> list[str]:
    """Send all requests to their region. Returns the names of the objects that were made."""
    known: dict[str, str] = {}
    names = []
    for tree in trees:
        message = request(filled(tree, known))
        place = getattr(message, "parent", "") or getattr(message, "endpoint", "")
        region = place.split("/")[3]
        client, method = SENT[tree["kind"]]
        options = {"api_endpoint": f"{region}-aiplatform.googleapis.com"}
        made = getattr(client(client_options=options), method)(request=message)
        if hasattr(made, "result"):  # an operation; deploying takes a quarter of an hour
            made = made.result(timeout=3600)
        name = getattr(made, "name", "") or getattr(made, "model", "") or place
        known |= {"CreateEndpointRequest": {"<endpoint>": name}, "UploadModelRequest": {"<model>": name}}.get(
            tree["kind"], {}
        )
        print(f"{tree['kind']}: {name}", flush=True)
        names.append(name)
    return names


def filled(node: Any, known: dict[str, str]) -> Any:
    """`node` with known <words> replaced. Raises ValueError for an unknown one."""
    if isinstance(node, dict):
        return {key: filled(value, known) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, known) for value in node]
    if isinstance(node, str):
        for word, value in known.items():
            node = node.replace(word, value)
        if left := re.search(r"<[^<>]+>", node):
            raise ValueError(f"{left[0]} in '{node}': replace it by what your project has")
    return node


if __name__ == "__main__":
    try:
        send(list(yaml.safe_load_all(sys.stdin)))
    except ValueError as error:
        sys.exit(f"error: {error}")
