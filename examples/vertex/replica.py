"""The program of a replica in a Vertex AI CustomJob: it turns CLUSTER_SPEC into the environment of an elastic run.

Workerpool 0 is one replica: it prepares the text and keeps torchrun's store, and the job ends with it. The replicas of the
other pools may be restarted; ranks are torchrun's business. Data and run directory are URLs.
"""

import json
import os
import sys
from pathlib import Path

PORT = "29400"  # the one in CLUSTER_SPEC, 2222, is Vertex AI's for TensorFlow; replicas reach each other at any
START = Path(__file__).resolve().parents[1] / "torchrun" / "prepared.sh"


def main(arguments: list[str]) -> int:  # noqa: RET503 (execvpe does not return)
    """Prepare the data on the first replica, then execute the training. Returns an exit code if that is not reached."""
    try:
        spec = json.loads(os.environ["CLUSTER_SPEC"])
        pools, task = spec["cluster"], spec["task"]
        first = (task["type"], task["index"]) == ("workerpool0", 0)
        host = pools["workerpool0"][0].rpartition(":")[0]
    except (KeyError, IndexError, ValueError):
        told = os.environ.get("CLUSTER_SPEC", "not set")
        print(f"error: CLUSTER_SPEC ({told}): start this as a CustomJob of Vertex AI, which sets it", file=sys.stderr)
        return 2
    taken = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment["FIRST"] = "1" if first else "0"
    environment["RENDEZVOUS"] = f"{host}:{os.environ.get('RENDEZVOUS_PORT', PORT)}"
    environment.setdefault("NODES", f"1:{sum(map(len, pools.values()))}")
    os.execvpe("sh", ["sh", str(START), *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
