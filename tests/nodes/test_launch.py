"""The real DLRover master and agents on this machine: nodes are killed, leave and join, and the run is the same."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_gpt.contract import shared_memory
from elastic_gpt.nodes.local import LocalJob
from elastic_gpt.processes import die_with_parent
from tests.conftest import PATIENCE, TINY, assert_same_run, elastic_gpt, environment, events, metrics, until

STEPS = 900
ARGUMENTS = [
    *("debug_cpu", f"--steps={STEPS}", "--device=cpu", "--elastic.exact", "--model.dropout=0.1"),
    *("--observe.tensorboard=false", "--evaluate.interval=300", "--checkpoint.interval=400"),
]


def wait(job: LocalJob, condition: Callable[[], bool]) -> None:
    def come() -> bool:
        assert condition() or job.running(), f"all nodes ended: see {job.logs}"
        return condition()

    until(come, f"waited in vain: see {job.logs}")


def launched(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """A launcher that is killed when this process is: a test that is killed leaves no training behind."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    end_with_us = functools.partial(die_with_parent, os.getpid())
    return subprocess.Popen(command, env=environment(), preexec_fn=end_with_us, **options)


def processes_of(name: str) -> list[str]:
    """Command lines of living processes whose environment or command line names the job or run `name`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (
                name in " ".join(process.cmdline()) or any(name in value for value in process.environ().values())
            ):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue
    return [line for line in found if str(os.getpid()) != line.split()[0]]


WINDOW = """
import os, signal
from elastic_gpt.nodes import mend
mend.agent(None)
from dlrover.python.elastic_agent.torch.training import ElasticTrainingAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

def initialize(self, group):  # up to the moment when the workers have been started
    start_processes("worker", "sleep", {0: ("60",)}, {0: {}}, DefaultLogsSpecs()).close()
    os.kill(os.getpid(), signal.SIGTERM)

LocalElasticAgent._initialize_workers = initialize
agent = ElasticTrainingAgent.__new__(ElasticTrainingAgent)
agent._config = type("", (), {"rdzv_configs": {}, "network_check": False})
agent._stop_workers = lambda *_, **__: None
try:
    ElasticTrainingAgent._initialize_workers(agent, None)
except mend.Leaving:
    print("it leaves")
