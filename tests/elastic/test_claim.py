"""claim.py: one job at a time trains into a run directory, and the claim of a dead job expires."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_gpt import claim
from elastic_gpt.claim import Claim, InUse, process, refuse_if_in_use
from tests.conftest import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(claim, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(claim, "EXPIRY_SECONDS", 2.0)


def hold(run: Path, job: str, processes: list[dict[str, Any]] | None = None, run_id: str = "run") -> tuple[Claim, bool]:
    """The claim of a job, taken; and whether the job had it before."""
    held = Claim(run, f"life of {job}", processes or [process()])
    held.content["job"] = job
    return held, held.take(run_id)


def elsewhere() -> list[dict[str, Any]]:
    return [process() | {"machine": "another", "host": "far"}]


def dead() -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    told = process() | {"pid": child.pid, "started": claim._started(child.pid)}
    child.communicate()
    return told


def test_a_second_job_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    first, _ = hold(tmp_path, "first")
    for refused in (lambda: hold(tmp_path, "second"), lambda: refuse_if_in_use(tmp_path, "second")):
        with pytest.raises(InUse, match=rf"in use \(by process {process()['pid']} on .*, since 20.*end that job first"):
            refused()
    refuse_if_in_use(tmp_path, "first")
    first.release()
    assert hold(tmp_path, "second")[1] is False


def test_all_lives_of_a_job_have_its_claim(tmp_path: Path) -> None:
    first, before = hold(tmp_path, "job")
    again, continues = hold(tmp_path, "job", elsewhere())
    assert (before, continues) == (False, True)
    assert again.content["since"] == first.content["since"]


def test_the_claim_of_processes_that_died_here_expires_at_once(tmp_path: Path) -> None:
    hold(tmp_path, "killed", [dead()])[0].ended.set()
    refuse_if_in_use(tmp_path, "second")
    assert hold(tmp_path, "second")[1] is False
    assert json.loads((tmp_path / "claim.json").read_text())["job"] == "second"


def test_a_process_id_that_another_process_has_now_is_not_the_first_job(tmp_path: Path) -> None:
    hold(tmp_path, "killed", [process() | {"started": 1.0}])[0].ended.set()
    assert hold(tmp_path, "second")[1] is False


def test_a_job_with_one_living_node_lives(tmp_path: Path) -> None:
    hold(tmp_path, "first", [dead(), process()])
    with pytest.raises(InUse):
        hold(tmp_path, "second")


def test_a_claim_from_another_machine_that_is_renewed_is_respected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(tmp_path, "first", elsewhere())
    with pytest.raises(InUse, match="on far"):
        hold(tmp_path, "second")
    assert "waiting 2 s to see whether that job lives" in capsys.readouterr().err


def test_a_claim_from_another_machine_that_nobody_renews_expires(tmp_path: Path) -> None:
    first, _ = hold(tmp_path, "first", elsewhere())
    first.ended.set()
    time.sleep(0.2)
    assert hold(tmp_path, "second")[1] is False


def test_of_two_that_find_a_dead_claim_one_has_it(tmp_path: Path) -> None:
    hold(tmp_path, "killed", [dead()])[0].ended.set()
    ends: list[str] = []

    def take(job: str) -> None:
        try:
            hold(tmp_path, job)
            ends.append("has it")
        except InUse:
            ends.append("refused")

    threads = [threading.Thread(target=take, args=(f"job {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["has it", "refused", "refused", "refused"]


def test_a_claim_that_came_with_a_copied_directory_is_void(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    hold(tmp_path / "a", "first", run_id="a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "claim.json").write_bytes((tmp_path / "a" / "claim.json").read_bytes())
    refuse_if_in_use(tmp_path / "b", "second")
    assert hold(tmp_path / "b", "second", run_id="b")[1] is False


def test_of_two_jobs_that_begin_a_directory_at_once_one_has_it(tmp_path: Path) -> None:
    first, _ = hold(tmp_path, "first", run_id="made by the first")
    with pytest.raises(InUse):
        hold(tmp_path, "second", run_id="made by the second")
    first.release()
    assert hold(tmp_path, "second", run_id="made by the second")[1] is False


BARE = {"run_id": "run", "job": "j", "life": "l", "since": 1.0, "directory": {}, "processes": [{"machine": "m"}]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        "\xff",
        '{"processes": []}',
        json.dumps(BARE),
        json.dumps(BARE | {"since": "yesterday"}),
    ],
)
def test_a_claim_that_says_nothing_does_not_count(tmp_path: Path, text: str) -> None:
    (tmp_path / "claim.json").write_bytes(text.encode("latin-1"))
    refuse_if_in_use(tmp_path, "job")
    assert hold(tmp_path, "job")[1] is False


def test_a_renewal_does_not_take_back_what_another_life_has_now(tmp_path: Path) -> None:
    first, _ = hold(tmp_path, "job")
    until(lambda: json.loads((tmp_path / "claim.json").read_text() or "{}").get("renewed", "0") > "0" * 12)
    later = Claim(tmp_path, "later", [process()])
    later.content["job"] = "job"
    later.take("run")
    time.sleep(0.3)
    assert json.loads((tmp_path / "claim.json").read_text())["life"] == "later"
    first.release()
    assert (tmp_path / "claim.json").exists()


def test_workers_of_a_job_share_a_token_and_strangers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOB_UID", "DLROVER_MASTER_ADDR", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    token = claim.job.__wrapped__
    assert token() != token()
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    one = token()
    monkeypatch.setenv("MASTER_PORT", "2")
    assert token() != one  # each torchrun without an id is `none`
    for name, value in (("TORCHELASTIC_RUN_ID", "run"), ("DLROVER_MASTER_ADDR", "master:1"), ("JOB_UID", "uid")):
        monkeypatch.setenv(name, value)
        assert token() == value


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("launcher", ["dlrover", "torchrun"])
def test_a_master_on_loopback_is_one_for_the_containers_of_a_pod_and_another_on_another_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, launcher: str
) -> None:
    for name in ("JOB_UID", "DLROVER_MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if launcher == "dlrover":
        monkeypatch.setenv("DLROVER_MASTER_ADDR", f"{host}:1")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", "1"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, value)
    token = claim.job.__wrapped__

    def on(space: str, container: str) -> str:
        monkeypatch.setattr(claim, "network", lambda: space)
        monkeypatch.setattr(claim, "machine", lambda: container)
        return str(token())

    assert on("pod", "a container") == on("pod", "another") != on("another pod", "a third")
