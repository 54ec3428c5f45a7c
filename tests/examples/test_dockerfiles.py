"""What the image must have, as far as its files tell. Nothing is built here; `make test-image` does that."""

import os
import re
import stat
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from elastic_gpt.jobs import vertex
from tests.examples.test_pipelines import KFP

REPO = Path(__file__).parents[2]
DOCKERFILE, INSTALL = REPO / "Dockerfile", REPO / "docker" / "install.sh"
IGNORE = (REPO / ".dockerignore").read_text().splitlines()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
CODE = {"prepare", "model_zoo", "elastic_gpt"}
WORDS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}


def instructions() -> list[str]:
    """One string an instruction, without comments and line breaks."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    return [re.sub(r"\s+", " ", line).strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def stages() -> dict[str, list[str]]:
    """The instructions by stage; "" is what stands before the first, and "last" the image."""
    found: dict[str, list[str]] = {"": []}
    for line in instructions():
        if line.startswith("FROM "):
            found[line.partition(" AS ")[2] or "last"] = []
        list(found.values())[-1].append(line)
    return found


def last(word: str) -> str:
    return [line for line in stages()["last"] if line.startswith(f"{word} ")][-1].removeprefix(f"{word} ")


def pins(file: str) -> dict[str, str]:
    lines = re.findall(r"^([^#\s]\S*)==(\S+)$", (REPO / file).read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


def test_every_line_says_something_that_a_builder_understands() -> None:
    earlier: set[str] = set()
    before = {line.split()[1].partition("=")[0] for line in stages()[""]}
    for name, lines in stages().items():
        arguments: set[str] = set()
        for line in lines:
            word, _, rest = line.partition(" ")
            assert word in WORDS, line
            known = before if word == "FROM" else arguments | {"PATH"}
            assert set(re.findall(r"\$\{?([A-Z_]+)", rest)) <= known, f"{line}: not declared by ARG in this stage"
            if word == "ARG":
                arguments.add(rest.partition("=")[0])
                assert "=" in rest or rest in before, f"{line}: has no default"
            for source in re.findall(r"--from=(\S+)", rest):
                assert source in earlier, line
            if word == "FROM":
                assert rest.split()[0] in {"${PYTHON_IMAGE}", *earlier}, line
        earlier.add(name)
    asked = set(re.findall(r"\$\{?([A-Z_]+)", INSTALL.read_text()))  # install.sh ends at one that is not there
    assert asked <= {line.split()[1].partition("=")[0] for line in stages()["dependencies"] if line.startswith("ARG ")}


def test_the_image_does_not_run_as_root() -> None:
    user, group = last("USER").split(":")
    assert user.isdecimal()  # Kubernetes cannot check runAsNonRoot for a name
    assert int(user) > 0
    assert f"groupadd --gid {group} " in DOCKERFILE.read_text()
    assert f"useradd --uid {user} --gid {group} " in DOCKERFILE.read_text()
    contexts = [node for node in manifest_nodes() if "runAsUser" in node]
    assert contexts
    for context in contexts:
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))


def test_signals_go_through_tini() -> None:
    assert last("ENTRYPOINT") == '["/usr/bin/tini", "--"]'
    assert re.search(r"apt-get install [^&]*\btini\b", " ".join(stages()["last"]))
    containers = [node for node in manifest_nodes() if str(node.get("image", "")).startswith("elastic-gpt")]
    assert containers
    assert not [node for node in containers if "command" in node]  # it would replace the entrypoint


def manifest_nodes() -> Iterator[dict[str, Any]]:
    """Every mapping in the example manifests, however deep."""

    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            yield from walk(child)

    for path in sorted((REPO / "examples/elasticjob").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield from walk(document)


def test_the_image_holds_the_code_and_no_data() -> None:
    lines = instructions()
    assert not [line for line in lines if line.startswith("ADD ")]
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from=" not in line]
    copied = {word for words in copies for word in words}
    assert copied - CODE == {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
        *("docker/install.sh", "docker/cuda-constraints.txt"),
    }
    assert all((REPO / name).exists() for name in copied)
    assert IGNORE[1] == "*"
    assert {line[1:] for line in IGNORE if line.startswith("!")} == copied
    assert {pattern.partition("*")[0] for pattern in packages()} == CODE


def packages() -> list[str]:
    tool = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]
    return list(tool["setuptools"]["packages"]["find"]["include"])


def test_the_versions_are_the_pinned_ones() -> None:
    assert "pip install --no-cache-dir -c constraints.txt " in INSTALL.read_text()
    assert f'image.version="{PROJECT["version"]}"' in DOCKERFILE.read_text()
    both = pins("constraints.txt").items() | pins("docker/cuda-constraints.txt").items()
    assert len(dict(both)) == len(both), "a package is pinned to two versions"
    assert {"torch"} <= set(pins("constraints.txt")) - set(pins("docker/cuda-constraints.txt"))


def test_the_extras_are_ones_that_the_project_has() -> None:
    (extras,) = (line.partition("=")[2] for line in instructions() if line.startswith("ARG EXTRAS="))
    assert {"train"} <= set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_a_change_of_the_code_leaves_the_layer_of_the_dependencies() -> None:
    copied = [line for line in stages()["dependencies"] if line.startswith("COPY ")]
    assert copied == ["COPY pyproject.toml constraints.txt docker/cuda-constraints.txt docker/install.sh ./"]
    copied = [line for line in stages()["last"] if line.startswith("COPY ")]
    assert copied == ["COPY --from=dependencies /opt/venv /opt/venv", "COPY --from=package /package /opt/venv"]


PYTHON = """\
#!/bin/sh
# Stands for the base's python3 and for the environment's. Makes the environment, writes down what pip is asked, and has
# torch in the version of $FOUND.
case "$*" in
"-m venv "*)
    for folder in bin lib/python3.11/site-packages/torch/bin lib/python3.11/site-packages/torch/include \\
        lib/python3.11/site-packages/numpy/tests/data lib/python3.11/site-packages/torch/testing; do mkdir -p "$4/$folder"; done
    cp "$0" "$4/bin/python3"
    cd "$4/lib/python3.11/site-packages"
    touch torch/bin/torch_shm_manager torch/bin/test_api numpy/tests/data/x numpy/libx.a torch/testing/__init__.pyc ;;
