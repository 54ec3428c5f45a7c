"""words.py: times, numbers and messages as a person reads them."""

from datetime import UTC, datetime

from elastic_gpt.jobs.words import age, count, line


def test_ages_are_short() -> None:
    now = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    ages = [age(since, now) for since in ("2026-11-21T11:59:30Z", "2026-11-21T11:00:00Z", "2026-11-11T12:00:00Z", "")]
    assert ages == ["30s", "1h", "10d", ""]


def test_numbers_and_messages_are_words_of_one_line() -> None:
    assert [count(number, "node") for number in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]
    assert line("0/3 nodes\n  are\tavailable ") == "0/3 nodes are available"
