"""progress.py: how far training is; only the lines for programs count."""

import math

import pytest

from elastic_gpt.contract import Progress
from elastic_gpt.jobs.progress import newest, words


def test_the_newest_word_wins_though_an_older_world_was_further() -> None:
    further, later = Progress(5.0, 90, 100, workers=3), Progress(9.0, 80, 100, workers=2)
    assert newest(["", f"2026-11-21T10:00:09Z {later.to_line()}", f"T {further.to_line()}", "step 99/100"]) == later
    assert newest([]) is None


def test_what_people_read_is_not_read() -> None:
    console = "T step 90/100 · loss 1.0000 · 5 tokens/s · lr 1.00e-03 · norm 1.000 · 3 workers · 0:01 left"
    assert newest([console, "T batch: 8 sequences, 2 on each of 3 workers"]) is None


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        (Progress(1.0, 10, 1000, 2.5, 1234.4, 3, 3723.9),
         "step 10/1,000 · loss 2.5000 · 1,234 tokens/s · 3 workers · 1:02:03 left"),
        (Progress(1.0, 1000, 1000, 2.5, 10.0, 1, 0.0), "step 1,000/1,000 · loss 2.5000 · 10 tokens/s · 1 worker"),
        (Progress(1.0, 1, 2, math.nan, 5.0, 2, 1.0), "step 1/2 · loss nan · 5 tokens/s · 2 workers · 0:01 left"),
        (Progress(1.0, 0, 2, workers=2), "step 0/2 · 2 workers"),
        (Progress(step=7), "step 7/0"),
        (Progress(1.0, 1, 2, 1.0, math.inf, 2, math.nan), "step 1/2 · loss 1.0000 · inf tokens/s · 2 workers"),
    ],
)  # fmt: skip
def test_progress_in_words_leaves_out_what_is_not_known(progress: Progress, said: str) -> None:
    assert words(progress) == said
