"""Helpers of all tests of manifests: examples that a command renders, and schemas that find misspelt fields."""

import contextlib
import copy
import functools
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from elastic_gpt.jobs import commands

Tree = dict[str, Any]


def assert_first_line_renders(file: Path) -> None:
    """An example is what the command in its first line renders."""
    text = file.read_text()
    words = shlex.split(text.partition("\n")[0].removeprefix("# "))
    assert words[:3] == ["elastic-gpt", "job", "render"]
    rendered = io.StringIO()
    with contextlib.redirect_stdout(rendered):
        assert commands.main(words[2:]) == 0
    assert rendered.getvalue() == text, f"after a change of the renderer: {shlex.join(words)} > {file}"


@functools.cache
def crd_validator(path: Path, *inside: str) -> Any:
    """A validator of the v1alpha1 objects of a CustomResourceDefinition, or of the part `inside` them."""
    validator = pytest.importorskip("openapi_schema_validator").OAS30Validator
    if not path.exists():
        pytest.skip(f"no CustomResourceDefinition {path}: TEST_DATA names the folder (CONTRIBUTING.md)")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1alpha1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {}  # the CRD leaves it to the API server, as a bare object
    for field in inside:
        schema = schema["properties"][field]
    return validator(closed(schema))


def closed(schema: Any) -> Any:
    """The schema with every object closed to fields that it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


# What a pod can do without. Labels, the prompt's terminal and the server's probes have tests of their own.
OPTIONAL = {
    *(
        "imagePullPolicy",
        "imagePullSecrets",
        "readOnly",
        "optional",
        "fsGroupChangePolicy",
        "terminationGracePeriodSeconds",
    ),
    *("tolerations", "affinity", "nodeSelector", "envFrom", "initContainers", "serviceAccountName"),
    *("metadata", "stdin", "stdinOnce", "tty", "ports", "lifecycle", "startupProbe", "livenessProbe", "readinessProbe"),
}


def assert_whole(spec: Tree) -> None:
    """A pod mounts what it has, asks for what it may take, and is admitted where only restricted ones are."""
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    containers = [*spec["containers"], *spec.get("initContainers", [])]
    assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        assert len(volume) == 2, f"{volume} has no source: Kubernetes would take an empty folder"
        assert volume.get("configMap", {"name": "none"})["name"]
    assert spec["restartPolicy"] in ("Never", "OnFailure", "Always")
    assert "automountServiceAccountToken" in spec
    context = spec["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["runAsGroup"] == 10001
    if any("persistentVolumeClaim" in volume for volume in volumes.values()):
        assert context["fsGroup"] == context["runAsGroup"]  # else the volume is root's
    for container in containers:
        assert container["image"]
        assert container.get("args") or container.get("command")
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])  # DLRover's master fails without
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"name": "HOME", "value": "/tmp"} in container["env"]
        assert all(
            "value" in variable or variable["valueFrom"]["secretKeyRef"]["name"] for variable in container["env"]
        )
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/tmp"]["emptyDir"] == {}
        if "/dev/shm" in mounts:
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            assert mounts["/dev/shm"]["emptyDir"]["sizeLimit"]


def unnoticed(spec: Tree, validate: Callable[[Tree], object]) -> list[str]:
    """Fields of a pod, but for OPTIONAL ones and what is below them, that can go without assert_whole or `validate` failing."""
    found = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if key in OPTIONAL:
                continue
            walk(value, (*path, key))
            if isinstance(node, dict):
                broken = copy.deepcopy(spec)
                parent = broken
                for step in path:
                    parent = parent[step]
                del parent[key]
                try:
                    assert_whole(broken)
                    validate(broken)
                    found.append(".".join(map(str, (*path, key))))
                except (AssertionError, LookupError, kubernetes_validate.ValidationError):
                    pass

    walk(spec, ())
    return found


def lacking(tree: Tree, needed: tuple[str, ...]) -> list[str]:
    """Which of the fields `needed` (a.b; of a list, of each element) `tree` has not. Schemas call few fields required."""

    def lacks(node: Any, path: str) -> bool:
        step, _, rest = path.partition(".")
        if isinstance(node, list):
            return not node or any(lacks(one, path) for one in node)
        return node.get(step) in (None, "", [], {}) or (bool(rest) and lacks(node[step], rest))

    return [path for path in needed if lacks(tree, path)]


def without(tree: Tree, path: str) -> Tree:
    """A copy of `tree` without one field, in the first element of lists."""
    broken = copy.deepcopy(tree)
    node: Any = broken
    *steps, last = path.split(".")
    for step in steps:
        node = node[step] if isinstance(node[step], dict) else node[step][0]
    del node[last]
    return broken


def misspelt(tree: Tree, free: tuple[str, ...]) -> list[tuple[str, Tree]]:
    """Copies of `tree`, each with one field misspelt; below the fields `free` any name goes."""
    found: list[tuple[str, Tree]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        if isinstance(node, dict) and not (path and path[-1] in free):
            for key in node:
                broken = copy.deepcopy(tree)
                parent = broken
                for step in path:
                    parent = parent[step]
                parent[f"{key}x"] = parent.pop(key)
                found.append((".".join(map(str, (*path, key))), broken))
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            walk(value, (*path, key))

    walk(tree, ())
    return found
