"""private.py: two users of one machine share no fixed path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_gpt.nodes import private
from tests.conftest import PATIENCE, TINY, environment, metrics

SECOND_USER = 12345
# As a machine looks on which somebody else has run DLRover, and has closed the folder; in this process's view of it only.
OTHERS = """
mkdir -p /tmp/dlrover /tmp/ckpt_sock
for folder in /tmp/dlrover /tmp/ckpt_sock; do mount -t tmpfs -o uid=1,mode=700 tmpfs $folder || exit 77; done
"$@" || exit $?
found=$(ls -A /tmp/dlrover /tmp/ckpt_sock | grep -v '^/\\|^$')
[ -z "$found" ] || { echo "left behind: $found" >&2; exit 78; }
"""
CLOSED = ["unshare", "--mount", "sh", "-c", OTHERS, "sh"]
AS_SECOND_USER = [
    *("env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME"),
    *("setpriv", f"--reuid={SECOND_USER}", f"--regid={SECOND_USER}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),  # to read the program, wherever it lies
]


@pytest.fixture
def second_user() -> list[str]:
    """What starts a command as another user of this machine."""
    if os.getuid() != 0:
        pytest.skip("only root can be somebody else")
    if not (shutil.which("setpriv") and shutil.which("unshare")):
        pytest.skip("needs setpriv and unshare")
    if subprocess.run([*CLOSED, *AS_SECOND_USER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount, or not change its user")
    return [*CLOSED, *AS_SECOND_USER]


def test_a_network_check_in_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("dlrover.python.common.constants")
    folder = tmp_path / "dlrover/network_check"
    monkeypatch.setattr(constants.ConfigPath, "NETWORK_CHECK_DATA_DIR", str(folder))
    private.refuse_anothers_network_check()
    assert folder.is_dir()
    monkeypatch.setattr(os, "getuid", lambda: SECOND_USER)
    with pytest.raises(ValueError, match="which is another user's here: leave it out"):
        private.refuse_anothers_network_check()


@pytest.mark.slow
def test_two_users_prepare_launch_and_train_at_once(second_user: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elastic_gpt.cli"]
    jobs = []
    for number, start in enumerate(([], second_user)):
        home = tmp_path / f"user-{number}"
        home.mkdir()
        os.chown(home, SECOND_USER if start else 0, SECOND_USER if start else 0)
        words = [
            *(*command, "prepare", "--sample", "--tokenizer", "char", "--output-dir", "data", "&&"),
            *(*command, "launch", "--nodes", "1", "--", "train", "debug_cpu", "--data.dir", "data", "--run-dir", "run"),
            *("--steps=3", *TINY),
        ]
        jobs.append(
            (
                home,
                subprocess.Popen(
                    [*start, "sh", "-c", " ".join(words)], cwd=home, env=environment(), text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                ),
            )
        )  # fmt: skip
    for home, job in jobs:
        output, _ = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, output
        assert [line["step"] for line in metrics(home / "run")] == [1, 2, 3]
