"""All commands: whatever is typed, a person sees no traceback, and the exit code says whether to try again."""

import collections
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_gpt import cli, script
from elastic_gpt.cli import COMMANDS
from elastic_gpt.drill import drill
from elastic_gpt.drill.faults import Stalled
from elastic_gpt.jobs.client import Cluster, UnreachableError
from elastic_gpt.jobs.commands import COMMANDS as ACTIONS
from elastic_gpt.nodes import launch
from elastic_gpt.settings import PREFIX, field_types
from model_zoo.nanogpt import train
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.serving import serve
from prepare.frontdoor import TRACEBACK, Parser, install
from tests.conftest import elastic_gpt, environment

EXAMPLES = 300
CODES = {0, 1, 2, 124}
SAID = (
    "note: ",
    "warning: ",
    "waiting ",
    "measuring",
    "encoding",
    "learning ",
    "saving ",
)  # on standard error, besides errors

KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: here, user: me}}]
clusters: [{name: here, cluster: {server: 'http://127.0.0.1:9'}}]
users: [{name: me, user: {}}]
"""


@pytest.fixture(scope="module")
def tree(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds, most of them unsuitable for a command."""
    root = tmp_path_factory.mktemp("tree")
    meta = json.loads((data / "meta.json").read_text())
    (root / "folder").mkdir()
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (root / "empty").touch()
    (root / "binary").write_bytes(bytes(range(256)) * 20)
    (root / "deep.yaml").write_text("[" * 5000)
    (root / "list.yaml").write_text("- 1\n- 2\n")
    (root / "number.yaml").write_text("3\n")
    (root / "odd.yaml").write_text("steps: {a: 1}\n3: 4\n? [x]\n: y\n")
    (root / "values.yaml").write_text("steps: [1, 2]\nmodel: {n_layer: .nan}\noptimizer:\n")
    (root / "twice.yaml").write_text("steps: 1\nsteps: 2\n")
    (root / "bomb.yaml").write_text(
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    )
    (root / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (root / "kubeconfig").write_text(KUBECONFIG)
    (root / "kubeconfig.broken").write_text("clusters: 3\ncontexts: [x]\n")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    shutil.copytree(data, root / "data")
    for name, change in {
        "meta-list": [],
        "meta-newer": meta | {"format_version": 99},
        "meta-types": meta | {"splits": {"train": 3}, "vocab_size": "many"},
        "meta-values": meta | {"dtype": "float99", "eot_id": -3},
        "meta-tokenizer": meta | {"tokenizer": dict.fromkeys(meta["tokenizer"], 3)},
    }.items():
        shutil.copytree(data, root / name)
        (root / name / "meta.json").write_text(json.dumps(change))
    for name, lines in {
        "run-empty": "",
        "run-garbage": "\x00\xff{}\n[]\n3\n",
        "run-odd": '{"event": "joined"}\n{"event": "restored", "time": "x"}\n{"step": 1}\n',
    }.items():
        (root / name / "checkpoints").mkdir(parents=True)
        for file in ("ledger.jsonl", "metrics.jsonl", "config.yaml"):
            (root / name / file).write_text(lines)
    return root


FILES = [
    *("text.txt", "empty", "binary", "deep.yaml", "list.yaml", "number.yaml", "odd.yaml", "values.yaml", "twice.yaml"),
    *("bomb.yaml", "deep.jsonl", "kubeconfig", "kubeconfig.broken", "dangling", "loop", "folder", "data", "meta-list"),
    *("meta-newer", "meta-types", "meta-values", "meta-tokenizer", "run-empty", "run-garbage", "run-odd", "nowhere"),
    *("text.txt/below", "caf\udce9.txt", "o" * 300, "*.txt", "http://127.0.0.1:9/x", "s3:/", "nosuch://x"),
]
NUMBERS = ["0", "1", "3", "-1", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000, "0.5", "1_0", "٣", "1e-3", "0x10"]
WORDS = [
    "",
    " ",
    "-",
    "--",
    "---",
    "-x",
    "=",
    "--=",
    "a=b",
    "é",
    "\udcff",
    "x\ny",
    "debug_cpu",
    "gpt2_124m",
    "debug_cp",
    "true",
]
NEARLY_RIGHT = {
    "prepare": [
        "FILE --output-dir out --tokenizer char",
        "FILE FILE --output-dir FILE",
        "text.txt --output-dir out --val-fraction N --seed N",
        "text.txt --output-dir out --tokenizer bpe --vocab-size N --sample-size N",
        "text.txt --output-dir out --tokenizer tiktoken --tokenizer-file FILE --pattern gpt2",
        "text.txt --output-dir FILE --separator WORD",
        "- --output-dir out --text-field WORD",
    ],
    "inspect": ["FILE", "FILE --verify", "data --histogram FILE", "data --histogram folder/x.png"],
    "convert": ["FILE out --format llm.c", "FILE FILE --format nanogpt", "data FILE --format nanogpt"],
    "train": [
        "FILE --data.dir data",
        "debug_cpu --data.dir FILE --run-dir FILE",
        "debug_cpu --data.dir data --steps N --seed N --model.n-layer N --model.n-embd N",
        "debug_cpu --data.dir data --global-batch N --micro-batch N --model.block-size N",
        "debug_cpu --data.dir data --optimizer.learning-rate N --optimizer.beta1 N --elastic.timeout-seconds N",
    ],
    "launch": [
        "--nodes N -- train debug_cpu --data.dir data",
        "--nodes 2 --nnodes WORD -- train debug_cpu --data.dir FILE",
        "--nodes 2 --nproc N -- train FILE --data.dir data",
        "--nnodes 1:2 -- train debug_cpu",
        "--nodes 2 -- WORD",
    ],
    "master": ["--namespace WORD --job-name WORD"],
    "job": [
        *(f"{action} WORD --kubeconfig FILE" for action in ACTIONS),
        *(f"{action} name --kubeconfig kubeconfig" for action in ACTIONS),
        "render name --nodes N --max-nodes N --gpus N --memory N --cpus N",
        "render WORD --preset WORD --image WORD --env WORD --volume-size WORD",
        "render name --text FILE -- --steps N",
        "submit name --dry-run client --node-selector WORD -- WORD",
        "scale name --nodes N --timeout N --kubeconfig kubeconfig",
        "logs name --tail N --context WORD --kubeconfig kubeconfig",
    ],
    "run": ["WORD WORD", "--steps N"],
    "replay": ["FILE", "run-odd --from N --to N"],
    "ledger": ["FILE"],
    "drill": [
        "--events N --seed N --output-dir FILE",
        "--nodes N --output-dir out",
        "--limit N --against WORD --output-dir FILE",
    ],
    "evaluate": [
        "FILE --data FILE",
        "run-odd --data data --split WORD --stride N --sequences N --batch N",
        "run-odd --data data --tokenizer FILE --device WORD --json",
    ],
    "export": ["FILE out", "run-odd FILE --format WORD", "run-odd out --format nanogpt --tokenizer FILE"],
    "generate": [
        "FILE --prompt WORD",
        "run-odd --tokenizer FILE --max-new-tokens N --temperature N",
        "run-odd --top-k N --top-p N --seed N --device WORD",
    ],
    "serve": [
        "FILE --port N --host WORD",
        "FILE --follow --name WORD --token-file FILE",
        "run-odd --slots N --queue N --max-tokens N --max-seconds N",
        "run-odd --tokenizer FILE --device WORD",
    ],
}


def flags_of(command: str) -> list[str]:
    """All flags in a command's help."""
    if command == "train":
        return [f"--{name}" for name in field_types(TrainConfig)]
    calls = [[command, action, "--help"] for action in ACTIONS] if command == "job" else [[command, "--help"]]
    shown = " ".join(run(*call)[1] for call in calls)
    return sorted(set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", shown)))


def run(*words: str) -> tuple[int, str, str]:
    """Exit code and output of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["elastic-gpt", *words]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some text\n"))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def no_work() -> Iterator[None]:
    """Stops a command where its work would begin, and raises unexpected errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRACEBACK, "1")
        patch.delenv("KUBECONFIG", raising=False)
        patch.setenv("HOME", "/nowhere")
        patch.setattr(train, "train", lambda _config, _meta: 0)
        patch.setattr(launch, "run_local", lambda *_, **__: 0)
        patch.setattr(drill, "train", lambda *_: None)

        connect = Cluster.connect.__func__  # type: ignore[attr-defined]

        def no_cluster(*_: object, **found: object) -> None:
            connect(Cluster, **found)  # which reads the kubeconfig
            raise UnreachableError("no work")

        patch.setattr(Cluster, "connect", no_cluster)

        def stall(*_: object, **__: object) -> None:
            raise Stalled("no work")

        patch.setattr(drill, "disturb", stall)
        patch.setattr(drill, "against", stall)
        patch.setattr(serve, "time", SimpleNamespace(sleep=stall))  # for a first checkpoint
        patch.setattr(script.runpy, "run_path", lambda *_, **__: {})
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(sys, "path", [*sys.path])
        yield


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Command lines with arbitrary flags and words, or right ones with arbitrary values for FILE, N and WORD."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    flags = FLAGS.setdefault(command, flags_of(command))
    word = st.one_of(st.sampled_from(FILES), st.sampled_from(NUMBERS), st.sampled_from(WORDS), ANY)
    part = st.one_of(
        st.tuples(st.sampled_from(flags), word),
        st.tuples(st.sampled_from(flags)),
        st.builds(lambda flag, value: (f"{flag}={value}",), st.sampled_from(flags), word),
        st.tuples(word),
    )
    if draw(st.integers(0, 3)):
        kinds = {"FILE": st.sampled_from(FILES), "N": st.sampled_from(NUMBERS), "WORD": word}
        line = draw(st.sampled_from(NEARLY_RIGHT[command])).split()
        start = [draw(kinds[one]) if one in kinds else one for one in line]
        parts = draw(st.lists(part, max_size=1))
    else:
        start, parts = [], draw(st.lists(part, max_size=4))
    return [command, *start, *(word for part in parts for word in part)]


FLAGS: dict[str, list[str]] = {}
# What a shell can hand over: anything but a NUL. No paths out of the folder, for commands may write.
ANY = st.text(st.characters(exclude_characters="\0/", codec=None), max_size=6)
VARIABLES = st.dictionaries(
    st.sampled_from(
        [f"{PREFIX}{name.upper().replace('.', '__')}" for name in field_types(TrainConfig)] + ["EGPT_STEPS"]
    ),
    st.one_of(st.sampled_from(NUMBERS), st.sampled_from(["", "x", "true", "caf\udce9"])),
    max_size=1,
)
TRIED: collections.Counter[str] = collections.Counter()


@pytest.mark.usefixtures("no_work")
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), print_blob=False)
@given(words=lines(), variables=VARIABLES)
def test_no_command_line_ends_in_a_traceback(tree: Path, words: list[str], variables: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tree, Path(folder) / "tree", symlinks=True)
        with contextlib.chdir(Path(folder) / "tree"), mock.patch.dict(os.environ, variables):
            code, _, err = run(*words)
    assert code in CODES, err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if not line.startswith(SAID)]
    if code == 2 and len(words) > 1:
        assert len(errors) == 1, err
        assert errors[0].startswith("error: "), err
    TRIED[words[0]] += 1