"-m pip "*) echo "$* index=$PIP_EXTRA_INDEX_URL" >>pip.log ;;
-c*) echo "$FOUND" ;;
esac
"""


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs docker/install.sh in tmp_path with a python3 that installs nothing."""
    python = tmp_path / "path" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    for name in ("pyproject.toml", "constraints.txt", "docker/cuda-constraints.txt"):
        (tmp_path / Path(name).name).write_text((REPO / name).read_text())

    def run(found: str, **arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"VARIANT": "cuda", "EXTRAS": "train,serve,s3", "TORCH_VERSION": "", "PIP_EXTRA_INDEX_URL": ""}
        environment |= arguments | {"FOUND": found, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        command = ["sh", str(INSTALL), str(tmp_path / "venv")]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_cuda_variant_takes_torch_from_pypi_with_the_pinned_cuda(install: Any, tmp_path: Path) -> None:
    assert install("2.13.0").returncode == 0
    assert (tmp_path / "pip.log").read_text().splitlines()[0].endswith(" -c constraints.txt .[train,serve,s3] index=")
    assert "nvidia-nccl" in (tmp_path / "constraints.txt").read_text()
    assert (tmp_path / "venv/lib/python3.11/site-packages/torch/include").is_dir()  # torch.compile needs them


def test_another_variant_takes_it_from_pytorch_s_index_unless_one_is_named(install: Any, tmp_path: Path) -> None:
    assert install("2.13.0+cu126", VARIANT="cu126").returncode == 0
    assert install("2.13.0+cpu", VARIANT="cpu", PIP_EXTRA_INDEX_URL="file:///mirror").returncode == 0
    log = [line for line in (tmp_path / "pip.log").read_text().splitlines() if " install " in line]
    assert [line.partition("index=")[2] for line in log] == ["https://download.pytorch.org/whl/cu126", "file:///mirror"]
    assert (tmp_path / "constraints.txt").read_text() == (REPO / "constraints.txt").read_text()


def test_another_torch_brings_its_own_cuda(install: Any, tmp_path: Path) -> None:
    assert install("2.12.1", TORCH_VERSION="2.12.1").returncode == 0
    constraints = (tmp_path / "constraints.txt").read_text()
    assert re.findall(r"^torch==.*$", constraints, re.M) == ["torch==2.12.1"]
    assert "nvidia-nccl" not in constraints


@pytest.mark.parametrize(("variant", "found"), [("cuda", "2.13.0+cpu"), ("cpu", "2.13.0"), ("gpu", "2.13.0")])
def test_a_torch_of_another_variant_is_an_error_and_not_a_surprise(install: Any, variant: str, found: str) -> None:
    done = install(found, VARIANT=variant)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"VARIANT is {variant}, but pip found torch {found}" in done.stderr


def test_what_no_container_runs_is_taken_out_and_nothing_else(install: Any, tmp_path: Path) -> None:
    install("2.13.0+cpu", VARIANT="cpu")
    packages = tmp_path / "venv/lib/python3.11/site-packages"
    left = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    assert left == {"torch/bin/torch_shm_manager", "torch/testing/__init__.pyc"}
    assert not (packages / "torch/include").exists()


# Images made from ours: what they install into it, and which files they have to have, by what looks for them there.
REPLICA = PurePosixPath(vertex.REPLICA)
DERIVED: dict[str, tuple[list[str], set[PurePosixPath]]] = {
    "pipelines": (["--no-deps", KFP], set()),
    "vertex": (
        ["gcsfs", "google-cloud-aiplatform"],
        {
            *(REPLICA, REPLICA.with_name("send.py")),  # the second is what the pipeline that deploys calls
            *(REPLICA.parents[1] / "torchrun" / name for name in ("prepared.sh", "train.sh")),
        },
    ),
}


def faults(name: str, text: str) -> list[str]:
    """What examples/NAME/Dockerfile lacks, built with examples/ as its context."""
    packages, needed = DERIVED[name]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [line for line in lines if line.partition(" ")[0] not in WORDS]
    copied: set[PurePosixPath] = set()
    for *sources, target in (line.split()[1:] for line in lines if line.startswith("COPY ")):
        for source in sources:
            path = REPO / "examples" / source
            found += [] if path.exists() else [f"no {source}"]
            copied |= {PurePosixPath(target) / file.name for file in (path.iterdir() if path.is_dir() else [path])}
    found += [f"no {path}" for path in needed - copied]
    found += sorted({"ARG IMAGE=elastic-gpt:0.1.0", "FROM ${IMAGE}"} - set(lines))
    users = [line.partition(" ")[2] for line in lines if line.startswith("USER ")]
    found += [] if users == ["root", last("USER")] else ["USER"]
    # The environment is first in the image's PATH, and its Python has no pip.
    pip = "RUN PATH=${PATH#/opt/venv/bin:} python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir"
    return found + ([] if " ".join([pip, *packages]) in lines else ["packages"])


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_image_has_what_its_steps_call_and_a_line_that_is_missing_or_misspelt_is_caught(name: str) -> None:
    text = (REPO / "examples" / name / "Dockerfile").read_text()
    assert faults(name, text) == []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            for broken in ("", f"X{line}"):
                assert faults(name, "".join([*lines[:number], broken, *lines[number + 1 :]])), line
    assert last("ENV").startswith("PATH=/opt/venv/bin:$PATH ")
    assert "venv --without-pip" in INSTALL.read_text()
