"""This process's place among all: process groups, and what the ranks tell each other."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator, List, Optional, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fuxi_torchrec.distributed.agent import check_all_nodes_met
from fuxi_torchrec.errors import LostProcess, UserError, one_line
from fuxi_torchrec.versions import fbgemm_has_cuda

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all: the whole world at size 1 too.

    host_group: for values that the host has and needs, which must not wait for a GPU; None: the default group, which is
    gloo's.
    """

    rank: int
    size: int
    device: torch.device
    host_group: Optional[dist.ProcessGroup] = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Adds up all ranks' values, in place; a collective."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Takes the maximum of all ranks' values, in place; a collective."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def sum_on_host(self, values: Sequence[int]) -> List[int]:
        """Adds up all ranks' non-negative integers below 2**53, from host to host; a collective."""
        if self.size == 1:
            return list(map(int, values))
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return list(map(int, total.tolist()))

    def gathered(self, value: T) -> List[T]:
        """Collects every rank's value, in the order of ranks; a collective."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Returns rank 0's value on every rank; a collective."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def device_type(device: str) -> str:
    """Chooses "cuda" or "cpu" for trainer.device. auto takes the GPU only where fbgemm has kernels for it as well.

    Raises UserError where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device: cuda is asked for, but torch sees no GPU here; use cpu or auto")
    return "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available() and fbgemm_has_cuda()) else "cpu"


@contextmanager
def start_world(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """Joins the process group that torchrun described in the environment, or makes one of this process alone.

    nccl on CUDA, gloo elsewhere. A collective that waits longer than timeout_minutes fails.

    Raises UserError where CUDA is asked for and absent, LostProcess where the others do not come or torchrun goes on
    without them.
    """
    use_cuda = device_type(device) == "cuda"
    check_all_nodes_met()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device("cpu")
    if use_cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    backend = "nccl" if use_cuda else "gloo"
    host_group, timeout = None, timedelta(minutes=timeout_minutes)
    if size > 1:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LostProcess(
                f"rank {rank} of {size}: the processes did not meet at {where} within {timeout_minutes:g} minutes "
                f"({one_line(error)}); start every rank, or raise trainer.timeout_minutes"
            ) from error
        host_group = dist.new_group(backend="gloo", timeout=timeout) if use_cuda else None
    else:
        # An in-process store: a single process needs no port, which another job could hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, place, host_group)
    finally:
        dist.destroy_process_group()
