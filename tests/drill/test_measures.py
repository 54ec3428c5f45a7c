"""The arithmetic of `drill --against`: what events cost, from made-up steps."""

from pathlib import Path

import pytest

from elastic_gpt.drill.measures import Account, Done, Struck, account, by_event, draw, kept, totals, unbalanced, usual


def steps(first: int, last: int, start: float, each: float = 0.1, world: int = 2, loss: float = 1.0) -> list[Done]:
    """Steps of two sequences, one after the other; the last one ends at start + their number * each."""
    return [
        Done(step, start + each * (step - first + 1), world, (2 * step - 2, 2 * step - 1), loss)
        for step in range(first, last + 1)
    ]


def test_of_what_was_done_again_only_the_last_time_counts() -> None:
    done = [*steps(1, 5, 0.0), *steps(4, 6, 1.0, loss=2.0)]
    assert [(one.step, one.loss) for one in kept(done)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert kept([]) == []


def test_a_step_that_stood_still_is_not_usual_and_each_world_has_its_own_pace() -> None:
    history = [*steps(1, 5, 0.0), *steps(6, 20, 9.0), *steps(21, 30, 20.0, each=0.3, world=1)]
    assert usual(history) == pytest.approx({2: 0.1, 1: 0.3})
    assert usual([*steps(1, 5, 0.0), *steps(6, 7, 9.0, world=1)])[1] == pytest.approx(0.1)  # not the pause before


@pytest.mark.parametrize(
    ("uses", "skipped", "repeated"),
    [
        ([0, 1, 2, 3], 0, 0),  # an epoch
        ([0, 1, 2, 3, 0], 0, 0),  # and a part of the next
        ([0, 1], 0, 0),  # a part of the first
        ([0, 1, 2, 2], 1, 1),
        ([0, 0, 1], 0, 1),  # more than once in a part of the first
        ([0, 1, 2, 3, 0, 1, 2, 0], 1, 1),  # after two epochs, one was used but once
        ([], 0, 0),
    ],
)
def test_each_sequence_is_to_be_used_once_an_epoch(uses: list[int], skipped: int, repeated: int) -> None:
    history = [Done(number + 1, float(number), 1, (one,), 0.0) for number, one in enumerate(uses)]
    assert unbalanced(history, 4) == (skipped, repeated)


def example(**changes: object) -> Account:
    """100 steps of 0.1 s; a kill at 5.05 costs steps 41 to 50 and 2 s; a join at 10 costs nothing."""
    done = [*steps(1, 50, 0.0), *steps(41, 100, 7.0)]
    struck = [Struck("kill", 5.05, settled=7.2), Struck("join", 10.0, settled=11.0)]
    told = {"sequences": 1000, "began": 0.0, "ended": 13.0} | changes
    return account(done, struck, steps(1, 100, 0.0), **told)  # type: ignore[arg-type]


def test_what_an_event_costs_is_the_time_in_which_no_kept_step_was_done() -> None:
    kill, join = example().costs
    assert (kill.kind, kill.again, kill.settled) == ("kill", 10, pytest.approx(2.15))
    assert kill.seconds == pytest.approx(7.1 - 4.0 - 0.1)  # from step 40, the last one kept, to the first after it
    assert (join.again, join.seconds) == (0, pytest.approx(0.0))


def test_goodput_is_the_usual_time_of_the_kept_steps_over_the_time_that_went_by() -> None:
    found = example()
    assert (found.steps, found.again) == (100, 10)
    assert found.goodput == pytest.approx(100 * 0.1 / 13.0)
    assert found.sequences_per_second == pytest.approx(200 / 13.0)
    assert example(began=5.0).goodput == pytest.approx(60 * 0.1 / 8.0)  # what was before does not count


def test_a_run_that_never_went_on_lost_all_the_rest() -> None:
    struck = [Struck("kill", 5.0, note="all nodes ended")]
    found = account(steps(1, 50, 0.0), struck, steps(1, 50, 0.0), sequences=1000, began=0.0, ended=65.0)
    assert found.costs[0].seconds == pytest.approx(60.0 - 0.1)
    assert found.costs[0].settled is None


def test_losses_are_compared_step_by_step_with_those_of_the_undisturbed_run() -> None:
    done = [*steps(1, 60, 0.0), *steps(61, 100, 6.0, loss=1.5)]
    found = account(done, [], steps(1, 100, 0.0), sequences=1000, began=0.0, ended=10.0)
    assert found.largest_difference == pytest.approx(0.5)
    assert found.last_difference == pytest.approx(0.4)  # 40 of the last 50


def test_tables_and_picture_say_what_was_started_by_hand_and_what_there_is_not(tmp_path: Path) -> None:
    done = steps(1, 50, 0.0)
    struck = [Struck("kill -9 of a node", 2.0, note="all nodes ended"), Struck("kill -9 of a node", 3.0, settled=3.5)]
    other = account(done, struck, done, sequences=40, began=0.0, ended=5.0)
    accounts = {"elastic-gpt": example(), "other": other}
    rows = list(zip(*(column.cells for column in by_event(accounts).columns), strict=True))
    assert [row[:2] for row in rows] == [("kill", "1"), ("join", "1"), ("kill -9 of a node", "2")]
    assert rows[0][2:] == ("3.0 s, 10", "there is none")
    assert "1 of 2 by hand: all nodes ended" in str(rows[2][3])
    assert ("steps kept", "100", "50") in zip(*(column.cells for column in totals(accounts).columns), strict=True)
    draw(accounts, {"elastic-gpt": (0.0, done), "other": (0.0, done)}, tmp_path / "against.png")
    assert (tmp_path / "against.png").stat().st_size > 10_000
