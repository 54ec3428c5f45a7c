"""The program of a node in an OCI Data Science job: it turns the environment of ADS into that of an elastic run.

ADS sets OCI__MODE (MAIN or WORKER), OCI__WORKER_COUNT, MASTER_ADDR, MASTER_PORT and RANK. The main node keeps torchrun's
store; ranks are torchrun's business here, for they change when nodes come and go. Data and run directory are URLs.
"""

import os
import sys
from pathlib import Path

NEEDED = ("OCI__MODE", "OCI__WORKER_COUNT", "MASTER_ADDR")
PORT = "29400"  # the one that ADS' own diagnosis asks to be open
START = Path(__file__).resolve().parents[1] / "torchrun" / "prepared.sh"


def main(arguments: list[str]) -> int:  # noqa: RET503 (execvpe does not return)
    """Prepare the data on the main node, then execute the training. Returns an exit code if that is not reached."""
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        print(f"error: no {', '.join(missing)} in the environment: start this by `ads opctl run`", file=sys.stderr)
        return 2
    taken = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment["FIRST"] = "1" if os.environ["OCI__MODE"] == "MAIN" else "0"
    environment["RENDEZVOUS"] = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', PORT)}"
    environment.setdefault("NODES", f"1:{int(os.environ['OCI__WORKER_COUNT']) + 1}")
    os.execvpe("sh", ["sh", str(START), *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
