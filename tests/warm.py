"""The module of the tests' standby process. It runs any command, like `elastic-gpt COMMAND`."""

import importlib
from collections.abc import Sequence

from elastic_gpt.cli import COMMANDS


def main(arguments: Sequence[str], prog: str) -> int:
    room = importlib.import_module(COMMANDS[prog.removeprefix("elastic-gpt ")][0])
    return int(room.main(arguments, prog=prog))
