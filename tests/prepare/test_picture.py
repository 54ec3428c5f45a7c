"""picture.py: drawing prints no warnings, whatever the folder is called and wherever home is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prepare import prepare as room
from prepare.picture import plain

pytest.importorskip("matplotlib")


def test_a_folders_name_is_drawn_as_it_is_and_no_library_has_a_word(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text that is long enough\n" * 50)
    odd = tmp_path / "\u30c7\u30fc\u30bf $x^$ $_$"
    assert room.main([str(text), "--output-dir", str(odd)]) == 0
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    done = subprocess.run(
        [sys.executable, "-m", "elastic_gpt.cli", "inspect", str(odd), "--histogram", str(tmp_path / "x.png")],
        env=environment | {"HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_dollar_sign_is_a_dollar_sign() -> None:
    assert plain("$5 to $6") == r"\$5 to \$6"


def test_a_drill_shows_no_word_of_a_library_either(tmp_path: Path) -> None:
    pytest.importorskip("dlrover")
    (tmp_path / "thesis.txt").touch()  # so that it ends after its imports
    done = subprocess.run(
        [sys.executable, "-m", "elastic_gpt.cli", "drill", "--output-dir", str(tmp_path)],
        env=os.environ | {"HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == f"error: {tmp_path} is not a drill's folder: name a new one with --output-dir\n"