def test_the_fuzz_reached_every_command() -> None:
    if not TRIED:
        pytest.skip("the fuzz test did not run")
    assert set(TRIED) == set(COMMANDS)
    assert sum(TRIED.values()) >= EXAMPLES


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"elastic-gpt {command} " in out.partition("\n\n")[2]


def test_help_version_and_unknown_commands_are_answered() -> None:
    assert run("help", "ledger")[1] == run("ledger", "--help")[1]
    assert re.fullmatch(r"elastic-gpt \d+\.\d+\.\d+\n", run("--version")[1])
    assert run("genrate")[::2] == (2, "error: no command 'genrate': did you mean generate?\n")


def test_the_installed_command_says_the_same_in_a_process_of_its_own(tree: Path) -> None:
    done = elastic_gpt("train", tree / "bomb.yaml", code=2)
    assert done.stderr.startswith("error: unknown setting 'a' in preset ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (["train", "debug_cpu"], "torch", "train"),
        (["launch", "--nodes", "2", "--", "train", "debug_cpu"], "torch", "train"),
        (["launch", "--nodes", "2", "--", "train", "debug_cpu"], "dlrover", "train"),
        (["launch", "--nodes", "2", "--", "train", "debug_cpu"], "psutil", "train"),
        (["generate", "run"], "torch", "train"),
        (["generate", "run"], "safetensors", "train"),
        (["evaluate", "run"], "torch", "train"),
        (["export", "run", "out"], "torch", "train"),
        (["drill"], "torch", "train"),
        (["drill"], "dlrover", "train"),
        (["drill", "--against", "torchrun", "torchft"], "torchft", "torchft"),
        (["drill"], "matplotlib", "plot"),
        (["master", "--namespace", "n", "--job-name", "j"], "dlrover", "train"),
        (["job", "list"], "kubernetes", "kubernetes"),
        (["inspect", "DATA", "--histogram", "x.png"], "matplotlib", "plot"),
        (["prepare", "x.parquet", "--output-dir", "out"], "pyarrow", "parquet"),
    ],
)
def test_a_command_whose_package_is_not_installed_names_the_extra(
    words: list[str], missing: str, extra: str, tmp_path: Path, data: Path
) -> None:
    for name in ("x.parquet", "x.txt.zst"):
        (tmp_path / name).write_bytes(b"(\xb5/\xfd" if name.endswith("zst") else b"PAR1")
    shutil.copytree(data, tmp_path / "gpt2")
    meta = json.loads((data / "meta.json").read_text()) | {"eot_id": 0}  # which --histogram needs
    (tmp_path / "gpt2" / "meta.json").write_text(json.dumps(meta))
    words = [str(tmp_path / "gpt2") if word == "DATA" else word for word in words]
    code = f"import sys; sys.modules[{missing!r}] = None; from elastic_gpt import cli; sys.exit(cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"KUBECONFIG": "nowhere"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith(SAID)]) == 1
    assert install(extra) in done.stderr
    assert not (tmp_path / "drill").exists()


