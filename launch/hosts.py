"""What a node has: named hosts, and the numbers that a component's arguments put in their place."""

from typing import Dict, Optional

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
