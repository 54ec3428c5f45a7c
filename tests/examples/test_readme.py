"""The commands in the documents are accepted by the parsers, and the files they name exist."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest

from elastic_gpt import settings
from elastic_gpt.cli import COMMANDS
from elastic_gpt.jobs.commands import COMMANDS as ACTIONS
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from prepare.frontdoor import Parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = {  # document to the fewest commands in its blocks, and in its sentences
    "README.md": (10, 5),
    "docs/RUNBOOK.md": (8, 5),
    "examples/elasticjob/README.md": (12, 5),
    "docs/ELSEWHERE.md": (9, 5),
    "docs/LIBRARY.md": (2, 1),
    "CONTRIBUTING.md": (2, 0),
}
PLACEHOLDERS = {"MIN:MAX": "2:4", "N": "2", "PRESET": "debug_cpu", "...": ""}


class Parsed(BaseException):
    """A command line was understood; what it asks for is not done."""


@pytest.fixture(autouse=True)
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command ends as soon as its own parser has taken its words."""
    real = Parser.parse_args

    def parse(self: Parser, *args: Any) -> NoReturn:
        real(self, *args)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)


def typed(document: str) -> list[str]:
    """The lines of commands in a document's blocks, without comments and what a shell does with their output."""
    found = []
    text = re.sub(r" *\\\n *", " ", (ROOT / document).read_text())
    for line in text.splitlines():
        if re.match(r" *(?:\S*/|[A-Z_]+=\S+ |kubectl .* )?elastic-gpt [a-z]", line) and not re.match(
            r"\S+ \S.*`", line
        ):
            command = re.sub(r"\s+#+ .*", "", line)
            found += [part.partition(" > ")[0] for part in re.split(r" && | \| ", command) if "elastic-gpt " in part]
    return found


def mentioned(document: str) -> list[str]:
    """The commands in a document's sentences and tables; many leave out what the reader knows by then."""
    text = (ROOT / document).read_text()
    return [" ".join(one.split()) for one in re.findall(r"`(elastic-gpt [a-z][^`|]*)", text)]


def check(command: str, folder: Path) -> None:
    """Raises Parsed if the parsers accept a command, else SystemExit or SettingsError."""
    words = shlex.split(command)
    first = next(place for place, word in enumerate(words) if word.rpartition("/")[2] == "elastic-gpt")
    variables = dict(word.split("=", 1) for word in words[:first] if word.startswith("EGPT__"))
    name, *words = [PLACEHOLDERS.get(word, word) for word in words[first + 1 :] if PLACEHOLDERS.get(word, word)]
    if name == "train":
        (folder / "my_preset.yaml").write_text("seed: 7\n")
        words = [str(folder / word) if word == "my_preset.yaml" else word for word in words]
        config = settings.parse(TrainConfig, words, presets=PRESETS, prog="elastic-gpt train", environment=variables)
        assert config.notes() == [], command
        raise Parsed
    trailing = words[words.index("--") + 1 :] if "--" in words else []
    if trailing:  # after `job submit NAME --` settings alone, after `launch --` the command whose they are
        preset = "debug_cpu" if re.search(r"--gpus[ =]0", command) else "gpt2_124m"
        with pytest.raises(Parsed):
            check(" ".join(["elastic-gpt", *(["train", preset] if name == "job" else []), *trailing]), folder)
    if name == "job" and trailing:
        words = words[: words.index("--")]
    importlib.import_module(COMMANDS[name][0]).main(words, prog=f"elastic-gpt {name}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_a_document_tells_to_type_is_parsed(document: str, tmp_path: Path) -> None:
    commands = typed(document)
    assert len(commands) >= DOCUMENTS[document][0]
    for command in commands:
        with pytest.raises(Parsed):
            check(command, tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_a_document_mentions_is_there(
    document: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = mentioned(document)
    assert len(commands) >= DOCUMENTS[document][1]
    for command in commands:
        _, name, *words = command.split()
        assert name in COMMANDS, command
        if name == "job" and words and words[0] != "...":
            assert words[0] in ACTIONS, command
        if words and words[0] != "..." and words[-1] != "--help":
            with pytest.raises((Parsed, SystemExit)) as caught:
                check(command, tmp_path)
            error = capsys.readouterr().err
            assert caught.type is Parsed or "the following arguments are required" in error, f"{command}: {error}"


def test_a_command_with_a_misspelt_flag_is_caught(tmp_path: Path) -> None:
    for command in (
        "elastic-gpt job scale mine --node 4",
        "elastic-gpt launch --nodes 3 -- train debug_cpu --run-dri run",
        "elastic-gpt job submit mine -- --stpes=3",
        "EGPT__OPTIMIZER__RATE=3e-4 elastic-gpt train gpt2_124m",
    ):
        with pytest.raises((SystemExit, settings.SettingsError)):
            check(command, tmp_path)


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    quoted = re.findall(r"`((?:prepare|tests|examples|docs|benchmarks|elastic_gpt|model_zoo)/[\w./-]+)`", text)
    assert len(linked) >= 3
    assert quoted
    missing = [name for name in (*linked, *quoted) if not (ROOT / name).exists()]
    assert missing == []


def test_the_readme_lists_every_room_and_each_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.partition("## The house")[2].split("```")[1]
    folders: list[str] = []
    listed = []
    for line in block.strip().splitlines():
        found = re.match(r"( *)((?:[\w./-]+(?:\.\w+|/)|Dockerfile)(?:, (?:[\w./-]+(?:\.\w+|/)|Dockerfile))*)", line)
        assert found, line
        names = found[2].split(", ")
        folders = folders[: len(found[1]) // 2]
        listed += ["".join([*folders, name]) for name in names]
        folders.append(names[0])
    assert [name for name in listed if not (ROOT / name).exists()] == []
    rooms = [
        path
        for folder in ("prepare", "model_zoo/nanogpt", "elastic_gpt")
        for path in ROOT.joinpath(folder).rglob("*.py")
    ]
    named = [str(path.relative_to(ROOT)) for path in rooms if path.name != "__init__.py"]
    assert len(named) > 100
    assert [name for name in named if name not in listed and not name.startswith("elastic_gpt/jobs/")] == []
