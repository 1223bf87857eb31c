"""The options of `python -m launch.sweep`."""

import os
from dataclasses import fields
from typing import TYPE_CHECKING, List, Optional

from fuxi_torchrec.errors import UserError
from launch.place import Place

if TYPE_CHECKING:
    from jsonargparse import Namespace


def parse(arguments: Optional[List[str]]) -> "Namespace":
    """Parses the command's arguments (None: the process's own) into a namespace; ends the program by one line and exit
    code 2 for a mistake."""
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
    return parser.parse_args(arguments)


def place_of(options: "Namespace") -> Place:
    """Makes the place of a sweep's runs. Raises UserError for values that cannot be."""
    if options.concurrency < 1:
        raise UserError(f"--concurrency: {options.concurrency} is too small; it must be at least 1")
    return Place(**{field.name: getattr(options, field.name) for field in fields(Place)})


def default_folder(sweep: str) -> str:
    """Names a sweep's folder by its file."""
    return os.path.join("runs", os.path.splitext(os.path.basename(sweep))[0])
