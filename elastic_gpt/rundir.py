"""The run directory: all ranks open it together, claim it for their job, and notice if it is a copy."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import yaml

from elastic_gpt import settings
from elastic_gpt.checkpoint import checkpoints_place
from elastic_gpt.claim import Claim, process
from elastic_gpt.contract import CONFIG, LEDGER, METRICS, TOKENIZER, Event
from elastic_gpt.identity import Run, directory, same_directory
from elastic_gpt.ledger import Ledger, new_id
from elastic_gpt.mirror import mirror_of, shown
from elastic_gpt.settings import SettingsError
from elastic_gpt.storage import Unreachable
from elastic_gpt.storeclaim import StoreClaim
from elastic_gpt.world import World
from prepare.frontdoor import FULL

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 7 ms less of each membership change
LOOKS, LOOK_SECONDS = 60, 0.5  # for a file of another node, which an NFS client may see 30 s later
T = TypeVar("T")


class Introduction(NamedTuple):
    """What a worker tells the others of itself while they open the run. It travels with what has to be told anyway."""

    lived_on: bool = False
    """Whether its process was in the life before."""
    started_because: str = ""
    """Why the agent ended the worker that was here before; "" if it did not."""
    offer: Callable[[Run], Any] = lambda _: None
    """Says what it can give the others to go on from, once the run is known."""


class Member(NamedTuple):
    """What a rank has told of itself."""

    node: str
    lived_on: bool
    started_because: str


@dataclasses.dataclass(frozen=True)
class Opened(Generic[T]):
    """A run directory that all ranks have opened."""

    run: Run
    claim: Claim | None
    """The first worker's."""
    told: T
    """What the first worker told all others when it made or found the run."""
    members: list[Member]
    """In order of rank."""
    offers: list[Any]
    """What each rank offers, in order of rank."""


def open_together(
    folder: Path,
    mine: Mapping[str, Any],
    world: World,
    make: Callable[[Callable[[], tuple[Run, Ledger]]], tuple[Run, T]],
    me: Introduction,
) -> Opened[T]:
    """Make or find a run directory. The first worker has the claim.

    A membership change waits for this, and each collective for its slowest rank: there are three.

    Args:
        mine: the settings of this rank, which have to be the same on all ranks.
        make: called by the first worker; it makes what is in the directory, and returns the run and what all ranks have to
            know. Its argument is a function that claims the directory for this job.
        me: what this rank tells of itself.

    Raises:
        SettingsError: on all ranks, if their settings differ, or the directory cannot be written or is not shared by
            the nodes; and whatever `make` raises.
        InUse: on all ranks, if another job trains into the directory.
    """
    # --- all ranks have the same settings
    hellos = world.gather((dict(mine), process(), Member(world.node, me.lived_on, me.started_because)))
    first = hellos[0][0]
    for given, _, (node, *_) in hellos:
        if differing := next((name for name in first if given.get(name) != first[name]), None):
            raise SettingsError(
                "the nodes were given different settings:"
                f" {differing}={given.get(differing)} on {node}, {first[differing]} on another node"
            )
    # --- the first worker claims the directory and makes what is in it
    claims: list[Claim] = []
    mirror = mirror_of(folder)
    if mirror:
        mirror.reopen()  # the world before may have written to the store

    def take() -> tuple[Run, Ledger]:
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder)
        processes = [of_agent for _, of_agent, _ in hellos]
        claim = StoreClaim(mirror, new_id(), processes) if mirror else Claim(folder, new_id(), processes)
        run_id, note = _recognise(ledger, folder, claim.mine)
        continues = claim.take(run_id)
        claims.append(claim)
        if mirror:
            mirror.begin_writing(claim.life)
        return dataclasses.replace(_run(ledger, run_id, claim.life, continues), note=note), ledger

    def first_makes() -> tuple[Run, T]:
        try:
            made = make(take)
            if mirror:
                mirror.put(TOKENIZER, CONFIG)
            return made
        except Unreachable:
            raise
        except OSError as error:
            told = f"cannot write run directory {shown(folder)} ({error.strerror})"
            if error.errno in FULL:
                raise OSError(f"{told}: make room") from error
            raise SettingsError(f"{told}: choose another --run-dir") from error

    try:
        run, told = world.first_does(first_makes)
        offers = _all_see(folder, run, world, me.offer(run))
    except ValueError:  # a user's mistake: the job ends
        for claim in claims:
            claim.release()
        raise
    return Opened(run, next(iter(claims), None), told, [member for _, _, member in hellos], offers)


