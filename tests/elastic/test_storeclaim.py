"""storeclaim.py: on an object store, too, one job at a time trains into a run directory, and who lost it writes no more."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_gpt import claim, storeclaim
from elastic_gpt.claim import InUse, process
from elastic_gpt.contract import LEDGER
from elastic_gpt.ledger import Ledger
from elastic_gpt.mirror import Mirror
from elastic_gpt.storeclaim import StoreClaim
from tests.conftest import until
from tests.elastic.test_claim import dead, elsewhere
from tests.elastic.test_mirror import opened

CLAIMS: list[StoreClaim] = []  # of this test; each renews itself until it is ended


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storeclaim, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(storeclaim, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(claim, "LOOK_SECONDS", 0.02)
    yield
    while CLAIMS:
        CLAIMS.pop().ended.set()


def claimed(url: str, job: str, processes: list[dict[str, Any]] | None = None) -> tuple[StoreClaim, bool, Mirror]:
    found = opened(url)
    held = StoreClaim(found, f"life of {job} {uuid.uuid4().hex}", processes or [process()])
    CLAIMS.append(held)
    held.content["job"] = job
    before = held.take("run")
    found.begin_writing(held.life)
    return held, before, found


def test_a_second_job_is_refused_and_the_next_life_of_the_same_is_not(url: str) -> None:
    _, before, _ = claimed(url, "first")
    with pytest.raises(InUse, match=f"run directory {url} is in use"):
        claimed(url, "second")
    again, continues, _ = claimed(url, "first", elsewhere())
    assert (before, continues) == (False, True)
    again.release()
    assert again._look() is None  # so nobody waits until it expires
    assert claimed(url, "second")[1] is False


def test_the_claim_of_processes_that_died_here_expires_at_once(url: str) -> None:
    claimed(url, "first", [dead()])[0].ended.set()
    assert claimed(url, "second")[1] is False


def test_a_living_claim_of_another_machine_is_respected(url: str) -> None:
    claimed(url, "first", elsewhere())  # which renews it
    with pytest.raises(InUse):
        claimed(url, "second")


def test_a_world_that_lost_the_claim_ends_and_writes_no_more(url: str) -> None:
    held, _, first = claimed(url, "first")
    ledger = Ledger(first.folder)
    ledger.begin_life(["n"], 1, 0, "start", 0, held.life)
    assert not ledger.superseded()
    other, _, second = claimed(url, "first")
    Ledger(second.folder).begin_life(["m"], 1, 0, "start", 0, other.life)
    until(ledger.superseded)
    ledger.write("interrupted", node="n", cause="too late")
    first.push_lines(LEDGER)
    assert not first.writes
    assert [event["nodes"] for event in Ledger(opened(url).folder).events() if event["event"] == "joined"] == [
        ["n"],
        ["m"],
    ]
