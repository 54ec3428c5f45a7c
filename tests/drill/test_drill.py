"""The drill: it holds the laws against real kills, and sees when one is broken."""

import json
from pathlib import Path

import pytest

from elastic_gpt.drill import drill
from elastic_gpt.drill.drill import charge
from elastic_gpt.drill.faults import LEAVE, Event, Stalled
from tests.conftest import elastic_gpt


@pytest.mark.slow
def test_a_short_drill_holds_every_law_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "drill").mkdir()
    done = elastic_gpt("drill", "--events=5", "--nodes=3", "--seed=11", "--output-dir", tmp_path / "drill")
    assert "BROKEN" not in done.stdout
    said = ("measuring: ", "learning ", "encoding: ")  # no messages of libraries
    assert [line for line in done.stderr.splitlines() if not line.startswith(said)] == []
    report = json.loads((tmp_path / "drill/report.json").read_text())
    assert [event["kind"] for event in report["events"]][5:] == [LEAVE]
    assert all(report["laws"].values())
    assert report["comparison"]["loss_difference"] == 0.0
    assert report["account"]["dropped"] == sum(event["dropped"] for event in report["events"])
    assert (tmp_path / "drill/drill.png").stat().st_size > 10_000


def test_a_drill_deletes_nothing_that_is_not_a_drills(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "thesis.txt"
    kept.parent.mkdir()
    kept.touch()
    done = elastic_gpt("drill", "--output-dir", tmp_path, code=2)
    assert "is not a drill's folder: name a new one" in done.stderr
    assert kept.exists()
    assert elastic_gpt("drill", "--output-dir", kept, code=2).stderr.count("\n") == 1


def test_a_restart_before_any_event_is_charged_to_none() -> None:
    happened = [Event("a node joins", 1, 50, time=10.0)]
    charge(
        happened, [{"event": "restored", "time": 9.0, "dropped": 3}, {"event": "restored", "time": 11.0, "dropped": 4}]
    )
    assert happened[0].dropped == 4  # so the sum differs from that of the ledger, which breaks the law


def test_a_broken_drill_leaves_no_good_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / drill.MARK).touch()
    report = tmp_path / "report.json"
    report.write_text('{"laws": {"all": true}}')

    def disturb(*_: object, **__: object) -> None:
        assert not report.exists()
        raise Stalled("no step")

    monkeypatch.setattr(drill, "disturb", disturb)
    assert drill.main(["--output-dir", str(tmp_path)]) == 1
    assert json.loads(report.read_text())["broken"] == "no step"


def test_a_command_that_fails_in_a_drill_has_said_why_and_ends_it_as_it_ended(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        drill.train("prepare", "nowhere.txt")
    assert stop.value.code == 2
    assert capfd.readouterr().err.count("\n") == 1
