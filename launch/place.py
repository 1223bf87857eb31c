"""Where a job runs: scheduler, machines, mounts."""

import os
from dataclasses import dataclass
from typing import Dict, List, Optional, Union

from torchx.specs import RetryPolicy, Role

from fuxi_torchrec.errors import UserError
from launch.environment import environment, exports
from launch.hosts import Nodes, resource
from launch.images import check_image
from launch.kubernetes.overlay import lay_over, read_overlay
from launch.mounts import folders, read_mounts


@dataclass
class Place:
    """Where a job runs and on how much; components.train documents the fields."""

    nnodes: Union[int, str] = 1
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
        self.nodes = Nodes.of(self.nnodes)
        for key, least in (("nproc_per_node", 0), ("max_restarts", 0), ("max_retries", 0)):
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
        check_image(self.image)
        self.mounted = folders(read_mounts(self.mounts))
        self.overlay = read_overlay(self.metadata)

    @property
    def size(self) -> int:
        """Processes of the job, at most."""
        return self.nodes.most * self.processes

    def role(self, name: str, command: str) -> Role:
        """Makes TorchX's role of this name: the bash command, the environment and the resources of each node."""
        cores = self.resource.cpu if self.h or self.cpu else None
        role = Role(
            name=name,
            # Schedulers without images take this for a folder, and run in the one that was submitted from.
            image=self.image or os.getcwd(),
            entrypoint="bash",
            args=["-c", exports(self.env) + command],
            env=environment(cores, self.processes, self.env),
            num_replicas=self.nodes.most,
            min_replicas=self.nodes.least if self.nodes.is_elastic else None,
            max_retries=self.max_retries,
            # The others of an elastic job train on while a lost node's is started again.
            retry_policy=RetryPolicy.REPLICA if self.nodes.is_elastic else RetryPolicy.APPLICATION,
            resource=self.resource,
            port_map={"c10d": self.rdzv_port} if self.nodes.most > 1 else {},
            mounts=read_mounts(self.mounts),
        )
        lay_over(role, self.overlay)
        return role
