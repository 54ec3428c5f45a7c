"""docs/ELSEWHERE.md: each test that it calls as a witness is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITNESS = re.compile(r"(test_\w+\.py)::(test_\w+)")


def test_each_test_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "ELSEWHERE.md").read_text()
    named = set(WITNESS.findall(page))
    there = {
        (path.name, name)
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 30
    assert named - there == set()
    files = set(re.findall(r"test_\w+\.py", page))
    assert files - {path.name for path in ROOT.glob("tests/**/test_*.py")} == set()
