"""Runs a user's training script as one of many workers. The script iterates over `Elastic` (elastic_gpt/run.py)."""

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import elastic_gpt.run  # noqa: F401 - a standby imports this room, and every worker then has it
from prepare.frontdoor import DONE, FAILED, REMAINDER, Parser, command, last_word, printable

EXAMPLES = """\
examples:
  %(prog)s examples/own_model.py runs/moons                             in this process alone
  elastic-gpt launch --nodes 3 -- run examples/own_model.py runs/moons  on three nodes that can be killed"""


def check(argv: Sequence[str], prog: str = "elastic-gpt run") -> tuple[Path, list[str]]:
    """The script and its arguments. Raises ValueError if there is no such script."""
    parser = Parser(prog, description="Run a training script of your own elastically.", epilog=EXAMPLES)
    parser.add_argument("script", metavar="SCRIPT", help="a Python file that iterates over elastic_gpt.Elastic")
    parser.add_argument("arguments", nargs=REMAINDER, metavar="...", help="its own")
    args = parser.parse_args(argv)
    script = Path(args.script)
    if not script.is_file():
        raise ValueError(f"there is no script {script}: name a Python file, as in `elastic-gpt run my_model.py`")
    return script, args.arguments


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt run") -> int:
    """Run the script. Exit codes: those of the script, and of workers (contract.py)."""
    script, arguments = check(sys.argv[1:] if argv is None else argv, prog)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:  # the user needs the traceback of their own error
        traceback.print_exc()
        last_word(f"error: {script}: {type(error).__name__}: {printable(str(error))}")  # the launcher shows this
        return FAILED
    return DONE
