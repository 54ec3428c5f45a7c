"""The front door of every command: all answer typos, wrong values and `--help` alike, and tell errors in one line.

A command is a function `main(argv, prog) -> int` decorated with `@command`. It reads its flags with
a `Parser`.
"""

import argparse
import contextlib
import difflib
import errno
import functools
import math
import os
import re
import shlex
import signal
import sys
import types
from argparse import REMAINDER as REMAINDER
from argparse import ArgumentTypeError as ArgumentTypeError
from argparse import BooleanOptionalAction as BooleanOptionalAction
from argparse import Namespace as Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

# Exit codes of all commands. A signal ends one with 128 + its number: 130 Ctrl-C, 143 SIGTERM, 141 the reader has left.
DONE = 0
FAILED = 1  # running it again may help
USERS_MISTAKE = 2  # running it again will not help
TIMED_OUT = 124  # the same as of the command `timeout`

TRACEBACK = "ELASTIC_GPT_TRACEBACK"  # environment variable: show the traceback of an error

LAST_WORD = Path("/dev/termination-log")  # the default terminationMessagePath of a container

EXTRAS = {
    **dict.fromkeys(("torch", "dlrover", "grpc", "google", "psutil", "safetensors", "tensorboard", "tornado"), "train"),
    **dict.fromkeys(("kubernetes", "urllib3"), "kubernetes"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    "matplotlib": "plot",
    "pyarrow": "parquet",
    "s3fs": "s3",
    "torchft": "torchft",
}
"""Package to the extra that installs it."""

CHECKOUT = Path(__file__).parents[1]


def install(extra: str) -> str:
    """The command that installs an extra. From a checkout, for nothing is released yet; if it can be told, from this one."""
    if (CHECKOUT / "pyproject.toml").exists():  # this is imported from it, as after `pip install -e`
        return f"pip install -e {shlex.quote(f'{CHECKOUT}[{extra}]')}"
    return f"pip install '.[{extra}]', in a checkout of ElasticGPT"


FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk is full, or the user's share of it

# Errors of the system that only the user can mend. Others (a full disk, a network) may be over at the next try.
_MISTAKES = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
)

P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Decorates the `main` of a command. However it ends, a person sees at most one line, and the exit code says why.

    SIGTERM unwinds it as Ctrl-C does, so that its processes end and half-written files go. A
    command may set its own handlers.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _mend_streams()
        with _terminable():
            try:
                try:
                    return main(*args, **kwargs)
                finally:  # also after --help; when Python itself flushes, at its end, nobody can catch the error
                    if sys.stdout is not None:
                        sys.stdout.flush()
            except KeyboardInterrupt as stop:
                return 128 + (stop.args[0] if stop.args else signal.SIGINT)
            except SystemExit as stop:
                if isinstance(stop.__context__, BrokenPipeError):  # rich turns it into SystemExit(1)
                    return fail(stop.__context__)
                raise
            except Exception as error:
                return fail(error)

    return run


