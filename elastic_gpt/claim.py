"""One job at a time trains into a run directory: RUN/claim.json says which one.

The first worker of each world writes the claim for its job and renews it every few seconds. All
lives of a job have the same token, so the claim survives membership changes. A second job is
refused at its start. The claim of a dead job expires: at once if its processes were on this
machine, else when it has not been renewed for a while. Clocks are not compared.
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
SETTLE_SECONDS = 0.5  # far longer than the time between two renames


class InUse(ValueError):
    """Another job trains into the run directory. The message names it, and says how to take over."""


@functools.cache
def job() -> str:
    """The token that all workers of a job have, in all its lives."""
    if uid := os.environ.get("JOB_UID"):  # the uid of the ElasticJob
        return uid
    if master := os.environ.get("DLROVER_MASTER_ADDR"):
        return _place(master)
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        # Without --standalone or --rdzv-id, torchrun calls every job "none".
        return run if run != "none" else _place(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    return secrets.token_hex(8)


def _place(address: str) -> str:
    """An address that means one place everywhere: others' loopback is another."""
    return f"{address}/{network()}" if address.startswith(("127.", "localhost:", "::1:", "[::1]:")) else address


def process() -> dict[str, Any]:
    """Describes the process that keeps this node in the job: its agent, or the worker itself if it has none."""
    agent = os.environ.get("ELASTIC_GPT_AGENT")
    pid = int(agent) if agent else os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return {"machine": machine(), "host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def refuse_if_in_use(run: Path, mine: str) -> None:
    """Raise InUse if another job than `mine` trains into `run` and has a living process on this machine."""
    with contextlib.suppress(OSError):  # there is no run, or it cannot be read, which is reported later
        claim = read_claim(run / CLAIM)
        # If the directory is a copy, the claim in it means nothing.
        if claim and claim["job"] != mine and same_directory(directory(run), claim["directory"]) and lives_here(claim):
            raise InUse(_told(run, claim))


class Claim:
    """The claim of this job to a run directory.

    Args:
        run: the run directory.
        life: name of this life.
        processes: the result of `process` on each worker.
    """

    def __init__(self, run: Path, life: str, processes: list[dict[str, Any]]) -> None:
        self.path, self.life = run / CLAIM, life
        told = [dict(one) for one in dict.fromkeys(tuple(one.items()) for one in processes)]
        self.content: dict[str, Any] = {"job": job(), "life": life, "since": time.time(), "processes": told}
        self.ended = threading.Event()

    @property
    def mine(self) -> bool:
        """Whether this job has the claim already."""
        claim = self._look()
        return claim is not None and claim["job"] == self.content["job"]

    def take(self, run_id: str) -> bool:
        """Take the claim and renew it until `release` or the end of this process. Returns whether this job had it before.

        Args:
            run_id: id of the run; a claim in a copied directory has another one.

        Raises:
            InUse: if another job has it. That takes a while to find out if it runs on another machine.
            OSError: if the run directory cannot be written.
        """
        self.content |= {"run_id": run_id, "directory": directory(self.path.parent)}
        while True:
            claim = read_claim(self.path)
            mine = self._judge(claim)
            with contextlib.suppress(FileNotFoundError):
                # If two jobs find a dead claim, one of them renames it, and the other then finds a living one.
                aside = self.path.with_name(f"{CLAIM}.{self.life}")
                self.path.rename(aside)
                found = read_claim(aside)
                if found and (claim is None or found["life"] != claim["life"]):  # another job took it in between
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
            time.sleep(SETTLE_SECONDS)  # another job may be about to put its claim back
            settled = read_claim(self.path)
            if settled and settled["life"] == self.life:
                break
        threading.Thread(target=self._renew, name="claim", daemon=True).start()
        return mine

    def _judge(self, claim: dict[str, Any] | None) -> bool:
        """Whether the claim is this job's already. Waits for the claim of another job to expire. Raises InUse."""
        if claim is None:
            return False
        # Two jobs that make a directory at the same moment may each give it an id: it is the same run.
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
        """Give the claim back at the end of the job, so that the next one does not have to wait."""
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
            # Written in place: a network file system shows a changed file sooner than an exchanged one. What is written to is
            # what was looked at, whichever claim takes its name in between. If the volume is away: again in a moment.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError), self.path.open("r+") as file:
                if json.loads(file.read())["life"] != self.life:
                    return  # the next life of this job has taken it, or another job
                file.seek(0)
                file.write(self._text(count))

    def _text(self, count: int) -> str:
        return json.dumps(self.content | {"renewed": f"{count:012d}"}, allow_nan=False)  # its length never changes

    def _wait_for_end(self, claim: dict[str, Any]) -> None:
        """Wait until another job's claim expires. Raises InUse if it is renewed."""
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
    """Read a claim; None if there is none. One that is just being written is read again."""
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
    """When a process was started, on some clock of this machine; None if it does not exist."""
    import psutil

    try:
        living = psutil.Process(pid)
        if living.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        # If possible in ticks since the machine started, which setting the clock does not change.
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
