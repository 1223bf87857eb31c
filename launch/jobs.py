"""TorchX applications out of components' arguments, each checked before it is submitted.

Everything wrong with the arguments is a UserError, so that a program (a sweep) can submit jobs as the command line does.
"""

import os
import re
from typing import List, Optional, Sequence, Tuple

from torchx.specs import AppDef, Role

from launch import checks
from launch.environment import interpreter, quoted, torchrun
from launch.kubernetes.retries import COUNTS_RESTARTS
from launch.place import Place

LONGEST_NAME = 28


def train(
    config: str, overrides: List[str], output: Optional[str], resume: bool, place: Place, later: bool = False
) -> AppDef:
    """Makes the application that trains a config, into a run folder whose path is decided here: every start of the
    job, after a restart or a requeue too, is told to go on from what it finds there. later: another job makes its data set
    first."""
    loaded = checks.config(config, overrides, place, later)
    checks.widths(loaded, place)
    output = checks.run_folder(config, output, resume, place)
    overrides = checks.with_absolute_paths(overrides, loaded, place)
    arguments = ["train", config, "--output", output, "--resume", *overrides]
    return application(output, place.role("train", _torchrun(place, arguments)))


def evaluate(run: str, options: List[str], place: Place, later: bool = False) -> AppDef:
    """Makes the application that evaluates a run's saved model. later: another job trains it first."""
    run, options = checks.evaluation(run, options, place, later)
    return application(run, place.role("evaluate", _torchrun(place, ["evaluate", run, *options])))


def prepare(arguments: List[str], place: Place, command: Sequence[str] = ("fuxi_torchrec", "prepare")) -> AppDef:
    """Makes the application that runs a data pipeline. command: module that takes the arguments, and words before them."""
    arguments = checks.preparation(arguments, place)
    checks.begins(arguments, place)
    return alone("prepare", f"prepare-{arguments[0]}", ["-m", *command, *arguments], place)


def alone(role: str, name: str, words: List[str], place: Place) -> AppDef:
    """Makes the application of one Python process, without torchrun. name: a path or a word that the job is named by."""
    return application(name, place.role(role, "exec " + quoted([interpreter(place.image), *words])))


def application(path: str, role: Role) -> AppDef:
    """Makes TorchX's application of one role, whose max_retries counts restarts on every scheduler.

    Args:
        path: a file or folder that it is named after.
    """
    return AppDef(name=_name(path), roles=[role], metadata=dict(COUNTS_RESTARTS))


def _torchrun(place: Place, arguments: List[str]) -> str:
    python = interpreter(place.image)
    module = ["fuxi_torchrec", *arguments]
    return torchrun(place.nodes, place.processes, place.max_restarts, place.rdzv_port, python, module)


def _name(path: str) -> str:
    """A job's name: a file's or folder's, as schedulers want names.

    Kubernetes makes longer ones of it: TorchX adds up to 15 characters, Volcano "-ROLE-NODE-0" for a pod, whose name
    may have 63. With LONGEST_NAME "evaluate" has room for 99 999 nodes.
    """
    stem = os.path.splitext(os.path.basename(path.rstrip("/")))[0] if path.endswith((".yaml", ".yml")) else path
    words: Tuple[str, ...] = tuple(re.findall(r"[a-z0-9]+", os.path.basename(stem.rstrip("/")).lower()))
    name = "-".join(words)
    return (name if name[:1].isalpha() else f"run-{name}")[:LONGEST_NAME].rstrip("-")
