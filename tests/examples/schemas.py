"""Helpers of all tests of manifests: examples that a command renders, and schemas that find misspelt fields."""

import contextlib
import copy
import functools
import io
import shlex
from pathlib import Path
from typing import Any

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
        pytest.skip(f"no CustomResourceDefinition at {path}")
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
