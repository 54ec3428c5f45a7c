"""Command lines that answer a typo with the nearest right word: this room's, and those of the Kubernetes client."""

import argparse
import difflib
import re
from typing import Any, NoReturn

USERS_MISTAKE = 2  # the exit status that says: starting this again will not help


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a typo with the nearest right word, in one line."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """A subparser would hand what it does not know up to one that knows other flags."""
        known, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        typo, known = "", []
        if message.startswith("unrecognized"):
            typo = next((word.partition("=")[0] for word in message.split() if word.startswith("-")), "")
            known = [flag for action in self._actions for flag in action.option_strings]
        elif choice := re.match(r"argument (?P<what>[^:]+): invalid choice: '(?P<typo>[^']*)'", message):
            typo, what = choice["typo"], choice["what"]
            known = [
                word
                for action in self._actions
                if what in ("/".join(action.option_strings), action.metavar)
                for word in action.choices or []
            ]
            if what == "ACTION":
                message = f"no action '{typo}'"
        near = difflib.get_close_matches(typo, known, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        self.exit(USERS_MISTAKE, f"error: {message}{hint}; {self.prog} --help tells more\n")
