"""One front door: whatever ends a command, its exit code says whether to try again, and a person reads one line."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prepare.frontdoor import DONE, FAILED, TRACEBACK, USERS_MISTAKE, Parser, command, install, number, whole, writing


@pytest.fixture(autouse=True)
def no_traceback_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("steps is 0:\n  take 1"), USERS_MISTAKE, "error: steps is 0: take 1"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), USERS_MISTAKE, "error: x.txt: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), USERS_MISTAKE, "error: /x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left", "/x"), FAILED, "error: /x: No space left"),
        (
            OSError(errno.ENOSPC, "No space left"),
            FAILED,
            "error: No space left: make room where this writes, or where its output goes",
        ),
        (OSError("the master did not start"), FAILED, "error: the master did not start"),
        (MemoryError(), FAILED, "error: not enough memory: give it more, or ask for less"),
        (
            ModuleNotFoundError("No module", name="torch.nn"),
            2,
            f"error: no package torch: {install('train')}",
        ),
        (
            RecursionError("deep"),
            USERS_MISTAKE,
            "error: too deeply nested to be read: deep; look at the files that you named",
        ),
    ],
)
def test_an_error_ends_in_one_line_and_its_own_exit_code(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main() -> int:
        raise error

    assert main() == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, FAILED), (errno.EIO, FAILED), (errno.EACCES, USERS_MISTAKE)]
)
def test_an_error_of_ours_about_the_system_is_worth_another_try_where_its_cause_is(number: int, code: int) -> None:
    @command
    def main() -> int:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("cannot write") from error

    assert main() == code


def test_a_write_that_names_no_file_is_told_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> int:
        with writing(Path("out")):
            raise OSError(errno.ENOSPC, "No space left")

    assert main() == FAILED
    assert capsys.readouterr().err == "error: out: No space left\n"


def test_an_error_that_nobody_foresaw_names_its_place_and_how_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @command
    def main() -> int:
        return {}["key"]

    assert main() == FAILED
    shown = capsys.readouterr().err
    assert "KeyError at " in shown
    assert "test_frontdoor.py:" in shown
    assert f"{TRACEBACK}=1" in shown
    assert shown.count("\n") == 1
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_a_command_and_is_its_exit_code(number: int, code: int) -> None:
    unwound = []

    @command
    def main() -> int:
        try:
            signal.raise_signal(number)  # not os.kill: another thread may take it, and this one has returned by then
            return DONE
        finally:
            unwound.append(True)

    assert main() == code
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SAYS_MUCH = """
import sys
from prepare.frontdoor import command
@command
def main():
    for _ in range(5000):
        print("a line that is longer than nothing")
    return 0
sys.exit(main())
"""


@pytest.mark.parametrize(("shell", "code"), [("| head -1", 141), (">/dev/full", 1), (">&-", 0), ("2>&- >&- <&-", 0)])
def test_output_that_cannot_be_written_ends_without_a_traceback(shell: str, code: int) -> None:
    line = f'"$0" -c "$1" {shell}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, SAYS_MUCH], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    full = "error: No space left on device: make room where this writes, or where its output goes\n"
    assert done.stderr == (full if code == 1 else "")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_help_that_cannot_be_written_is_not_a_success(buffered: str) -> None:
    code = "import prepare.frontdoor as f; raise SystemExit(f.command(lambda: f.Parser('x').parse_args(['--help']))())"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert buffered or done.returncode == FAILED  # unbuffered, argparse keeps it to itself


def test_a_locale_that_cannot_say_it_is_answered_with_escapes() -> None:
    code = "from prepare.frontdoor import command; command(lambda: print('caf\\xe9 \\udcff') or 0)()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout == rb"caf\xe9 \udcff" + b"\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--evnts=3"], "unrecognized arguments: --evnts=3: did you mean --events?; x --help tells more"),
        (["--event", "3"], "unrecognized arguments: --event 3: did you mean --events?; x --help tells more"),
        (["--kind", "on"], "argument --kind: invalid choice: 'on' (choose from 'one', 'two'): did you mean one?"),
        (["--name", "-y"], "argument --name: expected one argument: one that begins with - is written --name=-..."),
        (["--events", "0"], "argument --events: '0' is not a whole number of 1 or more"),
        (["--share", "nan"], "argument --share: 'nan' is not a number from 0 to 1"),
        (["--name", "caf\udce9"], r"'caf\udce9' is not UTF-8: write it, or rename the file, in UTF-8"),
    ],
)
def test_a_mistake_is_told_with_its_cure(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("x")
    parser.add_argument("--events", type=whole(1))
    parser.add_argument("--share", type=number(0, 1))
    parser.add_argument("--kind", choices=["one", "two"])
    parser.add_argument("--name")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == USERS_MISTAKE
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {told}")
    assert shown.count("\n") == 1