@pytest.mark.parametrize(
    ("missing", "words"), [("torch", ["debug_cpu"]), ("psutil", ["debug_cpu"]), ("torch", ["--help"])]
)
def test_the_training_script_names_the_extra_too(missing: str, words: list[str]) -> None:
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, train.__file__, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: no package {missing}: {install('train')}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_signal_is_the_exit_code_of_every_command(
    command: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Parser, "parse_args", interrupted)
    monkeypatch.setattr("elastic_gpt.settings.parse", interrupted)
    found, _, err = run(command, "x")
    assert found == code
    assert "Traceback" not in err


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"run"}))  # whose words are its script's
def test_a_typo_is_the_users_mistake_in_every_command(command: str) -> None:
    needed = {
        "train": ["debug_cpu"],
        "convert": ["a", "b", "--format=llm.c"],
        "export": ["a", "b"],
        "job": ["list"],
    }.get(command, ["x"])
    if command == "master":
        needed = ["--namespace=n", "--job-name=j"]
    code, _, err = run(command, *([] if command == "launch" else needed), "--run-dri=3")
    assert code == 2
    assert "--run-dri" in err or "run_dri" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "prepare --sample --tokenizer char --output-dir DISK/data",
        "convert DATA DISK/data --format nanogpt",
        "train debug_cpu --data.dir DATA --run-dir DISK/run --steps 1",
        "train debug_cpu --data.dir DATA --run-dir RUN --steps 1 --checkpoint.dir DISK/checkpoints",
        pytest.param(
            "launch --nodes 2 -- train debug_cpu --data.dir DATA --run-dir DISK/run --steps 1", marks=pytest.mark.slow
        ),
        pytest.param("drill --events 1 --nodes 2 --output-dir DISK/drill", marks=pytest.mark.slow),
        "export DONE DISK/model",
        "export DONE DISK/model --format nanogpt",
    ],
)
def test_a_full_disk_is_worth_another_try_in_every_command_that_writes(
    words: str, data: Path, trained: Path, tmp_path: Path, full_disk: Path
) -> None:
    places = {"DISK": str(full_disk), "DATA": str(data), "RUN": str(tmp_path / "run"), "DONE": str(trained)}
    line = [re.sub("^[A-Z]+", lambda found: places[found[0]], word) for word in words.split()]
    done = elastic_gpt(*line, code=1)
    told = [line for line in done.stderr.splitlines() if not line.startswith(SAID)]
    if words.startswith("launch"):
        told = told or [line for line in done.stdout.splitlines() if "error: " in line][-1:]
        assert "no node finished the job" in told[-1]
    else:
        assert len(told) == 1, done.stderr
        assert told[0].startswith("error: ")
        assert re.search("No space left|no room left|make room", told[0])
    assert "Traceback" not in done.stderr + done.stdout
    assert [path.name for path in full_disk.iterdir() if path.is_file()] == ["ballast"]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    elastic_gpt("train", "debug_cpu", "--data.dir", data, "--run-dir", run, "--steps=2", "--evaluate.interval=0")
    return run


