"""The command lines of this room."""

import argparse
import difflib
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistyped flag with the nearest right one, in a line. Exit code 2."""

    def error(self, message: str) -> NoReturn:
        typos = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        known = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(typos[0], known, n=1) if message.startswith("unrecognized") and typos else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}{hint}; {self.prog} --help tells more\n")
