"""Huge pages for training on CPUs: glibc's malloc uses them if an environment variable says so when a process starts.

Each step allocates and frees large tensors, and the kernel has to clear and map thousands of pages
of 4 kB for them. With pages of 2 MB a step takes 0.8 to 0.9 of that time (docs/BENCHMARKS.md). The
results are the same.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SETTING = "glibc.malloc.hugetlb"  # 1: malloc asks for transparent huge pages
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages(environment: Mapping[str, str], enabled: Path = ENABLED) -> dict[str, str]:
    """`environment` with the variable that makes malloc use huge pages.

    It is unchanged if the kernel gives huge pages to all processes or to none, or if the user has
    set the variable already: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` turns them off.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    try:
        on_demand = "[madvise]" in enabled.read_text()
    except OSError:  # not Linux, or a kernel without huge pages
        on_demand = False
    if not on_demand or SETTING in tunables:
        return dict(environment)
    return dict(environment) | {"GLIBC_TUNABLES": f"{tunables}:{SETTING}=1".lstrip(":")}


def start_over_with_huge_pages() -> None:
    """Execute this command again in the same process, with huge pages. Returns if that is not necessary.

    Does nothing in another program that calls a command's `main`: executing that again would be a
    surprise.
    """
    mine = sys.argv[1:]
    is_this_command = sys.orig_argv[len(sys.orig_argv) - len(mine) :] == mine
    environment = with_huge_pages(os.environ)
    if is_this_command and environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
