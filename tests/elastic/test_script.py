"""script.py: a user's script runs as it does under `python`, and its own error is told."""

import sys
from pathlib import Path

import pytest

from elastic_gpt.script import main


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's words and folder are not the next test's."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_script_is_the_main_module_with_its_own_words_and_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neighbour_of_own.py").write_text("WORD = 'hello'\n")
    script = tmp_path / "own.py"
    script.write_text("import sys, neighbour_of_own\nprint(__name__, sys.argv, neighbour_of_own.WORD)\n")
    assert main([str(script), "run", "--help", "--steps=3"]) == 0
    assert capsys.readouterr().out == f"__main__ {[str(script), 'run', '--help', '--steps=3']} hello\n"


def test_a_scripts_own_error_has_its_traceback_and_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "own.py"
    script.write_text("raise KeyError('loss')\n")
    assert main([str(script)]) == 1
    told = capsys.readouterr().err
    assert f'File "{script}", line 1' in told
    assert told.endswith(f"\nerror: {script}: KeyError: 'loss'\n")


def test_a_scripts_exit_code_is_the_commands(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text("raise SystemExit(7)\n")
    with pytest.raises(SystemExit, match="7"):
        main([str(script)])


def test_a_script_that_is_not_there_is_a_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2  # a folder is none
    assert capsys.readouterr().err.startswith(f"error: there is no script {tmp_path}: name a Python file")
