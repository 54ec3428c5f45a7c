"""examples/compose/compose.yaml: Compose's words, and its services run here as Compose would order and start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import PATIENCE, TINY, environment, events, metrics
from tests.examples.schemas import lacking, misspelt, without
from tests.examples.test_torchrun import free_port

FILE = Path(__file__).parents[2] / "examples" / "compose" / "compose.yaml"
Tree = dict[str, Any]

# The words of the Compose specification that this file may use; x- ones are free.
TOP = {"name", "services", "volumes"}
SERVICE = {
    *(
        "image",
        "command",
        "volumes",
        "environment",
        "shm_size",
        "stop_grace_period",
        "depends_on",
        "hostname",
        "restart",
    ),
}
RUN = ("image", "command", "volumes")
NODE = (
    *(*RUN, "shm_size", "stop_grace_period", "restart", "depends_on.prepare.condition"),
    "environment.TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
)
NEEDED = {"prepare": RUN, "first": (*NODE, "hostname"), "node": NODE}


def example() -> Tree:
    tree: Tree = yaml.safe_load(FILE.read_text())
    return tree


def wrong(tree: Tree) -> list[str]:
    found = [name for name in tree if name not in TOP and not name.startswith("x-")]
    found += [name for name in ("services", "volumes") if name not in tree]
    services = tree.get("services", {})
    found += sorted(set(NEEDED) ^ set(services))
    for name, service in services.items():
        found += [f"{name}.{word}" for word in service if word not in SERVICE]
        found += [f"{name} lacks {word}" for word in lacking(service, NEEDED.get(name, ()))]
        for mount in service.get("volumes", []):
            found += [mount] if mount.partition(":")[0] not in tree.get("volumes", {}) else []
        for other, how in service.get("depends_on", {}).items():
            good = other in services and how == {"condition": "service_completed_successfully"}
            found += [] if good else [f"{name}.depends_on.{other}"]
    return found


def test_compose_knows_every_word_and_a_misspelt_or_missing_one_is_caught() -> None:
    assert wrong(example()) == []
    for service, words in NEEDED.items():
        for word in words:
            assert wrong(without(example(), f"services.{service}.{word}")), f"{service}.{word}"
    cases = [(where, broken) for where, broken in misspelt(example(), free=("x-node", "environment"))]
    assert [where for where, broken in cases if not where.startswith("x-node") and not wrong(broken)] == []


def test_the_nodes_look_for_the_first_by_its_host_name() -> None:
    services = example()["services"]
    for name in ("first", "node"):
        assert f"--rdzv-endpoint={services['first']['hostname']}:29500" in services[name]["command"]


@pytest.mark.slow
def test_the_services_prepare_and_then_train_together(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    services, port = example()["services"], free_port()
    flags = [*TINY, "--steps=40", "--evaluate.interval=0"]

    def start(name: str) -> subprocess.Popen[str]:
        words = [word.replace("/workspace", str(tmp_path)) for word in services[name]["command"]]
        words = [word.replace("first:29500", f"127.0.0.1:{port}").replace("1:8", "2:2") for word in words]
        more = services[name].get("environment", {})
        return subprocess.Popen(
            words + flags * (name != "prepare"),
            env=environment(**more, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    started = [start("prepare")]
    try:
        assert started[0].wait(PATIENCE) == 0
        started += [start("first"), start("node")]
        said = [node.communicate(timeout=PATIENCE)[0] for node in started[1:]]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert [event["world_size"] for event in events(tmp_path / "run", "joined")] == [2]
    assert len(metrics(tmp_path / "run")) == 40
