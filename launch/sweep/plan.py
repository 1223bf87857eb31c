"""A sweep's file, and the runs that it asks for. No torch here: mistakes are told at once.

    config: configs/smoke/fuxi-beta.yaml      # what every run starts from
    set: {trainer.max_epochs: 3}              # what all have besides
    seeds: [0, 1]                             # trainer.seed of every run (default: the config's)
    width_per_block: 16                       # for the dial
    grid:                                     # every combination; or a list of such grids, and any value may stand alone
      dial: [1, 2, 4]                         # model sizes: blocks, and with them the width, dial * width_per_block
      optimizer.learning_rate: [0.001, 0.003]
    prepare:                                  # data sets that are made first where they are missing
      data/synthetic: synthetic --users 5000 --items 2000 --events-per-user 60
"""

import hashlib
import itertools
import json
import os
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List

from fuxi_torchrec.config.parsing import (
    OneLineParser,
    add_config_arguments,
    check_file,
    check_keys,
    parse_config,
    read_yaml,
)
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject

DIAL = "dial"
KEYS = ("config", "set", "seeds", "width_per_block", "grid", "prepare")
# The dial's width is also that of the heads, all of which the presets' single head takes.
DIALLED_WIDTHS = ("model.embedding_dim", "model.value_dim", "model.qk_dim")
LONGEST_NAME = 80


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: its folder's: what varies, and a hash of everything.
        varied: the sweep's keys and values that tell it from the others.
        config: YAML file that it starts from.
        overrides: command-line options on top of the config.
        least_epochs: a finished run with a smaller trainer.max_epochs goes on; 0: finished is finished.
    """

    name: str
    varied: JsonObject
    config: str
    overrides: List[str]
    least_epochs: int = 0


@dataclass(frozen=True)
class SweepPlan:
    """A sweep's file, read and checked. prepare: folder of a data set -> arguments of 'fuxi-torchrec prepare'.

    Attributes:
        runs: in their order.
        prepare: folder of a data set that is made first where it is missing -> arguments of 'fuxi-torchrec prepare'.
        runs_folder: where the run folders are, from the sweep's folder.
    """

    runs: List[PlannedRun]
    prepare: Dict[str, List[str]] = field(default_factory=dict)
    runs_folder: str = "runs"


def read_plan(path: str) -> SweepPlan:
    """Reads a sweep's file. Raises UserError, naming file and key, for whatever no run could have (or exits with code 2
    and one line for a value of a wrong type, as the command line does)."""
    values = _read(path)
    base = values["config"]
    check_file(base)
    base_values = read_yaml(base, "config file") or {}
    fixed = _mapping(path, "set", values.get("set"))
    combinations = list(_combinations(path, values))
    varying = _varying(combinations)
    runs: Dict[str, PlannedRun] = {}
    parser = OneLineParser(prog=f"launch.sweep {path}")
    add_config_arguments(parser)
    for combination in combinations:
        settings = {**fixed, **_without_dial(path, combination, values)}
        _check_settings(path, settings)
        overrides = [word for key, value in settings.items() for word in (f"--{key}", _word(value))]
        try:
            parse_config(parser, base, overrides)
        except UserError as error:
            raise UserError(f"{path}: {json.dumps(combination, default=str)}: {error}") from None
        identity = json.dumps([base_values, settings], sort_keys=True, default=str)
        name = _name({key: combination[key] for key in varying if key in combination}, identity)
        runs[name] = PlannedRun(name, combination, base, overrides)  # grids may overlap
    return SweepPlan(list(runs.values()), _preparations(path, values))


def _read(path: str) -> JsonObject:
    values = read_yaml(path, "sweep", "name one of configs/sweeps/")
    if not isinstance(values, dict) or not isinstance(values.get("config"), str):
        raise UserError(f"{path}: config: name the YAML file that every run starts from")
    for key in values:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key}; a sweep has {', '.join(KEYS)}")
    return values


def _mapping(path: str, key: str, value: Any) -> JsonObject:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {key} must hold keys and values, not {value!r}")
    return value or {}


def _combinations(path: str, values: JsonObject) -> Iterator[JsonObject]:
    """{key: value} of every run: each grid's product, times the seeds where a grid has none of its own."""
    grids = values.get("grid") or {}
    for grid in grids if isinstance(grids, list) else [grids]:
        grid = _mapping(path, "grid", grid)
        seeds = values.get("seeds")
        if seeds is not None and "trainer.seed" not in grid:
            grid = {**grid, "trainer.seed": seeds}
        choices = [value if isinstance(value, list) else [value] for value in grid.values()]
        for key, choice in zip(grid, choices):
            if not choice:
                raise UserError(f"{path}: grid: {key} has no value; give it one, or leave it out")
        for combination in itertools.product(*choices):
            yield dict(zip(grid, combination))


def _varying(combinations: List[JsonObject]) -> List[str]:
    """Keys that differ between runs, in order of appearance: a run without a key differs from one with it."""
    keys = dict.fromkeys(key for combination in combinations for key in combination)
    return [key for key in keys if len({json.dumps(c.get(key), default=str) for c in combinations}) > 1]


def _without_dial(path: str, combination: JsonObject, values: JsonObject) -> JsonObject:
    if DIAL not in combination:
        return combination
    blocks, width = combination[DIAL], values.get("width_per_block")
    for key, value in (("grid: dial", blocks), ("width_per_block", width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {key}: {value!r} must be a whole number above 0")
    dialled = {"model.num_blocks": blocks, **dict.fromkeys(DIALLED_WIDTHS, blocks * width)}
    return {**dialled, **{key: value for key, value in combination.items() if key != DIAL}}


def _check_settings(path: str, settings: JsonObject) -> None:
    for key in settings:
        section, _, name = str(key).partition(".")
        check_keys(path, {section: {name: None}} if name else {section: {}})
        if not name:
            raise UserError(f"{path}: {key} is a section; a sweep's keys are dotted, as in trainer.max_epochs")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(varying: JsonObject, identity: str) -> str:
    """Same settings, same name: a sweep started again finds its runs by it."""
    parts = []
    for key, value in varying.items():
        text = os.path.basename(value.rstrip("/")) if isinstance(value, str) else json.dumps(value)
        parts.append(f"{key.split('.')[-1]}-{text}")
    readable = re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join(parts)).strip("-")[:LONGEST_NAME]
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{readable}-{digest}" if readable else f"run-{digest}"


def _preparations(path: str, values: JsonObject) -> Dict[str, List[str]]:
    preparations = {}
    for folder, arguments in _mapping(path, "prepare", values.get("prepare")).items():
        words = shlex.split(arguments) if isinstance(arguments, str) else []
        if not words or "--output" in words:
            raise UserError(f"{path}: prepare: {folder}: give the arguments of 'fuxi-torchrec prepare' without --output")
        preparations[folder] = [*words, "--output", folder]
    return preparations