def _all_see(folder: Path, run: Run, world: World, offer: Any) -> list[Any]:
    """Wait until all ranks see in the run directory what the first one wrote. Returns what each offers."""
    mirror = mirror_of(folder)
    for _ in range(LOOKS):  # all ranks look equally often, since each look is a collective
        if mirror and not world.first:
            mirror.pull(LEDGER)
        seen = any(event.get("run_id") == run.run_id for event in Ledger(folder).events())
        alone, offers = zip(*world.gather((None if seen else world.node, offer)), strict=True)
        if not any(alone):
            return list(offers)
        time.sleep(LOOK_SECONDS)
    blind = next(filter(None, alone))
    raise SettingsError(
        f"run directory {shown(folder)} is not shared: node {blind} does not see in it what another node wrote there:"
        " mount the same volume on all nodes"
    )


def _recognise(ledger: Ledger, folder: Path, continues: bool) -> tuple[str, str]:
    """The id of the run in `folder`, and a line for a person. A copy of the folder gets a new id; the line says so."""
    known, here = ledger.identities(), directory(folder)
    if not known or continues:  # nobody copies within a job, and nodes may see the same folder with different numbers
        return ledger.run_id(), ""
    before = known[-1].get("directory")  # version 0.1.0 did not write it
    if before and same_directory(here, before):
        return str(known[-1]["run_id"]), ""
    run_id = new_id()
    event: Event = "copied" if before else "upgraded"
    ledger.write_durably(event, run_id=run_id, copied_from=known[-1]["run_id"], directory=here)
    of = known[-1]["run_id"]
    told = f"{shown(folder)} is a copy of run {of}, or a backup: it is run {run_id} now, with its own files alone"
    return run_id, told if before else ""


def _run(ledger: Ledger, run_id: str, name: str, continues: bool) -> Run:
    """Reads from the ledger what the workers have to know about the run."""
    saved: list[tuple[int, str]] = []
    left: set[str] = set()
    lives: dict[str, int] = {}
    before: dict[str, Any] = {}
    for event in ledger.events():
        if event["event"] == "saved":
            saved.append((event["step"], event["place"]))
        elif event["event"] == "joined":
            lives[event.get("name", "")] = event["life"]
        elif event["event"] == "copied":
            if event["directory"]["path"] != before["path"]:  # if not, a backup was put back in its place
                left |= {place for _, place in saved}
            before = event["directory"]
        else:
            before = event.get("directory", before)
    metrics, own = ledger.path.with_name(METRICS), checkpoints_place(ledger.path.parent, None)
    return Run(
        run_id,
        ledger.lives(),
        ledger.branches(),
        saved[-1] if saved else None,
        name=name,
        lives={name: life for name, life in lives.items() if name},
        history_bytes=metrics.stat().st_size if metrics.exists() else 0,
        ancestors=tuple(event["run_id"] for event in ledger.identities() if event["run_id"] != run_id),
        own=own,
        left=frozenset(left - {own}),
        continues=continues,
    )


def settings_before(path: Path) -> dict[str, Any]:
    """The settings of the life before, by dotted name; {} for a new run."""
    try:
        return settings.flatten(yaml.load(path.read_text(encoding="utf-8"), YAML_LOADER))
    except (FileNotFoundError, NotADirectoryError):  # writing there will report the second
        return {}
    except OSError as error:
        raise SettingsError(f"cannot read {path} ({error.strerror}): choose another --run-dir") from error
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"{path} is damaged: restore it, or remove it if the settings given now are the run's"
        ) from error
