"""TorchX applications out of components' arguments, each checked before it is submitted.

Everything wrong with the arguments is a UserError, so that a program (a sweep) can submit jobs as the command line does.
"""

import os
import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from torchx.specs import AppDef, Role, parse_mounts

from fuxi_torchrec.errors import UserError
from launch import checks
from launch.environment import GRACE_SECONDS, environment, interpreter, quoted, torchrun
from launch.hosts import resource


@dataclass
class Place:
    """Where a job runs and on how much; components.train documents the fields."""

    nnodes: int = 1
    nproc_per_node: int = 0
    h: Optional[str] = None
    cpu: int = 0
    gpu: int = 0
    memMB: int = 0
    devices: Optional[Dict[str, str]] = None
    image: Optional[str] = None
    mounts: Optional[List[str]] = None
    env: Optional[Dict[str, str]] = None
    metadata: Optional[Dict[str, str]] = None
    max_restarts: int = 0
    max_retries: int = 0
    rdzv_port: int = 29500

    def __post_init__(self) -> None:
        for key, least in (("nnodes", 1), ("nproc_per_node", 0), ("max_restarts", 0), ("max_retries", 0)):
            if getattr(self, key) < least:
                raise UserError(f"--{key}: {getattr(self, key)} is too small; it must be at least {least}")
        if not 0 < self.rdzv_port < 65536:
            raise UserError(f"--rdzv_port: {self.rdzv_port} is no port; take one from 1 to 65535")
        self.resource = resource(self.h, self.cpu, self.gpu, self.memMB, self.nproc_per_node, self.devices)
        gpus = self.resource.gpu
        self.processes = self.nproc_per_node or max(gpus, 1)
        if 0 < gpus < self.processes:
            where = "--gpu" if self.gpu else f"-h {self.h}"
            raise UserError(f"--nproc_per_node: {self.processes} processes are more than the {gpus} GPUs of {where}")
        self.mounted = checks.mounted_folders(self.mounts)

    @property
    def size(self) -> int:
        """Processes of the job."""
        return self.nnodes * self.processes

    def role(self, name: str, command: str) -> Role:
        cores = self.resource.cpu if self.h or self.cpu else None
        return Role(
            name=name,
            # Schedulers without images take this for a folder, and run in the one that was submitted from.
            image=self.image or os.getcwd(),
            entrypoint="bash",
            args=["-c", command],
            env=environment(cores, self.processes, self.env),
            num_replicas=self.nnodes,
            max_retries=self.max_retries,
            resource=self.resource,
            port_map={"c10d": self.rdzv_port} if self.nnodes > 1 else {},
            metadata={"kubernetes": {"spec": {"terminationGracePeriodSeconds": GRACE_SECONDS}}, **(self.metadata or {})},
            mounts=parse_mounts(self.mounts) if self.mounts else [],
        )


def train(config: str, overrides: List[str], output: Optional[str], resume: bool, place: Place) -> AppDef:
    """Training of a config, into a run folder whose path is decided here: every start of the job, after a restart or a
    requeue too, is told to go on from what it finds there."""
    loaded = checks.config(config, overrides, place)
    output = checks.run_folder(config, output, resume, place)
    overrides = checks.with_absolute_paths(overrides, loaded, place)
    arguments = ["train", config, "--output", output, "--resume", *overrides]
    return AppDef(name=_name(output), roles=[place.role("train", _torchrun(place, arguments))])


def evaluate(run: str, options: List[str], place: Place) -> AppDef:
    """Evaluation of a run's saved model."""
    run = checks.evaluation(run, options, place)
    return AppDef(name=_name(run), roles=[place.role("evaluate", _torchrun(place, ["evaluate", run, *options]))])


def prepare(arguments: List[str], place: Place) -> AppDef:
    """A data pipeline."""
    arguments = checks.preparation(arguments, place)
    return _alone("prepare", f"prepare-{arguments[0]}", ["-m", "fuxi_torchrec", "prepare", *arguments], place)


def sweep(config: str, options: List[str], place: Place) -> AppDef:
    """A sweep, run as a job: its runs are processes of the job's node."""
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
