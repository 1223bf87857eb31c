"""Runs a sweep: `python -m launch.sweep SWEEP.yaml`, on this machine or on any of TorchX's schedulers. See docs/sweeps.md."""

import os
import sys
from typing import Any, List, Optional

from fuxi_torchrec.cli.streams import run_on_streams
from fuxi_torchrec.errors import UserError
from launch.sweep.options import default_folder, parse, place_of
from launch.sweep.plan import read_plan
from launch.sweep.runner import Ended, run_plan


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the command line. Exit codes: 0 every run finished, 1 some failed, 2 a mistake (one line), 130 or 143
    stopped."""
    options = parse(arguments)
    try:
        return _main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(options: Any) -> int:
    place = place_of(options)
    plan = read_plan(options.sweep)
    if options.dryrun:
        print("\n".join(f"{run.name}\t{' '.join(run.overrides)}" for run in plan.runs))
        return 0
    folder = options.output or default_folder(options.sweep)
    ended = run_plan(plan, folder, place, options.scheduler, options.cfg, options.concurrency, options.retry_failed)
    return ended.code if ended.code > 1 else _report(ended, folder)


def _report(ended: Ended, folder: str) -> int:
    failed = [(name, job) for name, job in ended.jobs.items() if job.status == "failed"]
    for name, job in failed:
        print(f"failed: {name}: {job.reason}", file=sys.stderr)
    finished = f"{len(ended.jobs) - len(failed)} of {len(ended.jobs)} runs finished"
    print(f"{finished}; results: {os.path.abspath(folder)}/results.csv, .parquet")
    if failed:
        print("take the failed ones up again by --retry-failed", file=sys.stderr)
    return ended.code


if __name__ == "__main__":
    sys.exit(run_on_streams(main))
