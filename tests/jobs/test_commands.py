"""The command line: quick, without torch, and with an answer to every typo."""

import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_gpt import jobs
from elastic_gpt.jobs import commands

Output = pytest.CaptureFixture[str]
README = Path(__file__).parents[2] / "examples" / "elasticjob" / "README.md"


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], ["torch", "numpy", "kubernetes", "dlrover", "model_zoo"]),
        (["render", "mine", "--gpus", "0"], ["torch", "numpy", "kubernetes", "dlrover", "model_zoo.nanogpt.model"]),
        (["list", "--kubeconfig", "/absent"], ["torch", "numpy", "dlrover"]),
    ],
)
def test_no_command_imports_torch(words: list[str], absent: list[str]) -> None:
    code = (
        "import sys; from elastic_gpt.cli import main; sys.argv[1:] = ['job', *sys.argv[2:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in sys.argv[1:] if name in sys.modules], file=sys.stderr)\n"
        f"sys.exit(any(name in sys.modules for name in {absent!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code, "job", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_of_the_client_imports_without_torch() -> None:
    rooms = [room.name for room in pkgutil.iter_modules(jobs.__path__)]
    code = f"import sys, importlib; [importlib.import_module('elastic_gpt.jobs.' + one) for one in {rooms!r}]"
    code += "; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'dlrover', 'model_zoo.nanogpt.model')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: ACTION"),
        (["rendr"], "no action 'rendr': did you mean render?"),
        (["suspnd", "x"], "no action 'suspnd': did you mean suspend?"),
        (["render", "--gpu", "0"], "unrecognized arguments: --gpu"),
        (["render", "--max-node=3"], "did you mean --max-nodes?"),
        (["scale", "x"], "the following arguments are required: --nodes"),
        (["scale", "x", "--nodes", "two"], "invalid int value: 'two'"),
        (["logs", "x", "--of", "worker"], "did you mean workers?"),
        (["render", "--access-mode", "RWX"], "choose from"),
    ],
)
def test_a_typo_gets_one_line_with_the_nearest_word(words: list[str], message: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stop:
        commands.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["render", "--only", "jobs"], "--only jobs: did you mean job?"),
        (["render", "--env", "A"], "--env A: write NAME=VALUE"),
        (["status", "x", "--", "more"], "nothing follows --"),
        (["render", "--preset", "gtp2_124m"], "did you mean 'gpt2_124m'?"),
    ],
)
def test_a_wrong_value_is_an_exit_code_of_2(words: list[str], message: str, capsys: Output) -> None:
    assert commands.main(words) == 2
    assert message in capsys.readouterr().err


def test_every_action_has_its_help() -> None:
    for action in commands.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            commands.main([action, "--help"])
        assert stop.value.code == 0


def test_the_command_line_takes_every_command_of_the_readme() -> None:
    blocks = "\n".join(re.findall(r"```bash\n(.+?)```", README.read_text(), re.S))
    found = re.findall(r"^ *elastic-gpt job ([^#|\n]+)", blocks, re.M)
    assert len(found) >= 12
    for line in found:
        words = shlex.split(line)
        commands._parser("elastic-gpt job").parse_args(words[: words.index("--")] if "--" in words else words)
    assert {shlex.split(line)[0] for line in found} <= set(commands.COMMANDS)
