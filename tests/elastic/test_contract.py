"""contract.py: what processes tell each other is understood, also by another version."""

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_gpt.contract import PROGRESS, Progress, progress_file

numbers = st.none() | st.floats(allow_nan=False)


@given(
    time=st.floats(0, 1e11), step=st.integers(0, 10**12), steps=st.integers(0, 10**12), loss=numbers, speed=numbers,
    workers=st.integers(0, 10**6), left=numbers, before=st.text().filter(lambda text: PROGRESS not in text),
)  # fmt: skip
def test_progress_is_read_as_it_was_written_whatever_stands_before_it(
    time: float, step: int, steps: int, loss: float | None, speed: float | None, workers: int, left: float | None, before: str
) -> None:  # fmt: skip
    told = Progress(time, step, steps, loss, speed, workers, left)
    line = told.to_line()
    assert len(line.splitlines()) == 1
    json.loads(line.removeprefix(PROGRESS), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert Progress.from_line(before + line) == told


def test_a_loss_that_is_not_a_number_arrives_as_one() -> None:
    found = Progress.from_line(Progress(step=1, loss=math.nan).to_line())
    assert found
    assert found.loss is not None
    assert math.isnan(found.loss)


@pytest.mark.parametrize(
    ("told", "known"),
    [
        ({"step": 3}, Progress(step=3)),
        ({"step": 3, "workers": 2, "new in 0.2": [1]}, Progress(step=3, workers=2)),
        ({"step": 3, "loss": "very small", "steps": None, "workers": []}, Progress(step=3)),
        ({"step": 3, "seconds_left": 10**400}, Progress(step=3)),
        ({"step": 3, "slow": ["gpt-worker-1", 7, "\x1b[2J", "x" * 254]}, Progress(step=3, slow=("gpt-worker-1",))),
        ({"step": 3, "slow": "gpt-worker-1"}, Progress(step=3)),
    ],
)
def test_fields_of_another_version_do_no_harm(told: dict[str, object], known: Progress) -> None:
    assert asdict(Progress.from_line(PROGRESS + json.dumps(told)) or Progress()) == asdict(known)


@pytest.mark.parametrize(
    "text", ["", "step 1/2 · loss 1.0", PROGRESS, f"{PROGRESS}{{", f"{PROGRESS}[1]", f"{PROGRESS}{{}}", f"{PROGRESS}3",
             f'{PROGRESS}{{"step": "many"}}', f'{PROGRESS}{{"loss": 1.0}}'],
)  # fmt: skip
def test_other_lines_hold_no_progress(text: str) -> None:
    assert Progress.from_line(text) is None


def test_only_a_pod_of_a_job_tells_machines() -> None:
    pod = {"ELASTIC_JOB_NAME": "gpt", "POD_NAME": "gpt-edljob-worker-0"}
    assert str(progress_file(pod)).endswith("elastic-gpt-progress-gpt-edljob-worker-0")
    assert progress_file(pod | {"ELASTIC_GPT_LOCAL": "1:/tmp/x"}) is None
    assert progress_file({"POD_NAME": "notebook"}) is None
    assert progress_file({}) is None
