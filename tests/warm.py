"""What the tests' standby process runs: any command, as `elastic-gpt COMMAND` does."""

import importlib
from collections.abc import Sequence

from elastic_gpt.cli import COMMANDS


def main(arguments: Sequence[str], prog: str) -> int:
    room = importlib.import_module(COMMANDS[prog.removeprefix("elastic-gpt ")][0])
    return int(room.main(arguments, prog=prog))