def fail(error: Exception) -> int:
    """Tells an error in one line on standard error, without a traceback. Returns the exit code.

    Says nothing if the reader of standard output has left, as in `elastic-gpt ledger RUN | head
    -1`.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):  # /dev/full, for example; Python would report it a second time at its end
        _give_up_stdout()
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    code, text = _told(error)
    last_word(f"error: {printable(text)}")
    return code


def last_word(line: str) -> None:
    """Tell why this process is about to end: on standard error, and in a pod also as its termination message."""
    with contextlib.suppress(OSError, ValueError):  # standard error is closed
        print(line, file=sys.stderr, flush=True)
    if LAST_WORD.exists():
        with contextlib.suppress(OSError):
            LAST_WORD.write_text(f"{line}\n", encoding="utf-8", errors="backslashreplace")


def printable(name: str) -> str:
    """`name` with escapes for bytes that are not UTF-8 and for control characters, so that any terminal can show it."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that does not stand for a byte
        text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _told(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and the line that a person is told."""
    text = " ".join(line.strip() for line in str(error).splitlines())  # spaces in a printed command stay
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return USERS_MISTAKE, f"no package {package}: {install(EXTRAS[package])}"
    if isinstance(error, ValueError) and not isinstance(error, OSError) and text:  # our own errors are of this kind
        return (FAILED if _may_pass(error.__cause__) else USERS_MISTAKE), text
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        nowhere = "" if where or error.errno not in FULL else ": make room where this writes, or where its output goes"
        return (FAILED if _may_pass(error) else USERS_MISTAKE), f"{where}{error.strerror}{nowhere}"
    if isinstance(error, OSError) and text:
        return FAILED, text
    if isinstance(error, MemoryError):
        return FAILED, f"not enough memory{f' ({text})' if text else ''}: give it more, or ask for less"
    if isinstance(error, RecursionError):
        return USERS_MISTAKE, f"too deeply nested to be read: {text}; look at the files that you named"
    if os.environ.get(TRACEBACK):
        raise error
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
    return FAILED, f"{type(error).__name__}{where}: {text or 'no message'}; {TRACEBACK}=1 shows where it came from"


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within this context, a system error that names no file (a write to a full disk) gets the name `place`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(place)
        raise


def _may_pass(error: BaseException | None) -> bool:
    """Whether it is an error of the system that may be over at the next try: a full disk, a network."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _MISTAKES


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, _frame: types.FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    try:
        free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if free:
            signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread gets signals
        free = False
    try:
        yield
    finally:
        if free and signal.getsignal(signal.SIGTERM) == stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _mend_streams() -> None:
    """Make sure that the standard streams can be written to, even if the shell closed them or the locale is C."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed (`>&-`): the next file that is opened would get its number, and what is printed
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _give_up_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):  # the stream is not a file
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def utf8(word: str) -> str:
    """`word`, if it is UTF-8. Raises ValueError if not, since it could not be written into files and logs."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_shown(word)} is not UTF-8: write it, or rename the file, in UTF-8") from error
    return word


def _shown(word: str) -> str:
    return "'" + word.encode(errors="backslashreplace").decode() + "'"


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most` (None: no upper limit)."""
    bounds = f"from {least} to {most}" if most is not None else f"of {least} or more"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a whole number {bounds}")
        return number

    return parse


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` to `most`."""
    bounds = f"from {least:g} to {most:g}" if most < math.inf else f"of {least:g} or more"

    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (least <= found <= most and math.isfinite(found)):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a number {bounds}")
        return found

    return parse


def hint(typo: str, known: list[str] | tuple[str, ...]) -> str:
    """`: did you mean X?` with the known word nearest to `typo`; "" if none is near."""
    near = difflib.get_close_matches(typo, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a typo with the nearest right word, in one line, and takes no abbreviations.

    Args:
        any_bytes: take file names that are not UTF-8. If not, they are refused, since output files could not name them.
    """

    def __init__(self, *args: Any, any_bytes: bool = False, **kwargs: Any) -> None:
        self.any_bytes = any_bytes
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown words here: a subparser would pass them up to a parser with other flags."""
        words = sys.argv[1:] if args is None else list(args)
        try:
            for word in [] if self.any_bytes else words:
                utf8(word)
        except ValueError as error:
            self.error(str(error))
        known, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        nearest = ""
        if message.startswith("unrecognized"):
            typo = next((word.partition("=")[0] for word in message.split() if word.startswith("-")), "")
            nearest = hint(typo, [flag for action in self._actions for flag in action.option_strings])
        elif choice := re.match(r"argument (?P<what>[^:]+): invalid choice: '(?P<typo>[^']*)'", message):
            typo, what = choice["typo"], choice["what"]
            known = [
                str(word)
                for action in self._actions
                if what in ("/".join(action.option_strings), action.metavar)
                for word in action.choices or []
            ]
            nearest = hint(typo, known)
            if what == "ACTION":
                message = f"no action '{typo}'"
        elif flag := re.match(r"argument (?:.*/)?(--[^:/]+): expected one argument", message):
            nearest = f": one that begins with - is written {flag[1]}=-..."
        self.exit(USERS_MISTAKE, f"error: {message}{nearest}; {self.prog} --help tells more\n")
