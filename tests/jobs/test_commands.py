"""commands.py: the command line needs no torch, and answers every typo."""

import dataclasses
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from elastic_gpt import jobs
from elastic_gpt.jobs import commands
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.settings import field_help

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], ["torch", "numpy", "kubernetes", "dlrover", "model_zoo"]),
        (["render", "mine", "--gpus", "0"], ["torch", "numpy", "kubernetes", "dlrover", "model_zoo.nanogpt.model"]),
        (["render", "mine", "--", "--steps", "5"], ["torch", "kubernetes", "dlrover", "model_zoo.nanogpt.model"]),
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


@pytest.mark.parametrize("action", ["submit", "render"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "--stps", "5"], "unknown setting 'stps' in the flags: did you mean 'steps'?"),
        (["--", "--steps", "five"], "--steps is not a number: 'five'"),
        (["--", "--steps"], "flag --steps needs a value"),
        (["--", "--device", "gpu"], "invalid choice 'gpu' for argument '--device'"),
        (["--", "--global-batch", "7"], "micro_batch 4 does not divide global_batch 7: take 1"),
        (["--gpus=1", "--", "--model.n-head", "5"], "model.n_embd 768 is not a multiple of model.n_head 5"),
        (["--", "--elastic.exact", "--dtype", "float16"], "elastic.exact works with float32 and bfloat16"),
        (["--", "--steps", "nan"], "--steps is not a number: 'nan'"),
        (["--", "--optimizer.learning-rate", "inf"], "optimizer.learning_rate is inf: it must be above 0"),
        (["--env", "EGPT__STPS=5"], "unknown setting 'stps' in variable EGPT__STPS"),
        (["--env", "EGPT__STEPS=five"], "(from variable EGPT__STEPS)"),
    ],
)
def test_settings_that_training_would_refuse_are_refused_before_anything_is_made(
    action: str, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(stub_that_is_never_asked(tmp_path)))
    assert commands.main([action, "mine", "--gpus=0", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["submit", "--dry-run=client"], ["render"]])
def test_a_setting_without_the_effect_that_one_expects_is_told(words: list[str], capsys: Output) -> None:
    assert commands.main([*words, "mine", "--", "--steps=1000"]) == 0
    assert capsys.readouterr().err == (
        "note: optimizer.warmup_steps 2000 is not over after 1000 steps: the learning rate does not reach 0.0006\n"
    )
    assert commands.main([*words, "mine", "--", "--steps=1000", "--optimizer.warmup-steps=100"]) == 0
    assert capsys.readouterr().err == ""


def test_a_job_of_many_nodes_has_room_for_them_in_every_form(capsys: Output) -> None:
    for form in commands.FORMS:
        assert commands.main(["render", "mine", f"--as={form}", "--nodes=9"]) == 0
    assert commands.main(["render", "mine", "--nodes=9", "--only=job"]) == 0
    assert "--nnodes=1:9" in capsys.readouterr().out


@pytest.mark.parametrize("form", [form for form in commands.FORMS if form != "elasticjob"])
@pytest.mark.parametrize("most", ["4", "9"])
def test_most_nodes_are_refused_where_they_have_no_effect(form: str, most: str, capsys: Output) -> None:
    assert commands.main(["render", "mine", f"--as={form}", f"--max-nodes={most}"]) == 2
    assert "--max-nodes: no effect" in capsys.readouterr().err


@pytest.mark.parametrize(("action", "forms"), [("render", tuple(commands.FORMS)), ("submit", commands.LIVING)])
def test_the_parts_of_each_form_are_told(action: str, forms: tuple[str, ...], capsys: Output) -> None:
    with pytest.raises(SystemExit):
        commands.main([action, "--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for form in forms:
        assert f"{form}: {', '.join(commands.FORMS[form][0])}" in shown


@pytest.mark.parametrize("form", ["elasticjob", "trainjob", "jobset"])
def test_a_job_brings_its_namespace(form: str, capsys: Output) -> None:
    assert commands.main(["render", "mine", f"--as={form}", "--namespace=mine"]) == 0
    assert next(yaml.safe_load_all(capsys.readouterr().out))["kind"] == "Namespace"


def stub_that_is_never_asked(folder: Path) -> Path:
    """A kubeconfig of a server that is not there: asking it would be another error."""
    path = folder / "config"
    path.write_text(
        "contexts: [{name: a, context: {cluster: a, user: a}}]\ncurrent-context: a\n"
        "clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}]\nusers: [{name: a, user: {}}]\n"
    )
    return path


def test_the_clients_own_environment_is_not_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGPT__STEPS", "five")
    assert commands.main(["render"]) == 0


def test_each_field_of_a_spec_is_a_flag_with_what_stands_under_the_field(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        commands.main(["submit", "--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    explained = field_help(JobSpec)
    assert set(explained) == {field.name for field in dataclasses.fields(JobSpec)}
    for name, text in explained.items():
        if name not in commands.NO_FLAGS:
            assert f"--{name.replace('_', '-')}" in shown
            assert text.replace("- ", "-") in shown


def test_every_action_has_its_help() -> None:
    for action in commands.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            commands.main([action, "--help"])
        assert stop.value.code == 0
