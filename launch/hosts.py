"""What a node has: named hosts, and the numbers that a component's arguments put in their place; and how many there are."""

import re
from typing import Dict, NamedTuple, Optional, Union

from torchx import specs
from torchx.specs import Resource

from fuxi_torchrec.errors import UserError

GB = 1000  # MB
# The least that machines of the kind have among the large clouds' and the vendor's own, less what their system keeps, so
# that a job fits all of them; --cpu and --memMB ask for more.
HOSTS: Dict[str, Resource] = {
    "h100x8": Resource(cpu=96, gpu=8, memMB=960 * GB),
    "a100x8": Resource(cpu=88, gpu=8, memMB=640 * GB),
    "cpu": Resource(cpu=16, gpu=0, memMB=60 * GB),
}


def resource(
    name: Optional[str], cpu: int, gpu: int, memMB: int, processes: int, devices: Optional[Dict[str, str]]
) -> Resource:
    """Makes a node's TorchX resource: the named host's, where a number is 0.

    Args:
        name: of HOSTS, or a named resource of TorchX's; None: one core a process, no GPU, the scheduler's own memory limit.
        processes: a node's; 0 where there shall be as many as GPUs.
        devices: further devices a node, as {"rdma/ib": "8"}; Kubernetes alone hands them out.
    """
    for key, value in (("cpu", cpu), ("gpu", gpu), ("memMB", memMB)):
        if value < 0:
            raise UserError(f"--{key}: {value} is too small; 0 takes the host's")
    host = _host(name) if name else Resource(cpu=max(processes, gpu, 1), gpu=0, memMB=-1)
    counts: Dict[str, int] = {}
    for device, count in (devices or {}).items():
        if not count.isdigit() or int(count) < 1:
            raise UserError(f"--devices: {device}={count}: the count must be a whole number above 0")
        counts[device] = int(count)
    return Resource(
        cpu=cpu or host.cpu,
        gpu=gpu or host.gpu,
        memMB=memMB or host.memMB,
        capabilities=dict(host.capabilities),
        devices={**host.devices, **counts},
    )


def _host(name: str) -> Resource:
    if name in HOSTS:
        return HOSTS[name]
    try:
        return specs.resource(h=name)
    except KeyError:
        known = ", ".join(HOSTS)
        raise UserError(f"-h {name}: no such host; known are {known} and TorchX's named resources") from None


class Nodes(NamedTuple):
    """How many nodes a job runs on: from `least` to `most` of them, as they come and go."""

    least: int
    most: int

    @classmethod
    def of(cls, given: Union[int, str]) -> "Nodes":
        """Reads --nnodes: a number, or torchrun's MIN:MAX. Raises UserError."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(given))
        if match is None:
            raise UserError(f"--nnodes: {given} is no number of nodes; write 4, or MIN:MAX as in 2:4")
        nodes = cls(int(match[1]), int(match[2] or match[1]))
        if nodes.least < 1:
            raise UserError(f"--nnodes: {given} is too small; it must be at least 1")
        if nodes.most < nodes.least:
            raise UserError(f"--nnodes: {given}: the least comes first; write {nodes.most}:{nodes.least}")
        return nodes

    @property
    def is_elastic(self) -> bool:
        """Whether the job goes on with another number of nodes when one is lost or comes back."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.most)
