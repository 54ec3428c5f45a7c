"""mirror.py: what was written to a run directory on an object store survives a kill, over memory:// and real S3."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from elastic_gpt import mirror
from elastic_gpt.contract import CONFIG, LEDGER, METRICS, TOKENIZER
from elastic_gpt.identity import directory, same_directory
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.mirror import Follower, Mirror
from elastic_gpt.observers import MetricsObserver
from tests.conftest import environment
from tests.elastic.test_checkpoint import Killed
from tests.elastic.test_observers import report


def opened(url: str, life: str = "") -> Mirror:
    """A mirror as another process opens it; with `life`, as its writer."""
    found = Mirror(url)
    found.reopen()
    if life:
        found.begin_writing(life)
    return found


def said(url: str) -> list[str]:
    return [event["cause"] for event in Ledger(opened(url).folder).events()]


def steps(url: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(opened(url).folder)]


@contextlib.contextmanager
def killed_at(store: Any, call: int, when: str) -> Iterator[list[str]]:
    """Kills the process before or after the n-th call that changes the store."""
    calls: list[str] = []

    def deadly(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **more: Any) -> Any:
            calls.append(name)
            if len(calls) >= call and when == "before":
                raise Killed
            result = real(*args, **more)
            if len(calls) >= call:
                raise Killed
            return result

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "rm_file"):
            patch.setattr(store, name, deadly(name, getattr(store, name)))
        with contextlib.suppress(Killed):
            yield calls


def test_what_was_written_is_there_for_the_next_process(url: str) -> None:
    first = opened(url, "first")
    (first.folder / TOKENIZER / "tokenizer").mkdir(parents=True)
    (first.folder / TOKENIZER / "tokenizer" / "ranks").write_bytes(b"\0\1")
    (first.folder / TOKENIZER / "meta.json").write_text("{}")
    (first.folder / CONFIG).write_text("steps: 3\n")
    first.put(TOKENIZER, CONFIG)
    for number in range(12):
        Ledger(first.folder).write_durably("interrupted", node="n", cause=str(number))
    second = opened(url)
    assert said(url) == [str(number) for number in range(12)]
    assert (second.folder / TOKENIZER / "tokenizer" / "ranks").read_bytes() == b"\0\1"
    assert (second.folder / CONFIG).read_text() == "steps: 3\n"
    assert len(second.parts[LEDGER]) > 3


def test_a_folder_that_is_just_being_made_does_not_count_yet(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = opened(url)
    monkeypatch.setattr(mirror.files, "find", lambda path: [path])  # as s3fs does when objects come while it looks
    mirror.pull(TOKENIZER)
    assert not (mirror.folder / TOKENIZER).exists()


def test_a_tokenizer_that_a_kill_cut_short_does_not_count(url: str) -> None:
    first = opened(url, "first")
    (first.folder / TOKENIZER / "tokenizer").mkdir(parents=True)
    (first.folder / TOKENIZER / "tokenizer" / "ranks").write_bytes(b"\0\1")
    (first.folder / TOKENIZER / "meta.json").write_text("{}")
    with killed_at(first.files, 2, "before"):
        first.put(TOKENIZER)
    assert not (opened(url).folder / TOKENIZER).exists()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 5, 8, 9])
def test_an_event_that_was_written_survives_a_kill_at_any_call(url: str, call: int, when: str) -> None:
    first, written = opened(url, "first"), []
    with killed_at(first.files, call, when):
        for number in range(8):
            Ledger(first.folder).write_durably("interrupted", node="n", cause=str(number))
            written.append(str(number))
    found = said(url)
    assert found in (
        written,
        [*written, str(len(written))],
    )  # the last one may be there though the kill came before the answer
    second = opened(url, "second")
    Ledger(second.folder).write_durably("interrupted", node="n", cause="later")
    assert said(url) == [*found, "later"]


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_what_other_workers_saw_is_in_the_next_lifes_ledger_once(url: str, call: int) -> None:
    first, other = opened(url, "first"), opened(url)
    Ledger(first.folder).write_durably("interrupted", node="n", cause="first")
    for cause in ("one", "two"):
        Ledger(other.folder).write_durably("interrupted", node="m", cause=cause)
    assert said(url) == ["first", "one", "two"]
    second = opened(url)
    with killed_at(second.files, call, "before"):
        second.begin_writing("second")
    third = opened(url, "third")
    Ledger(third.folder).write_durably("interrupted", node="n", cause="later")
    assert said(url) == ["first", "one", "two", "later"]
    assert opened(url)._list(f"{LEDGER}/notes") == []


def test_who_reads_while_others_write_sees_a_whole_ledger(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = opened(url, "first"), opened(url)
    Ledger(first.folder).write_durably("interrupted", node="n", cause="first")
    Ledger(other.folder).write_durably("interrupted", node="m", cause="noted")
    reader = Mirror(url)
    real = reader._read

    def read(paths: list[str]) -> dict[str, bytes]:
        if any("/notes/" in path for path in paths):  # and in this moment the next life begins
            opened(url, "second")
        return real(paths)

    monkeypatch.setattr(reader, "_read", read)
    reader.pull(LEDGER)
    assert [event["cause"] for event in Ledger(reader.folder).events()] == ["first", "noted"]


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 99])
def test_steps_that_are_done_again_replace_their_old_lines_whenever_a_kill_comes(url: str, call: int) -> None:
    first = opened(url, "first")
    metrics = MetricsObserver(first.folder / METRICS, 0, [], lag=2)
    for step in range(1, 13):
        metrics.on_step(report(step))
    metrics.close()
    assert len(opened(url).parts[METRICS]) > 3
    second = opened(url, "second")
    with killed_at(second.files, call, "before"):
        again = MetricsObserver(second.folder / METRICS, 5, [])
        again.follower.lag = 99  # type: ignore[union-attr]  # a thread that was killed tells nobody
        for step in range(6, 12):
            again.on_step(report(step, loss=2.0))
        again.follower.mirror.push_lines(METRICS, again.end)  # type: ignore[union-attr]
    third = opened(url, "third")
    MetricsObserver(third.folder / METRICS, 8, [asdict(report(step, loss=2.0)) for step in (6, 7, 8)], lag=1).close()
    found = steps(url)
    assert [step for step, _ in found] == list(range(1, 9))
    assert [loss for _, loss in found[:5]] == [1.0] * 5


def test_metrics_are_never_further_behind_than_what_a_snapshot_carries(url: str) -> None:
    first = opened(url, "first")
    path, behind = first.folder / METRICS, []
    metrics = MetricsObserver(path, 0, [], lag=3)
    real = first.push_lines

    def push(name: str, end: int | None = None) -> None:
        real(name, end)
        behind.append(path.read_bytes().count(b"\n") - path.read_bytes()[:end].count(b"\n"))

    first.push_lines = push  # type: ignore[method-assign]
    for step in range(1, 40):
        metrics.on_step(report(step))
        assert metrics.follower
        assert metrics.follower.written - metrics.follower.sent <= 3
    metrics.close()
    assert max(behind) <= 4  # and the one that waits
    assert [step for step, _ in steps(url)] == list(range(1, 40))


def test_a_store_that_is_away_holds_up_nobody_and_gets_all_lines_when_it_is_back(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(url, "first")
    metrics = MetricsObserver(first.folder / METRICS, 0, [], lag=1)

    def down(*_: object, **__: object) -> None:
        raise RuntimeError("SlowDown")

    with monkeypatch.context() as patch:
        patch.setattr(first.files, "pipe_file", down)
        for step in range(1, 30):
            metrics.on_step(report(step))
    metrics.on_step(report(30))
    metrics.close()
    assert [step for step, _ in steps(url)] == list(range(1, 31))
    assert capsys.readouterr().err.count("SlowDown") == 1


def test_lines_that_a_store_never_took_are_told(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(url, "first")
    follower = Follower(first, METRICS, 5)
    (first.folder / METRICS).write_text("{}\n")

    def down(*_: object, **__: object) -> None:
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(first.files, "pipe_file", down)
    follower.grown(3)
    follower.close()
    assert f"{METRICS} lacks 1 lines" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_not_an_empty_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(opened(url, "first").folder).write_durably("interrupted", node="n", cause="x")
    second = Mirror(url)

    def down(*_: object, **__: object) -> None:
        raise RuntimeError("the network is down")

    for name in ("ls", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(second.files, name, down)
            with pytest.raises(OSError, match="the network is down"):
                second.reopen()


def test_a_url_is_one_directory_wherever_it_is_mirrored_and_another_url_is_a_copy(url: str) -> None:
    here, there, other = (directory(Mirror(one).folder) for one in (url, url, f"{url}-copy"))
    assert same_directory(here, there)
    assert not same_directory(here, other)


# --- the folder


def test_a_mirror_goes_with_its_process_and_a_killed_ones_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from pathlib import Path; from elastic_gpt.mirror import here\n"
        "print(here(Path('memory://run')), flush=True); sys.stdin.read()"
    )
    folders = []
    for kill in (False, True):
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert child.stdout
        folders.append(Path(child.stdout.readline().strip()))
        assert folders[-1].is_dir()
        if kill:
            child.kill()
        child.communicate()
    assert [folder.exists() for folder in folders] == [False, True]
    monkeypatch.setattr(mirror, "LEFT_OVER_SECONDS", -1.0)
    living = Mirror("memory://other")
    Mirror("memory://third")
    assert not folders[1].exists()
    assert living.folder.exists()
    assert living.folder.stat().st_mode & 0o077 == 0
    assert living.folder.parent == Path(tempfile.gettempdir())
    assert living.folder.stat().st_uid == os.getuid()


def test_two_threads_of_a_worker_write_one_ledger(url: str) -> None:
    first = opened(url, "first")
    ledger = Ledger(first.folder)

    def write(cause: str) -> None:
        for _ in range(5):
            ledger.write_durably("interrupted", node="n", cause=cause)

    threads = [threading.Thread(target=write, args=(cause,)) for cause in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said(url)) == ["a"] * 5 + ["b"] * 5
