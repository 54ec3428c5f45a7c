"""examples/torchrun/*.sh: torchrun's own parser takes their words, and a misspelt or missing one is caught. Trains nothing."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from elastic_gpt import claim

FOLDER = Path(__file__).parents[2] / "examples" / "torchrun"
NEEDED = (
    "nnodes",
    "nproc-per-node",
    "max-restarts",
    "rdzv-backend",
    "rdzv-endpoint",
    "rdzv-id",
    "rdzv-conf",
    "no-python",
)
STAND_IN = '#!/bin/sh\necho "$(basename "$0") $*" >>"$CALLS"\n'


def calls(script: Path, tmp_path: Path, arguments: list[str], **more: str) -> tuple[int, list[str], str]:
    """Exit code, the commands that a script calls, and what it says; stand-ins for the commands do nothing."""
    for name in ("torchrun", "elastic-gpt"):
        program = tmp_path / name
        program.write_text(
            STAND_IN + ('case "$*" in *--wait=0*) exit "${THERE:-0}" ;; esac\n' * (name == "elastic-gpt"))
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "calls"
    log.write_text("")
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(log), **more}
    done = subprocess.run(["sh", str(script), *arguments], env=variables, capture_output=True, text=True, check=False)
    return done.returncode, log.read_text().splitlines(), done.stderr


def wrong(words: list[str]) -> list[str]:
    """What torchrun's own parser does not take, and what an elastic run lacks."""
    parser = pytest.importorskip("torch.distributed.run").get_args_parser()
    parser.exit_on_error = False
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    try:
        parser.parse_args([*words, "elastic-gpt", "train"])
    except SystemExit:
        return ["torchrun refuses it"]
    return sorted(set(NEEDED) - given)


def test_torchrun_takes_every_word_and_a_misspelt_or_missing_one_is_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, [called], _ = calls(FOLDER / "train.sh", tmp_path, ["debug_cpu", "--steps=1"], RENDEZVOUS="node-0:29500")
    assert code == 0
    words, trained = called.removeprefix("torchrun ").split(" elastic-gpt train ")
    assert trained == "debug_cpu --steps=1"
    assert wrong(words.split()) == []
    for name in NEEDED:
        missing = [word for word in words.split() if not re.match(rf"--{name}(=|$)", word)]
        assert wrong(missing), name
        assert wrong([re.sub(rf"^--{name}(?==|$)", f"--{name}x", word) for word in words.split()]), name
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "token"),
    [
        ({"RENDEZVOUS": "node-0:29500"}, "node-0:29500"),
        ({"RENDEZVOUS": "node-7"}, "node-7"),
        ({"RENDEZVOUS": "127.0.0.1:29500"}, f"127.0.0.1:29500@{os.uname().nodename}"),
        ({"RENDEZVOUS": "localhost:29500"}, f"localhost:29500@{os.uname().nodename}"),
        ({"RENDEZVOUS": "node-0:29500", "RUN_ID": "slurm-7"}, "slurm-7"),
    ],
)
def test_two_jobs_have_two_tokens_so_the_second_one_on_a_run_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str], token: str
) -> None:
    code, [called], _ = calls(FOLDER / "train.sh", tmp_path, ["debug_cpu"], **more)
    assert code == 0
    [given] = re.findall(r"--rdzv-id=(\S+)", called)
    monkeypatch.delenv("JOB_UID", raising=False)
    monkeypatch.delenv("DLROVER_MASTER_ADDR", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", given)  # as torchrun does for its workers
    assert claim.job.__wrapped__() == token


def test_a_node_without_its_rendezvous_says_so(tmp_path: Path) -> None:
    code, called, said = calls(FOLDER / "train.sh", tmp_path, ["debug_cpu"])
    assert (code != 0, called) == (True, [])
    assert "RENDEZVOUS: the address of the first node" in said


@pytest.mark.parametrize(
    ("more", "prepared"),
    [
        ({"PREPARE": "a.txt", "FIRST": "1", "THERE": "124"}, ["--wait=0", "a.txt", "--wait"]),
        ({"PREPARE": "a.txt", "FIRST": "1", "THERE": "0"}, ["--wait=0", "--wait"]),
        ({"PREPARE": "a.txt", "FIRST": "0"}, ["--wait"]),
        ({}, []),
    ],
    ids=["the first prepares", "but not twice", "others wait", "data that are there"],
)
@pytest.mark.parametrize("flag", [["--data.dir=PLACE"], ["--data.dir", "PLACE"]], ids=["one word", "two words"])
def test_the_first_node_prepares_once_and_the_others_wait(
    tmp_path: Path, flag: list[str], more: dict[str, str], prepared: list[str]
) -> None:
    place = "s3://bucket/data"
    words = ["debug_cpu", *(word.replace("PLACE", place) for word in flag)]
    code, called, _ = calls(FOLDER / "prepared.sh", tmp_path, words, RENDEZVOUS="node-0:29500", **more)
    assert code == 0
    assert called[:-1] == [f"elastic-gpt prepare {word} --output-dir={place}" for word in prepared]
    assert called[-1].startswith("torchrun ")
    assert called[-1].endswith(f" elastic-gpt train {' '.join(words)}")
