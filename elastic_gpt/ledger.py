"""RUN/ledger.jsonl: what happened to a run, one line for each event (law 8), and what it cost.

    elastic-gpt ledger RUN

Each rendezvous begins a *life* of the run. Its rank 0 writes who is in it, who has gone, and where
the state came from. After its first step it writes what the change cost. Whoever notices the end of
a life writes that.
"""

import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic_gpt.contract import LEDGER, METRICS, Event
from elastic_gpt.identity import directory
from elastic_gpt.mirror import here, mirror_of, shown
from prepare.frontdoor import Parser, command

IDENTITIES = ("created", "copied", "upgraded")
PARTS = ("detection", "rendezvous", "restore", "first_step")  # the parts of a recovery, in seconds
# These only say what time was lost. They are on storage no later than the next other event.
NOTES = {"interrupted", "recovered", "slow"}
ASKED = {"stopped", "finished", "diverged"}  # ends of a life after which there is nothing to recover from


def is_pause(life: Sequence[dict[str, Any]], nodes: Sequence[str]) -> bool:
    """Whether a life was stopped on purpose or had finished, so that the time after it is not part of a recovery.

    That is also so if a node left in good order and no node came back: when a job is suspended,
    nodes that are between two worlds go without an event.

    Args:
        life: events of the life; the first one is `joined`.
        nodes: names of the nodes in the life after it.
    """
    said = {event["event"] for event in life}
    return bool(said & ASKED) or bool(goodbyes(life) and not set(life[0]["nodes"]) & set(nodes))


