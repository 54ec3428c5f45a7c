"""One job at a time trains into a run directory: RUN/claim.json says which, and for how long that is so.

The first worker of a world holds the claim for its job and renews it every few seconds. All lives of one job share a token, so
a membership change takes nothing from anybody. A second job is refused at its start. A dead job's claim expires by itself:
at once where its processes were on this machine, else when it was not renewed for a while; clocks are not compared.
"""

import contextlib
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from elastic_gpt.contract import CLAIM
from elastic_gpt.identity import directory, machine, network, same_directory
from elastic_gpt.mirror import shown

RENEW_SECONDS, EXPIRY_SECONDS, LOOK_SECONDS = 3.0, 30.0, 0.25
SETTLE_SECONDS = 0.5  # far more than lies between two renames


class InUse(ValueError):
    """Another job trains into the run directory. The message names it, and how to take over."""


@functools.cache
def job() -> str:
    """The token that all workers of a job share, in all its lives."""
    if uid := os.environ.get("JOB_UID"):  # of the ElasticJob
        return uid
    if master := os.environ.get("DLROVER_MASTER_ADDR"):
        return _place(master)
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        # torchrun without --standalone and --rdzv-id calls each job `none`.
        return run if run != "none" else _place(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    return secrets.token_hex(8)


def _place(address: str) -> str:
    """An address that means one place everywhere: others' loopback is another."""
    return f"{address}/{network()}" if address.startswith(("127.", "localhost:", "::1:", "[::1]:")) else address


def process() -> dict[str, Any]:
    """What keeps this worker's node in the job: its agent, or the worker itself where nobody would restart it."""
    agent = os.environ.get("ELASTIC_GPT_AGENT")
    pid = int(agent) if agent else os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return {"machine": machine(), "host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def refuse_if_in_use(run: Path, mine: str) -> None:
    """Raise InUse if processes of another job than `mine` that train into `run` live on this machine."""
    with contextlib.suppress(OSError):  # no run there, or nobody may look, which is told when the run is opened
        claim = read_claim(run / CLAIM)
        # A claim may have come with a copy, and a copy is free.
        if claim and claim["job"] != mine and same_directory(directory(run), claim["directory"]) and lives_here(claim):
            raise InUse(_told(run, claim))


class Claim:
    """The claim of this job to a run directory.

    Args:
        run: the run directory.
        life: name of this life.
        processes: `process` of each worker.
    """

    def __init__(self, run: Path, life: str, processes: list[dict[str, Any]]) -> None:
        self.path, self.life = run / CLAIM, life
        told = [dict(one) for one in dict.fromkeys(tuple(one.items()) for one in processes)]
        self.content: dict[str, Any] = {"job": job(), "life": life, "since": time.time(), "processes": told}
        self.ended = threading.Event()

    @property
    def mine(self) -> bool:
        """Whether this job had the claim before."""
        claim = self._look()
        return claim is not None and claim["job"] == self.content["job"]

    def take(self, run_id: str) -> bool:
        """Have the claim, renewed until `release` or the end of this process. Returns whether this job had it before.

        Args:
            run_id: of the run; a claim that came with a copied directory is of another.

        Raises:
            InUse: if another job has it. It takes a while to know where that runs on another machine.
            OSError: if the run directory cannot be written.
        """
        self.content |= {"run_id": run_id, "directory": directory(self.path.parent)}
        while True:
            claim = read_claim(self.path)
            mine = self._judge(claim)
            with contextlib.suppress(FileNotFoundError):
                # Of two that find a dead claim, one renames it; the other then finds a living one.
                aside = self.path.with_name(f"{CLAIM}.{self.life}")
                self.path.rename(aside)
                found = read_claim(aside)
                if found and (claim is None or found["life"] != claim["life"]):  # the other was here in between
                    aside.rename(self.path)
                    continue
                aside.unlink()
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(self._text(0))
            if mine:
                break
            time.sleep(SETTLE_SECONDS)  # somebody may be about to put back what another had made meanwhile
            settled = read_claim(self.path)
            if settled and settled["life"] == self.life:
                break
        threading.Thread(target=self._renew, name="claim", daemon=True).start()
        return mine

    def _judge(self, claim: dict[str, Any] | None) -> bool:
        """Whether the claim that is there is this job's already. Another job's end is awaited. Raises InUse."""
        if claim is None:
            return False
        # Two jobs that begin a directory in one moment may each have given it an id: it is one run all the same.
        here = claim["run_id"] == self.content["run_id"] or same_directory(
            self.content["directory"], claim["directory"]
        )
        mine = bool(here and claim["job"] == self.content["job"])
        if mine:
            self.content["since"] = claim["since"]
        elif here:
            self._wait_for_end(claim)
        return mine

    def release(self) -> None:
        """The job is over: the next need not wait."""
        self.ended.set()
        claim = read_claim(self.path)
        if claim and claim["life"] == self.life:
            self.path.unlink(missing_ok=True)

    def _look(self) -> dict[str, Any] | None:
        return read_claim(self.path)

    def _renew(self) -> None:
        count = 0
        while not self.ended.wait(RENEW_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # a volume that is away: again in a moment
                claim = read_claim(self.path)
                if claim and claim["life"] != self.life:
                    return  # the next life of this job has it, or another job that took this one for dead
                if claim:
                    # In place, for a network file system shows others a changed file sooner than an exchanged one.
                    with self.path.open("r+") as file:
                        file.write(self._text(count))

    def _text(self, count: int) -> str:
        return json.dumps(self.content | {"renewed": f"{count:012d}"}, allow_nan=False)  # always as long

    def _wait_for_end(self, claim: dict[str, Any]) -> None:
        """Return when another job's claim is dead."""
        if lives_here(claim):
            raise InUse(_told(self.path.parent, claim))
        if all(one["machine"] == machine() for one in claim["processes"]):
            return
        print(
            f"{shown(self.path.parent)} was claimed {_who(claim)}: waiting {EXPIRY_SECONDS:.0f} s to see"
            " whether that job lives",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            now = self._look()
            if now is None:  # released
                return
            if now != claim:
                raise InUse(_told(self.path.parent, now))


def read_claim(path: Path) -> dict[str, Any] | None:
    """The claim; None if there is none. One that is being written is looked at again."""
    for _ in range(5):
        try:
            claim = json.loads(path.read_text())
            for name in ("run_id", "job", "life"):
                claim[name]
            for name in ("inode", "birth", "device", "machine"):
                claim["directory"][name]
            claim["processes"][0]
            for name in ("machine", "host", "pid", "started"):
                [one[name] for one in claim["processes"]]
            time.localtime(claim["since"])
            return claim
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, OverflowError):
            time.sleep(0.1)
    return None


def lives_here(claim: dict[str, Any]) -> bool:
    return any(
        one["machine"] == machine() and one["started"] is not None and _started(one["pid"]) == one["started"]
        for one in claim["processes"]
    )


def _started(pid: int) -> float | None:
    """When a process was started, on a clock of this machine's; None if it does not live."""
    import psutil

    try:
        living = psutil.Process(pid)
        if living.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        # In ticks since the machine started where that is to be had: no clock that is set can change it.
        return float(stat.read_text().rpartition(")")[2].split()[19]) if stat.exists() else living.create_time()
    except (psutil.Error, OSError):
        return None


def _who(claim: dict[str, Any]) -> str:
    one = claim["processes"][0]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(claim["since"]))
    return f"by process {one['pid']} on {one['host']}, since {since}"


def _told(run: Path, claim: dict[str, Any]) -> str:
    return (
        f"run directory {shown(run)} is in use ({_who(claim)}): train into another --run-dir, or end that job first;"
        " the same command then goes on from where it was"
    )
