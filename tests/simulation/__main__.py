"""Many schedules, or one with all that happens in it.

python -m tests.simulation --schedules 100000     # prints the seed of each that breaks a property, and ends with 1
python -m tests.simulation --seed 4711            # that one, a line an event
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time

from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.simulation.job import Violation
from tests.simulation.schedules import run

BATCH = 50  # schedules between two words of a process


def live(seeds: range) -> tuple[int, int, float, int, list[tuple[int, str]]]:
    """Schedules, committed steps, virtual seconds, worlds that the ledger ended, and what was broken by which seed."""
    commits, seconds, superseded, broken = 0, 0.0, 0, []
    for seed in seeds:
        try:
            job = run(seed)
        except Violation as violation:
            broken.append((seed, str(violation)))
            continue
        commits, seconds, superseded = commits + job.commits, seconds + job.clock.now, superseded + job.superseded
    return len(seeds), commits, seconds, superseded, broken


def replay(seed: int) -> int:
    try:
        job, end, code = run(seed, trace=True), "all properties hold", 0
    except Violation as violation:
        job, end, code = violation.job, f"broken: {violation}", 1  # type: ignore[attr-defined]
    print(
        f"{job.wanted} nodes are wanted at the end, a world has {job.least} to {job.most}, agents look every {job.poll} s"
    )
    print(*(job.trace or []), f"{job.clock.now:9.3f} s  {end}", sep="\n")
    return code


def many(schedules: int, first: int, processes: int) -> int:
    batches = [range(one, min(one + BATCH, first + schedules)) for one in range(first, first + schedules, BATCH)]
    found: list[tuple[int, str]] = []
    totals = [0.0, 0.0, 0.0]
    began = time.monotonic()
    columns = SpinnerColumn(), *Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn()
    with multiprocessing.Pool(processes) as pool, Progress(*columns) as progress:
        bar = progress.add_task("schedules", total=schedules)
        for count, commits, seconds, superseded, broken in pool.imap_unordered(live, batches):
            totals = [a + b for a, b in zip(totals, (commits, seconds, superseded), strict=True)]
            for seed, why in broken:
                progress.print(f"seed {seed}: {why}", soft_wrap=True, markup=False)
            found += broken
            progress.advance(bar, count)
    took = time.monotonic() - began
    print(
        f"{schedules:,} schedules in {took:,.0f} s ({schedules / took:,.0f} a second): {totals[1] / 3600:,.0f} h of virtual"
        f" time, {totals[0]:,.0f} steps committed, {totals[2]:,.0f} worlds ended by the ledger, {len(found):,} schedules"
        " broke a property"
    )
    for seed, _ in itertools.islice(sorted(found), 1):
        print(f"its trace: python -m tests.simulation --seed {seed}")
    return int(bool(found))


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=1000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="S", help="the first one's seed (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="S", help="live through this one alone, and tell what happens")
    args = parser.parse_args()
    return many(args.schedules, args.first, args.processes) if args.seed is None else replay(args.seed)


if __name__ == "__main__":
    sys.exit(main())