def goodbyes(life: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of those nodes of a life that left it in good order; one of the life before may be late."""
    return [event for event in life if event["event"] == "left" and event["node"] in life[0]["nodes"]]


class Ledger:
    """Appends events; reads them back.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / LEDGER
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        """Are called with each event that this process writes, and with the goodbyes that `begin_life` finds."""
        self._read_up_to = 0  # bytes, of what `superseded` has seen

    def write(self, event: Event, **facts: Any) -> None:
        """Append one event, with the time in seconds since 1970. A full disk costs the event, not the training."""
        line = _line(event, facts)
        try:
            self._append(line, sync=event not in NOTES)
        except OSError as error:
            print(f"warning: the ledger lacks {event} {strict_json(facts)}: {error}", file=sys.stderr, flush=True)
        self._tell(line)

    def write_durably(self, event: Event, **facts: Any) -> None:
        """Append one event. It is on storage when this returns.

        Raises:
            OSError: if it cannot be written.
        """
        line = _line(event, facts)
        self._append(line)
        self._tell(line)

    def _tell(self, event: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener(event)

    def _append(self, *events: Mapping[str, Any], sync: bool = True) -> int:
        """Append events, all or (if the writer is killed) the first of them. Returns where they end, in bytes.

        Args:
            sync: whether they are on storage when this returns.
        """
        lines = "".join(strict_json(event) + "\n" for event in events)
        with self.path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            unfinished = file.read(1) not in (b"", b"\n")  # the half line of a killed writer
            content = (b"\n" if unfinished else b"") + lines.encode()
            while content:  # of a disk that gets full, the first write takes a part and the next one says so
                content = content[file.write(content) :]
            end = file.tell()
            if sync:
                os.fsync(file.fileno())
        if mirror := mirror_of(self.path):
            mirror.append(self.path.name, lines.encode())
        return end

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return read_lines(self.path)

    def run_id(self) -> str:
        """The id of this run, made together with its directory. It tells this run's states from those of another.

        Raises:
            OSError: if the id of a new run cannot be written.
        """
        if identity := self.identities():
            return str(identity[-1]["run_id"])
        self.write_durably("created", run_id=(run_id := new_id()), directory=directory(self.path.parent))
        return run_id

    def identities(self) -> list[dict[str, Any]]:
        """The events that hold ids: of the runs that this one was copied from, and last its own."""
        return [event for event in self.events() if event["event"] in IDENTITIES]

    def lives(self) -> int:
        """How many lives the run has had."""
        return sum(event["event"] == "joined" for event in self.events())

    def branches(self) -> list[tuple[int, int]]:
        """Number of each life, and the step at which it began. What earlier lives did after that step is abandoned.

        If a life ended because its updates were not finite, all from the first of these updates on
        is abandoned.
        """
        found, lives = [], 0
        for event in self.events():
            lives += event["event"] == "joined"
            if event["event"] == "restored":
                found.append((event["life"], event["step"]))
            elif event["event"] == "diverged":
                found.append((lives, event["good"]))
        return found

    def begin_life(
        self,
        nodes: list[str],
        world_size: int,
        step: int,
        source: str,
        dropped: int,
        name: str = "",
        stayed: Sequence[str] = (),
    ) -> None:
        """Write who is in this life, who has gone, and where the state came from.

        Args:
            nodes: names of the nodes.
            step: updates done in the state.
            source: where the state was restored from.
            dropped: steps that were done before and have to be done again.
            name: name of this life, which is in all that it saves.
            stayed: nodes whose workers were in the life before, in the same processes.

        Raises:
            OSError: if it cannot be written. What this life saves would then belong to no known life.
        """
        events, new = self.events(), []
        last = max((place for place, event in enumerate(events) if event["event"] == "joined"), default=None)
        if last is not None:
            paused = is_pause(events[last:], nodes)
            left = goodbyes(events[last:])
            for event in left if stayed else []:  # they were written by those that have gone
                self._tell(event)
            said_goodbye = {event["node"] for event in left}
            for node in sorted(set() if paused else set(events[last]["nodes"]) - set(nodes) - said_goodbye):
                new.append(_line("lost", {"node": node, "step": step}))
        life = sum(event["event"] == "joined" for event in events)
        who = {"life": life, "name": name, "nodes": nodes, "world_size": world_size, "stayed": list(stayed)}
        state = {"life": life, "step": step, "source": source, "dropped": dropped}
        new += [_line("joined", who), _line("restored", state)]
        self._read_up_to = self._append(*new)  # together, since all ranks wait for this
        for line in new:
            self._tell(line)

    def superseded(self) -> bool:
        """Whether another life has begun after this one, so that this world must end."""
        if (mirror := mirror_of(self.path)) and mirror.fenced:
            return True
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size <= self._read_up_to:
                    return False
                file.seek(self._read_up_to)
                new = file.read()
        except OSError:  # the volume is away, so nothing is known
            return False
        self._read_up_to += new.rfind(b"\n") + 1
        return b'"event": "joined"' in new

    def recovered(self, last_step: float | None, joined: float, restored: float) -> None:
        """Write what the change of worlds cost, now that the first step after it is done.

        Args:
            last_step, joined, restored: when the last step before was written, when the new group was formed, and when
                the state was restored; seconds since 1970. last_step None: this is the start of the run.
        """
        events = self.events()
        lives = [place for place, event in enumerate(events) if event["event"] == "joined"]
        paused = len(lives) > 1 and is_pause(events[lives[-2] : lives[-1]], events[lives[-1]]["nodes"])
        if last_step is None or paused:
            return
        # If the whole world died, nobody noticed it.
        noticed = [event["time"] for event in events if event["event"] == "interrupted" and event["time"] > last_step]
        moments = [last_step, noticed[0] if noticed else last_step, joined, restored, time.time()]
        seconds = [round(max(0.0, after - before), 3) for before, after in itertools.pairwise(moments)]
        self.write("recovered", **dict(zip(PARTS, seconds, strict=True)))


def _line(event: Event, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"event": event, "time": round(time.time(), 3), **facts}


@dataclass(frozen=True)
class Account:
    """What a run cost, from its ledger and metrics."""

    steps: int
    """Steps in the kept history."""
    dropped: int
    """Steps that were done, lost and done again."""
    elapsed: float
    """Seconds from the first world to the last event, without the time between an asked stop and the next start."""
    useful: float
    """Seconds that the kept steps took. The first step of a life may include a compilation, and counts as a usual one."""

    @property
    def goodput(self) -> float:
        """Useful step time over elapsed time, 0 to 1."""
        return self.useful / self.elapsed if self.elapsed else 0.0


def new_id() -> str:
    return uuid.uuid4().hex[:12]


def strict_json(content: Any, indent: int | None = None) -> str:
    """JSON with null for numbers that are not finite, which JSON does not have."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), allow_nan=False, indent=indent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; [] if there is no file. Ignores a half line that a killed writer left."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of RUN/metrics.jsonl."""
    return read_lines(run / METRICS)


def account(run: Path) -> Account:
    """Add up what a run cost."""
    events, lines = Ledger(run).events(), read_metrics(run)
    starts: list[int] = []  # first steps of the lives in the kept history
    for event in events:
        if event["event"] == "restored":
            starts = [*(step for step in starts if step < event["step"]), event["step"]]
    useful = 0.0
    for start, end in itertools.pairwise([*starts, math.inf]):
        took = [
            line["tokens"] / line["step"] / line["tokens_per_second"] for line in lines if start < line["step"] <= end
        ]
        useful += sum(took[1:]) + statistics.median_low(took) if took else 0.0
    elapsed, since = 0.0, None
    places = [place for place, event in enumerate(events) if event["event"] == "joined"]
    for place, following in itertools.pairwise([*places, None]):
        life = events[place:following]
        since = life[0]["time"] if since is None else since
        if is_pause(life, events[following]["nodes"] if following else life[0]["nodes"]):
            ends = [event["time"] for event in life if event["event"] in ASKED | {"left"}]
            elapsed, since = elapsed + ends[-1] - since, None
    if since is not None:  # still running, or killed
        elapsed += max(events[-1]["time"], (run / METRICS).stat().st_mtime) - since
    return Account(
        steps=len(lines),
        dropped=sum(event["dropped"] for event in events if event["event"] == "restored"),
        elapsed=elapsed,
        useful=useful,
    )


def table(run: Path) -> Table:
    """A row for each life of the run."""
    drawn = Table("life", "workers", "nodes", "from step", "state from", "done again", *PARTS, "together")
    before: set[str] = set()
    row: list[str] = []
    rows = []
    for event in Ledger(run).events():
        if event["event"] == "joined":
            nodes = set(event["nodes"])
            changes = [f"+{name}" for name in sorted(nodes - before)] + [f"-{name}" for name in sorted(before - nodes)]
            before = nodes
            row = [str(event["life"]), str(event["world_size"]), "\n".join(changes) or "the same"]
            rows.append(row)
        elif event["event"] == "restored":
            row += [str(event["step"]), event["source"], str(event["dropped"])]
        elif event["event"] == "recovered":
            seconds = [event[part] for part in PARTS]
            row += [f"{value:.2f} s" for value in [*seconds, sum(seconds)]]
    for row in rows:
        drawn.add_row(*row)
    return drawn


EXAMPLES = """\
examples:
  %(prog)s run                what happened in run/, a row for each life, and the goodput
  %(prog)s drill/run          the same of a drill
"""


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt ledger") -> int:
    """Print the table of a run's lives, and its goodput."""
    parser = Parser(prog, description="What happened to a run, and what it cost.", epilog=EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or its URL")
    run = here(parser.parse_args(argv).run, METRICS)
    if not (run / LEDGER).exists() or not (run / METRICS).exists():
        raise ValueError(f"no run in {shown(run)}: name the --run-dir of a training")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        lives, total = table(run), account(run)
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"the ledger or the metrics in {run} are not as training writes them ({error!r}): restore the files"
        ) from error
    console.print(lives)
    for event in Ledger(run).events():
        if event["event"] == "slow":
            times = event["seconds"] / event["others"]
            print(
                f"slow from step {event['step']}: {event['node']}, {times:.1f} times as long as the others a micro-batch"
            )
    print(
        f"{total.steps:,} steps kept, {total.dropped:,} done again; {total.elapsed:,.1f} s elapsed,"
        f" {total.useful:,.1f} s of them in kept steps: goodput {total.goodput:.1%}"
    )
    return 0
