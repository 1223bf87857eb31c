"""A whole sweep as one job: its runs are processes of the job's node."""

import os
from dataclasses import replace
from typing import List, Tuple

from torchx.specs import AppDef

from fuxi_torchrec.data.format import IDENTITY_FILE
from fuxi_torchrec.errors import UserError
from launch import checks
from launch.jobs import alone
from launch.place import Place
from launch.sweep.options import default_folder, parse, place_of
from launch.sweep.plan import PlannedRun, SweepPlan, read_plan
from launch.sweep.runner import LOCAL
from launch.words import without

PLACED = ("--data.", "--table.", "--trainer.device", "--trainer.checkpoint_folder")


def sweep_app(config: str, options: List[str], place: Place) -> AppDef:
    """Makes the application that runs a sweep in one job, into a folder that is decided here. Raises UserError, for the
    sweep's options, its file, its runs and its data sets as the job would, before it is submitted."""
    if not os.path.isfile(config):
        raise UserError(f"{config}: no such sweep config; name one of configs/sweeps/")
    given = parse([config, *options])
    runs_at = place_of(given)
    check_scheduler(given.scheduler)
    plan = read_plan(config)
    folder = default_folder(config)
    folder = checks.output("--output", given.output or (None if place.image else folder), place, folder)
    # Runs on the job's own node share it; those that are submitted further are looked at when they are.
    _check_runs(plan, replace(place, nproc_per_node=runs_at.processes) if given.scheduler in LOCAL else place)
    words = ["-m", "launch.sweep", config, "--output", folder, *without(options, "--output")]
    return alone("sweep", config, words, place)


def check_scheduler(name: str) -> None:
    """Checks that TorchX has a scheduler. Raises UserError."""
    from torchx.schedulers import get_scheduler_factories

    known = get_scheduler_factories()
    if name not in known:
        raise UserError(f"--scheduler: {name} is none of {', '.join(known)}")


def _check_runs(plan: SweepPlan, place: Place) -> None:
    """Checks the data sets that the sweep makes and those that it expects, each with the device and table it is for."""
    made = set()
    for arguments in plan.prepare.values():
        arguments = checks.preparation(arguments, place)
        made.add(arguments[-1])
        if not os.path.exists(os.path.join(arguments[-1], IDENTITY_FILE)):
            checks.begins(arguments, place)
    for run in {_looked_at(run): run for run in plan.runs}.values():
        try:
            loaded = checks.config(run.config, run.overrides, place, later=True)
            if checks.config_path("data", "path", loaded, place) not in made:
                checks.data_set(loaded, place)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None


def _looked_at(run: PlannedRun) -> Tuple[str, ...]:
    """What of a run is checked with its place: runs that differ in something else are checked once."""
    settings = zip(run.overrides[::2], run.overrides[1::2])
    return (run.config, *(word for pair in settings if pair[0].startswith(PLACED) for word in pair))
