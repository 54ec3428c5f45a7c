"""Times, numbers and messages in words."""

from datetime import UTC, datetime


def age(since: str, now: datetime | None = None) -> str:
    """How long ago it was, in one unit: 12s, 5m, 3h, 2d. "" if not known."""
    if not since:
        return ""
    seconds = seconds_since(since, now)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds / length)}{unit}"
    return f"{max(0, int(seconds))}s"


def seconds_since(time: str, now: datetime | None = None) -> float:
    """Seconds since a time as the cluster writes it."""
    return ((now or datetime.now(UTC)) - datetime.fromisoformat(time)).total_seconds()


def count(number: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {what}{'s' * (number != 1)}"


def line(text: object) -> str:
    """`text` in one line, with single spaces."""
    return " ".join(str(text).split())
