"""plan.py: escapes in a separator are understood, and only unfinished work of the same settings is used."""

from pathlib import Path
from typing import Any

import pytest

from prepare import plan


@pytest.mark.parametrize(
    ("typed", "separator"), [(r"\n\n", b"\n\n"), ("<|endoftext|>", b"<|endoftext|>"), (r"\\n", rb"\n")]
)
def test_typed_escapes_in_a_separator_are_understood(typed: str, separator: bytes) -> None:
    assert plan._unescaped(typed) == separator


def made_for(*names: str, **settings: Any) -> dict[str, Any]:
    """The part of a stored plan that says which work it belongs to."""
    inputs = [[name, 9, "state", "text", "", 0] for name in names]
    return {"settings": plan._identity(plan.Settings(**settings)), "inputs": inputs}


def test_unfinished_work_is_for_the_same_settings_and_inputs() -> None:
    before = made_for("a.txt", "b.txt")
    assert plan._difference(before, made_for("a.txt", "b.txt")) == ""
    assert "(seed was 0, now it is 7)" in plan._difference(before, made_for("a.txt", "b.txt", seed=7))
    assert "(b.txt changed)" in plan._difference(before, made_for("a.txt"))
    assert "(their order changed)" in plan._difference(before, made_for("b.txt", "a.txt"))


def test_work_without_a_bad_byte_is_good_whatever_is_done_with_bad_bytes() -> None:
    assert plan._difference(made_for("a.txt"), made_for("a.txt", errors="skip")) == ""
    assert "errors was 'skip'" in plan._difference(made_for("a.txt", errors="skip"), made_for("a.txt"))


def test_a_file_of_ranks_is_known_by_what_it_holds(tmp_path: Path) -> None:
    for name, ranks in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(ranks)
    before = made_for("t.txt", tokenizer_file=str(tmp_path / "a"))
    assert plan._difference(before, made_for("t.txt", tokenizer_file=str(tmp_path / "b"))) == ""
    assert "tokenizer_file" in plan._difference(before, made_for("t.txt", tokenizer_file=str(tmp_path / "c")))
