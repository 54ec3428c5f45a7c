"""Memory in huge pages for what trains: glibc's malloc can ask the kernel for them, but only if it is told before a start.

A step takes and gives back large tensors, and in pages of 4 kB the kernel has to clear and map each of thousands anew. In
pages of 2 MB a step on a CPU takes 0.8 to 0.9 of its time (docs/BENCHMARKS.md). The numbers are the same.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SETTING = "glibc.malloc.hugetlb"  # 1: malloc's memory is marked for transparent huge pages
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages(environment: Mapping[str, str], enabled: Path = ENABLED) -> dict[str, str]:
    """`environment` for a process whose memory shall come in huge pages.

    It is unchanged where the kernel gives such pages to all or to nobody, and where it already says something of them:
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` is how a user has none.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    try:
        on_demand = "[madvise]" in enabled.read_text()
    except OSError:  # another system, or a kernel without
        on_demand = False
    if not on_demand or SETTING in tunables:
        return dict(environment)
    return dict(environment) | {"GLIBC_TUNABLES": f"{tunables}:{SETTING}=1".lstrip(":")}


def start_over_with_huge_pages() -> None:
    """Start this very command over, in the same process, with memory in huge pages; return where there is no need.

    Another program that calls a command's `main` is left alone: starting that over would be a surprise.
    """
    mine = sys.argv[1:]
    is_this_command = sys.orig_argv[len(sys.orig_argv) - len(mine) :] == mine
    environment = with_huge_pages(os.environ)
    if is_this_command and environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
