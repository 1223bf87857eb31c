"""TorchX applications out of components' arguments, each checked before it is submitted.

Everything wrong with the arguments is a UserError, so that a program (a sweep) can submit jobs as the command line does.
"""

import os
import re
from typing import List, Optional, Sequence, Tuple

from torchx.specs import AppDef

from fuxi_torchrec.errors import UserError
from launch import checks
from launch.environment import interpreter, quoted, torchrun
from launch.place import Place


def train(
    config: str, overrides: List[str], output: Optional[str], resume: bool, place: Place, later: bool = False
) -> AppDef:
    """Makes the application that trains a config, into a run folder whose path is decided here: every start of the
    job, after a restart or a requeue too, is told to go on from what it finds there. later: another job makes its data set
    first."""
    loaded = checks.config(config, overrides, place, later)
    output = checks.run_folder(config, output, resume, place)
    overrides = checks.with_absolute_paths(overrides, loaded, place)
    arguments = ["train", config, "--output", output, "--resume", *overrides]
    return AppDef(name=_name(output), roles=[place.role("train", _torchrun(place, arguments))])


def evaluate(run: str, options: List[str], place: Place, later: bool = False) -> AppDef:
    """Makes the application that evaluates a run's saved model. later: another job trains it first."""
    run = checks.evaluation(run, options, place, later)
    return AppDef(name=_name(run), roles=[place.role("evaluate", _torchrun(place, ["evaluate", run, *options]))])


def prepare(arguments: List[str], place: Place, command: Sequence[str] = ("fuxi_torchrec", "prepare")) -> AppDef:
    """Makes the application that runs a data pipeline. command: module that takes the arguments, and words before them."""
    arguments = checks.preparation(arguments, place)
    return _alone("prepare", f"prepare-{arguments[0]}", ["-m", *command, *arguments], place)


def sweep(config: str, options: List[str], place: Place) -> AppDef:
    """Makes the application that runs a sweep in one job: its runs are processes of the job's node."""
    if not os.path.isfile(config):
        raise UserError(f"{config}: no such sweep config; name one of configs/sweeps/")
    return _alone("sweep", config, ["-m", "launch.sweep", config, *options], place)


def _torchrun(place: Place, arguments: List[str]) -> str:
    python = interpreter(place.image)
    module = ["fuxi_torchrec", *arguments]
    return torchrun(place.nnodes, place.processes, place.max_restarts, place.rdzv_port, python, module)


def _alone(role: str, name: str, words: List[str], place: Place) -> AppDef:
    return AppDef(name=_name(name), roles=[place.role(role, "exec " + quoted([interpreter(place.image), *words]))])


def _name(path: str) -> str:
    """A job's name: a file's or folder's, as schedulers want names. Kubernetes makes a pod's of it (63 characters)."""
    stem = os.path.splitext(os.path.basename(path.rstrip("/")))[0] if path.endswith((".yaml", ".yml")) else path
    words: Tuple[str, ...] = tuple(re.findall(r"[a-z0-9]+", os.path.basename(stem.rstrip("/")).lower()))
    name = "-".join(words)[:32].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")
