"""huge_pages.py: training uses huge pages, the user's setting wins, and no command starts over twice."""

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_gpt.huge_pages import ENABLED, with_huge_pages


@pytest.mark.parametrize(
    ("kernel", "before", "after"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
    ],
)
def test_malloc_is_told_where_the_kernel_waits_for_it(
    kernel: str, before: str | None, after: str | None, tmp_path: Path
) -> None:
    enabled = tmp_path / "enabled"
    enabled.write_text(kernel)
    environment = {"A": "b"} | ({"GLIBC_TUNABLES": before} if before else {})
    assert with_huge_pages(environment, enabled).get("GLIBC_TUNABLES") == after
    assert with_huge_pages(environment, tmp_path / "none") == environment


@pytest.mark.parametrize("start", [["-m", "elastic_gpt.cli", "train"], ["model_zoo/nanogpt/train.py"]])
def test_training_starts_over_once_with_the_same_command(start: list[str]) -> None:
    if with_huge_pages({}) == {}:
        pytest.skip(f"{ENABLED} does not say madvise")
    # Python says on standard error which file it runs, at each start.
    command = [sys.executable, "-X", "importtime", *start, "debug_cpu", "--steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert "steps is 0" in done.stderr
    assert done.stderr.count("| encodings.utf_8\n") == 2


def test_another_program_that_calls_a_command_is_not_started_over() -> None:
    code = "import sys; sys.argv = ['x', 'train', 'debug_cpu', '--steps=0']\nfrom elastic_gpt.cli import main; sys.exit(main())"
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.count("| encodings.utf_8\n") == 1