@pytest.mark.parametrize(
    "words",
    [
        "--version",
        "prepare --sample --tokenizer char --output-dir out",
        "inspect DATA",
        "convert DATA out --format llm.c",
        "train debug_cpu --data.dir DATA --run-dir out --steps 1",
        "ledger RUN",
        pytest.param("evaluate RUN --data DATA --json", marks=pytest.mark.slow),
        pytest.param("generate RUN --prompt The --max-new-tokens 2", marks=pytest.mark.slow),
        "job render",
    ],
)
@pytest.mark.parametrize(("shell", "code"), [("> /dev/full", 1), ("| true", 141)])
def test_output_that_cannot_be_written_ends_a_command_in_one_line_at_most(
    words: str, shell: str, code: int, data: Path, trained: Path, tmp_path: Path
) -> None:
    places = {"DATA": str(data), "RUN": str(trained)}
    line = [places.get(word, word) for word in words.split()]
    script = f'sleep 0.1 | "$0" -m elastic_gpt.cli "$@" {shell}; exit ${{PIPESTATUS[1]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, *line], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=environment(PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if not line.startswith((*SAID, "model of step"))]
    assert done.returncode == code, done.stderr
    assert told == (
        ["error: No space left on device: make room where this writes, or where its output goes"] * (code == 1)
    )


def test_training_and_talking_show_no_warning_of_a_library(data: Path, tmp_path: Path) -> None:
    trained = elastic_gpt("train", "debug_cpu", "--data.dir", data, "--run-dir", tmp_path / "run", "--steps=12")
    talked = elastic_gpt("generate", tmp_path / "run", "--prompt", "The ", "--max-new-tokens", "3")
    assert trained.stderr == ""
    assert re.fullmatch(r"model of step 12, .*\n", talked.stderr)
