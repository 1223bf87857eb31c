"""Runs a sweep: `python -m launch.sweep SWEEP.yaml`, on this machine or on any of TorchX's schedulers. See docs/sweeps.md."""

import os
import sys
from dataclasses import fields
from typing import Any, List, Optional

from fuxi_torchrec.cli.streams import run_on_streams
from fuxi_torchrec.errors import UserError
from launch.place import Place
from launch.sweep.plan import read_plan
from launch.sweep.runner import Ended, run_plan


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the command line. Exit codes: 0 every run finished, 1 some failed, 2 a mistake (one line), 130 or 143
    stopped."""
    options = _parser().parse_args(arguments)
    try:
        return _main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> Any:
    from fuxi_torchrec.config.parsing import OneLineParser

    parser = OneLineParser(prog="python -m launch.sweep", description="Runs the sweep that SWEEP.yaml describes.")
    parser.add_argument("sweep", type=str, help="YAML file of the sweep: configs/sweeps/…")
    parser.add_argument("--output", type=Optional[str], help="The sweep's folder; default runs/<the file's name>.")
    parser.add_argument("--scheduler", type=str, default="local_cwd", help="TorchX's: local_cwd, slurm, kubernetes, …")
    parser.add_argument("--cfg", type=str, default="", help="The scheduler's options, as torchx run's -cfg: key=value,…")
    parser.add_argument("--concurrency", type=int, default=1, help="Most runs at a time.")
    parser.add_argument("--retry-failed", action="store_true", help="Take failed runs up again, from their checkpoints.")
    parser.add_argument("--dryrun", action="store_true", help="Print the runs, and start none.")
    parser.add_class_arguments(Place, help="Where a run goes: see launch/components.py:train.")
    return parser


def _main(options: Any) -> int:
    if options.concurrency < 1:
        raise UserError(f"--concurrency: {options.concurrency} is too small; it must be at least 1")
    plan = read_plan(options.sweep)
    if options.dryrun:
        print("\n".join(f"{run.name}\t{' '.join(run.overrides)}" for run in plan.runs))
        return 0
    place = _place(options)
    folder = options.output or os.path.join("runs", os.path.splitext(os.path.basename(options.sweep))[0])
    ended = run_plan(plan, folder, place, options.scheduler, options.cfg, options.concurrency, options.retry_failed)
    return ended.code if ended.code > 1 else _report(ended, folder)


def _place(options: Any) -> Place:
    return Place(**{field.name: getattr(options, field.name) for field in fields(Place)})


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
