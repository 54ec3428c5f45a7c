"""RUN/ledger.jsonl: what happened to a run, a line an event (law 8).

Each rendezvous begins a *life* of the run. Rank 0 of that life writes `joined` with the members and where the state came
from; who was there before and is no more is `lost` (or `left`, if it said goodbye).
"""

import json
import time
import uuid
from pathlib import Path
from typing import Any


class Ledger:
    """Appends events; reads them back.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "ledger.jsonl"

    def write(self, event: str, **facts: Any) -> None:
        """Append one event, with the time in seconds since 1970. One write, so that lines of two writers never mix."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first. A line that a killed writer left unfinished is not one."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def run_id(self) -> str:
        """The identity of this run, made when its directory was: what tells its snapshots from another run's."""
        for event in self.events():
            if event["event"] == "created":
                return str(event["run_id"])
        run_id = uuid.uuid4().hex[:12]
        self.write("created", run_id=run_id)
        return run_id

    def begin_life(self, nodes: list[str], world_size: int, step: int, source: str, dropped: int) -> None:
        """Write who is here now, who is no more, and where the state came from.

        Args:
            nodes: names of the nodes.
            step: updates done in the state.
            source: where the state was restored from.
            dropped: steps that were done before and have to be done again.
        """
        events = self.events()
        before: list[str] = next((event["nodes"] for event in reversed(events) if event["event"] == "joined"), [])
        last = max((place for place, event in enumerate(events) if event["event"] == "joined"), default=0)
        said_goodbye = {event["node"] for event in events[last:] if event["event"] == "left"}
        finished = any(event["event"] in ("finished", "stopped") for event in events[last:])
        for node in sorted(set(before) - set(nodes) - said_goodbye):
            if not finished:
                self.write("lost", node=node, step=step)
        life = sum(event["event"] == "joined" for event in events)
        self.write("joined", life=life, nodes=nodes, world_size=world_size)
        self.write("restored", step=step, source=source, dropped=dropped)
