"""examples/torchrun/slurm.sbatch: Slurm knows its options, and its commands (stand-ins here) start the nodes that train."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, TINY, environment, events, metrics
from tests.examples.test_torchrun import free_port

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "examples" / "torchrun" / "slurm.sbatch"

# The long options of sbatch(1) and srun(1) that this script may use, and whether each takes a value.
SBATCH = {
    "job-name": True,
    "nodes": True,
    "ntasks-per-node": True,
    "no-kill": False,
    "requeue": False,
    "open-mode": True,
}
SRUN = {"no-kill": False, "kill-on-bad-exit": True}

SCONTROL = '#!/bin/sh\ntest "$1 $2 $3" = "show hostnames 127.0.0.[1-2]" && printf "127.0.0.1\\n127.0.0.2\\n"\n'
SRUN_STAND_IN = """#!/bin/sh
# Without the options of srun: as many copies as the job has nodes, and the worst of their exit codes.
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


def options(text: str, pattern: str) -> list[str]:
    return [word for line in re.findall(pattern, text, re.M) for word in line.split() if word.startswith("--")]


def wrong(text: str) -> list[str]:
    """Options that Slurm does not know, or that lack a value or have one too many; and what an elastic run needs."""
    found = []
    for known, pattern, needed in (
        (SBATCH, r"^#SBATCH (.+)$", {"nodes", "ntasks-per-node", "no-kill", "requeue"}),
        (SRUN, r"^exec srun (.+)$", {"no-kill", "kill-on-bad-exit"}),
    ):
        words = [word.removeprefix("--").partition("=") for word in options(text, pattern)]
        found += [f"{name}{equals}" for name, equals, _ in words if known.get(name) is not bool(equals)]
        found += sorted(needed - {name for name, _, _ in words})
    return found


def test_slurm_knows_every_option_and_a_misspelt_or_missing_one_is_caught() -> None:
    text = SCRIPT.read_text()
    assert wrong(text) == []
    for name in ("nodes", "ntasks-per-node", "no-kill", "requeue", "kill-on-bad-exit"):
        assert wrong(text.replace(f"--{name}", f"--{name}x")), name
        assert wrong(re.sub(rf"^(#SBATCH |exec srun .*?)--{name}\S*", r"\1", text, flags=re.M)), name


@pytest.mark.slow
def test_two_nodes_of_a_slurm_job_train_together(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN_STAND_IN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    flags = [*TINY, "--steps=40", "--evaluate.interval=0", f"--data.dir={data}", f"--run-dir={run}"]
    more = {
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(REPO),
        "LEAST_NODES": "2",
        "PORT": str(free_port()),
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        ["sh", str(SCRIPT), "debug_cpu", *flags],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["world_size"] for event in events(run, "joined")] == [2]
    assert len(metrics(run)) == 40
