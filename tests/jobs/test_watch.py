"""watch.py: what is printed about a job can be searched."""

import pytest
from rich.table import Table

from elastic_gpt.jobs import watch


def test_a_line_stays_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("pod", "why", box=None)
    table.add_row("a-pod-with-a-name-as-long-as-they-are-dlrover-master-0", "Back-off pulling image " + "x" * 200)
    watch._console().print(table)
    assert "Back-off pulling image " + "x" * 200 in capsys.readouterr().out