"""


def test_an_agent_that_is_asked_to_leave_while_it_starts_its_workers_leaves() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WINDOW], capture_output=True, text=True, timeout=PATIENCE, env=environment(), check=False
    )
    assert done.stdout.splitlines()[-1:] == ["it leaves"], done.stderr


def test_a_node_that_is_asked_to_leave_does_not_wait_for_a_master_that_has_gone(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*ARGUMENTS, "--data.dir", str(data), "--run-dir", str(run)]
    with LocalJob(["train", *arguments], least=1, most=1, threads=1) as job:
        node = job.add_node()
        wait(job, lambda: len(metrics(run)) >= 10)
        job.kill_master()
        job.terminate(node)
        assert job.nodes[node].wait(40) == 0  # repeated, its last word takes 50 s
    assert events(run, "stopped")


@pytest.mark.slow
def test_nodes_whose_run_finishes_while_there_is_no_master_exit_0_at_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*ARGUMENTS, "--steps=300", "--data.dir", str(data), "--run-dir", str(run)]
    with LocalJob(["train", *arguments], least=1, most=2, threads=1) as job:
        nodes = [job.add_node(), job.add_node()]
        wait(job, lambda: len(metrics(run)) >= 10)
        job.kill_master()
        until(lambda: bool(events(run, "finished")))
        # What it says to the master, and the wait for its company there, took two minutes and ended with 1.
        assert [job.nodes[node].wait(40) for node in nodes] == [0, 0]


ENDLESS = ["debug_cpu", *TINY, "--steps=1000000", "--checkpoint.interval=1000000", "--evaluate.interval=0"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["closes", "ctrl-c"])
def test_a_terminal_that_stops_a_node_costs_no_step(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    arguments = [*ENDLESS, "--data.dir", str(data), "--run-dir", str(run)]
    with LocalJob(["train", *arguments], least=1, most=1, threads=1) as job:
        agent = job.nodes[job.add_node()]
        wait(job, lambda: len(metrics(run)) >= 10)
        (worker,) = job.workers_of(0)
        os.kill(worker, number)  # to it alone: it leaves, its agent does not, and starts another
        wait(job, lambda: len(events(run, "restored")) == 2)
        wait(job, lambda: len(metrics(run)) > events(run, "restored")[1]["step"])
        agent.send_signal(signal.SIGSTOP)  # so that its message to the worker comes late
        os.killpg(agent.pid, number)  # agent, standby, worker: all that was started in the terminal
        until(lambda: len(events(run, "stopped")) == 2)
        agent.send_signal(signal.SIGCONT)
        assert agent.wait(PATIENCE) == 0
    assert not job.finished()
    assert events(run, "saved")[-1]["step"] == metrics(run)[-1]["step"]
    assert [event["dropped"] for event in events(run, "restored")] == [0, 0]


@pytest.mark.slow
def test_nohup_keeps_launcher_and_nodes(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "elastic_gpt.cli", "launch", "--nodes=1", "--", "train", *ENDLESS]
    launch = launched(["nohup", *command, "--data.dir", str(data), "--run-dir", str(run)])
    try:
        until(lambda: len(metrics(run)) >= 10)
        for process in processes_of(str(run)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.split()[0]), signal.SIGHUP)
        reached = len(metrics(run))
        until(lambda: len(metrics(run)) >= reached + 100 or launch.poll() is not None)
        launch.send_signal(signal.SIGINT)
        assert launch.wait(PATIENCE) == 130
    finally:
        launch.kill()
        launch.wait()
    assert len(events(run, "joined")) == 1  # the same worker all the time


@pytest.mark.slow
def test_a_run_through_kills_a_preemption_and_a_join_is_the_undisturbed_run(data: Path, tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    arguments = [*ARGUMENTS, "--data.dir", str(data)]
    elastic_gpt("train", *arguments, "--run-dir", undisturbed)

    done = lambda: len(metrics(run)) if (run / "metrics.jsonl").exists() else 0  # noqa: E731
    lives = lambda: len(events(run, "restored")) if (run / "ledger.jsonl").exists() else 0  # noqa: E731
    with LocalJob(["train", *arguments, "--run-dir", str(run)], least=1, most=4, threads=1) as job:
        for _ in range(3):
            job.add_node()
        wait(job, lambda: done() >= 105)
        (worker,), survivor = job.workers_of(1), job.workers_of(2)
        known = lives()
        os.kill(worker, signal.SIGKILL)  # a worker dies; its agent starts another
        wait(job, lambda: lives() > known and done() >= 205)
        known = lives()
        job.kill(0)  # the node that holds rank 0 dies
        wait(job, lambda: lives() > known and done() >= 305)
        known = lives()
        new = job.add_node()
        wait(job, lambda: lives() > known)
        assert any(job.node_name(new) in event["nodes"] for event in events(run, "joined"))
        assert job.workers_of(2) == survivor  # the same process through all of it
        known, preempted_at = lives(), done()
        job.terminate(2)  # a preemption: it says goodbye, and no step is lost
        wait(job, lambda: lives() > known)
        wait(job, lambda: not job.running() or done() == STEPS)
        until(lambda: not job.running())
        assert job.nodes[2].returncode == 0
        assert job.exit_code() == 0

    assert_same_run(run, undisturbed)
    assert processes_of(job.name) == []
    (created,) = events(run, "created")
    assert not (shared_memory() / created["run_id"]).exists()
    restored = events(run, "restored")
    assert [event["dropped"] for event in restored] == [0] * len(
        restored
    )  # whoever lives has all that was ever written
    assert all(event["source"].startswith("worker of node") for event in restored[1:])  # never from a copy
    # On a busy machine it may come when the first has begun.
    _, *later = [event for event in events(run, "joined") if job.node_name(2) in event["nodes"]]
    assert len(later) >= 4
    assert all(job.node_name(2) in event["stayed"] for event in later)
    assert job.node_name(0) in [event["node"] for event in events(run, "lost")]
    (left,) = events(run, "left")
    assert (left["node"], left["step"] >= preempted_at) == (job.node_name(2), True)
    assert next(event for event in restored if event["time"] > left["time"])["dropped"] == 0


@pytest.mark.slow
def test_ctrl_c_saves_stops_everything_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    arguments = ["debug_cpu", *TINY, "--steps=300", "--checkpoint.interval=1000", "--data.dir", str(data), "--run-dir"]
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "elastic_gpt.cli", "launch", "--nodes=2", "--", "train", *arguments, str(run)]
    launch = launched(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: len(metrics(run)) >= 50)
    launch.send_signal(signal.SIGINT)
    output = launch.communicate(timeout=PATIENCE)[0]
    assert launch.returncode == 130, output
    assert "saved in" in output
    stopped_at = len(metrics(run))
    assert 50 <= stopped_at < 300
    assert processes_of(str(run)) == []
    saved = [event["step"] for event in events(run, "saved")]
    assert saved == [stopped_at]  # nothing was lost, though no checkpoint was due

    elastic_gpt("launch", "--nodes=2", "--", "train", *arguments, run)
    elastic_gpt("train", *arguments, undisturbed)
    assert_same_run(run, undisturbed)
    assert events(run, "restored")[1]["dropped"] == 0


@pytest.mark.slow
def test_kill_9_of_the_launcher_leaves_no_process(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "debug_cpu", *TINY, "--steps=100000", "--data.dir", str(data), "--run-dir", str(run)]
    command = [sys.executable, "-m", "elastic_gpt.cli", "launch", "--nodes=2", "--", *arguments]
    launch = launched(command)
    until(lambda: len(metrics(run)) >= 20)
    launch.kill()
    launch.wait()
    until(lambda: not processes_of(str(run)), "processes are left")
    assert processes_of(str(run)) == []


def test_a_users_mistake_is_one_line_and_starts_no_process(data: Path) -> None:
    done = elastic_gpt("launch", "--nodes=2", "--", "train", "debug_cpu", "--data.dir", data, "--stepz=3", code=2)
    assert done.stderr == "error: unknown setting 'stepz' in the flags: did you mean 'steps'?\n"
    assert done.stdout == ""
    for words, cure in (
        (["--nodes=2", "--nnodes=3:4", "--", "train", "debug_cpu"], "start between 3 and 4"),
        (["--nnodes=4:2", "--", "train", "debug_cpu"], "--nnodes 2:4"),
        (["--", "train", "debug_cpu"], "--nodes 3 starts three here"),
        (["--nnodes=1:2", "--", "train", "debug_cpu"], "add --nodes N"),
        (["--nodes=2"], "say what to launch"),
        (["--nodes=2", "--", "prepare", "x.txt"], "say what to launch"),
        (["--nodes=0", "--", "train", "debug_cpu"], "'0' is not a whole number from 1"),
        (["--nodes=1", "--nproc=0", "--", "train", "debug_cpu"], "'0' is not a whole number from 1"),
        (["--nodes=1", "--network-check", "--", "train", "debug_cpu"], "leave it out with --nodes"),
        (["--nodes=99", "--nproc=99", "--", "train", "debug_cpu"], "one machine takes 256 workers"),
    ):
        done = elastic_gpt("launch", *words, code=2)
        assert cure in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_worker_that_crashes_each_time_ends_the_job_and_its_last_word_is_shown(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text("1 / 0\n")
    done = elastic_gpt("launch", "--nodes=2", "--nnodes=2:2", "--", "run", script, code=1)
    assert f"error: {script}: ZeroDivisionError: division by zero" in done.stdout
    assert "error: no node finished the job" in done.stdout
    (log,) = [line.split("see ")[1] for line in done.stdout.splitlines() if "no node finished" in line]
    assert Path(log).read_text().count(f'File "{script}", line 1') == 3  # it was tried again, twice


@pytest.mark.slow
def test_a_run_directory_with_a_folder_for_a_file_ends_the_job_with_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    words = ["train", "debug_cpu", *TINY, "--data.dir", data, "--run-dir", tmp_path / "run"]
    done = elastic_gpt("launch", "--nodes=2", "--nnodes=2:2", "--", *words, code=2)
    assert "metrics.jsonl: Is a directory" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_damaged_run_ends_the_job_on_all_nodes_with_one_line(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["debug_cpu", *TINY, "--steps=20", "--data.dir", data, "--run-dir", run]
    elastic_gpt("train", *arguments)
    os.truncate(run / "checkpoints/step_00000020/model.safetensors", 3)
    done = elastic_gpt("launch", "--nodes=2", "--nnodes=2:2", "--", "train", *arguments, code=2)
    assert "is whole" in done.stdout
    assert "restore one from a backup" in done.stdout


@pytest.mark.slow
def test_nodes_with_different_settings_do_not_train_together(data: Path, tmp_path: Path) -> None:
    arguments = ["train", "debug_cpu", *TINY, "--steps=50", "--data.dir", str(data), "--run-dir", str(tmp_path / "run")]
    lines: list[str] = []
    with LocalJob(arguments, least=2, most=2, say=lines.append) as job:
        job.add_node()
        job.command.append("--optimizer.learning-rate=0.5")
        job.add_node()
        wait(job, lambda: len(job.running()) == 0 or bool(metrics(tmp_path / "run")))
        assert job.exit_code() == 2
    assert any("different settings: optimizer.learning_rate=0.5 on" in line for line in lines), lines


@pytest.mark.slow
def test_nodes_that_leave_one_after_the_other_lose_nothing(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "debug_cpu", *TINY, "--steps=100000", "--checkpoint.interval=100000"]
    with LocalJob([*arguments, "--data.dir", str(data), "--run-dir", str(run)], least=1, most=2) as job:
        job.add_node()
        job.add_node()
        wait(job, lambda: len(metrics(run)) >= 100)
        job.terminate(0)
        time.sleep(1.0)  # the other is between two worlds, or in a new one
        job.terminate(1)
        until(lambda: not job.running())
        assert job.exit_code() != 0  # the job is not finished
    done = metrics(run)[-1]["step"]
    assert max(int(path.name[5:]) for path in (run / "checkpoints").iterdir()) == done


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_change_loses_no_more_than_the_kill_did(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["debug_cpu", *TINY, "--checkpoint.interval=100000", "--data.dir", str(data), "--run-dir", str(run)]
    command = ["train", *arguments, "--steps=100000"]
    with LocalJob(command, least=1, most=2) as job:
        job.add_node()
        job.add_node()
        wait(job, lambda: len(metrics(run)) >= 100)
        os.kill(job.workers_of(0)[0], signal.SIGKILL)
        time.sleep(0.3)
        for node in (0, 1):
            job.terminate(node)
        until(lambda: not job.running())
    reached = len(metrics(run))
    elastic_gpt("launch", "--nodes=1", "--", "train", *arguments, f"--steps={reached + 20}")
    restored = events(run, "restored")[-1]
    assert restored["step"] >= reached - 10  # the snapshots outlived their nodes
    assert [line["step"] for line in metrics(run)] == list(range(1, reached + 21))


@pytest.mark.slow
def test_a_survivor_keeps_its_process_while_no_master_answers_and_saves_where_it_is_asked_to_leave(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["train", *ENDLESS, "--data.dir", str(data), "--run-dir", str(run)]
    lines: list[str] = []
    with LocalJob(arguments, least=1, most=2, threads=1, say=lines.append) as job:
        job.add_node()
        job.add_node()
        wait(job, lambda: len(metrics(run)) >= 50 and any(event["world_size"] == 2 for event in events(run, "joined")))
        survivor = job.workers_of(0)
        job.kill_master()
        job.kill(1)
        wait(job, lambda: any("no master answers" in line for line in lines))  # ten tries: 50 s
        job.start_master()
        reached = len(metrics(run))
        wait(job, lambda: len(metrics(run)) > reached + 10)
        assert job.workers_of(0) == survivor
        job.kill_master()
        job.terminate(0)
        until(lambda: not job.running())
        assert job.nodes[0].returncode == 0
    assert events(run, "restored")[-1]["dropped"] == 0
    assert events(run, "saved")[-1]["step"] == metrics(run)[-1]["step"]


@pytest.mark.slow
def test_a_worker_that_dies_while_its_node_waits_for_others_leaves_no_other_behind(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", *ENDLESS, "--data.dir", str(data), "--run-dir", str(run)]
    with LocalJob(arguments, least=2, most=2, workers=2, threads=1) as job:
        node = job.add_node()
        wait(job, lambda: "attempts to join" in job.log(node).read_text())
        old = job.workers_of(node)
        os.kill(old[1], signal.SIGKILL)
        job.add_node()
        wait(job, lambda: len(metrics(run)) >= 10)
        now = job.workers_of(node)
        assert "could not join" not in job.log(node).read_text()  # the first world has them
    assert len(old) == len(now) == 2
    assert not set(old) & set(now)
