"""What an image must have, and that the CPU variant is the other one without CUDA. Nothing is built here."""

import re
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parents[2]
CUDA, CPU = REPO / "Dockerfile", REPO / "docker" / "cpu.Dockerfile"
IGNORE = (REPO / ".dockerignore").read_text().splitlines()

both = pytest.mark.parametrize("path", [CUDA, CPU], ids=["cuda", "cpu"])


def instructions(path: Path) -> list[str]:
    """One string an instruction, without comments and line breaks."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M)
    return [re.sub(r"\s+", " ", line).strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def last(path: Path, word: str) -> str:
    return [line for line in instructions(path) if line.startswith(f"{word} ")][-1].removeprefix(f"{word} ")


@both
def test_the_image_does_not_run_as_root(path: Path) -> None:
    user, group = last(path, "USER").split(":")
    assert user.isdecimal()  # Kubernetes cannot check runAsNonRoot for a name
    assert int(user) > 0
    assert f"groupadd --gid {group} " in path.read_text()
    assert f"useradd --uid {user} --gid {group} " in path.read_text()
    job = yaml.safe_load((REPO / "examples/elasticjob/elasticjob.yaml").read_text())
    for replica in job["spec"]["replicaSpecs"].values():
        assert replica["template"]["spec"]["securityContext"]["runAsUser"] == int(user)


@both
def test_signals_go_through_tini(path: Path) -> None:
    assert last(path, "ENTRYPOINT") == '["/usr/bin/tini", "--"]'
    assert re.search(r"apt-get install [^&]*\btini\b", " ".join(instructions(path)))


@both
def test_the_image_holds_the_code_and_no_data(path: Path) -> None:
    lines = instructions(path)
    assert not [line for line in lines if line.startswith("ADD ")]
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from=" not in line]
    copied = {word for words in copies for word in words}
    assert copied - {"prepare", "model_zoo", "elastic_gpt"} == {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
    }
    assert IGNORE[1] == "*"
    assert {line[1:] for line in IGNORE if line.startswith("!")} == copied


@both
def test_the_versions_are_the_pinned_ones(path: Path) -> None:
    assert "pip install --no-cache-dir -c constraints.txt '.[train]'" in path.read_text()
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.M)
    assert version
    assert f'image.version="{version[1]}"' in path.read_text()


@both
def test_a_change_of_the_code_leaves_the_layer_of_the_dependencies(path: Path) -> None:
    lines = instructions(path)
    stage = "\n".join(lines).partition(" AS dependencies\n")[2].partition("\nFROM ")[0].splitlines()
    copied = [line for line in stage if line.startswith("COPY ")]
    assert copied == ["COPY pyproject.toml constraints.txt ./"]


def test_the_variants_differ_where_they_must_and_nowhere_else() -> None:
    cuda, cpu = instructions(CUDA), instructions(CPU)
    assert [line for line in cuda if line not in cpu] == [
        "ARG PIP_EXTRA_INDEX_URL=",
        next(line for line in cuda if " tini g++ " in line),
        "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ]
    assert [line for line in cpu if line not in cuda] == [
        "ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu",
        next(line for line in cuda if " tini g++ " in line).replace(" tini g++ ", " tini "),
    ]
