"""testing.py: a script that is not elastic is told from one that is."""

from pathlib import Path

import pytest

from elastic_gpt.testing import assert_elastic
from tests.elastic.test_run import OWN, linux


@linux
@pytest.mark.slow
def test_a_script_that_counts_its_own_steps_is_not_elastic(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    counts = "    run.mine = getattr(run, 'mine', 0) + 1\n    step.update(1e-2 / run.mine)"  # which a restart sets back
    script.write_text(OWN.read_text().replace("    step.update()", counts))
    with pytest.raises(AssertionError, match="one killed after each step: step"):
        assert_elastic(script, lambda run: [run, "60"], tmp_path, sizes=(1,))
