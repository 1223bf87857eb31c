"""Process groups, and the model under TorchRec's DistributedModelParallel with its optimizer.

A replicated table is one that is left out of the sharding plan: DistributedDataParallel keeps the copies equal and
AdamW trains it densely, which is the papers' set-up (and the only data-parallel one that works on a CPU).
"""

import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator, List, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from fuxi_torchrec.config import OptimizerConfig
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.model import TABLE, SequenceRecommender
from fuxi_torchrec.versions import fbgemm_has_cuda

T = TypeVar("T")

# torchrec asks is_fx_tracing() at every forward, and torch warns about the name once.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass(frozen=True)
class World:
    """This process's place: the whole world at size 1 too."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """All ranks' sum, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


@contextmanager
def start_world(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """Joins the process group that torchrun described in the environment, or makes one of this process alone.

    nccl on CUDA, gloo elsewhere. A collective that waits longer than timeout_minutes fails.

    Raises UserError where CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device: cuda is asked for, but torch sees no GPU here; use cpu or auto")
    # auto takes the GPU only where fbgemm has kernels for it as well.
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available() and fbgemm_has_cuda())
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device("cpu")
    if use_cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    backend = "nccl" if use_cuda else "gloo"
    if size > 1:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    else:
        # An in-process store: a single process needs no port, which another job could hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


def distribute(model: SequenceRecommender, world: World) -> DistributedModelParallel:
    """The model with its table replicated, under DistributedModelParallel."""
    with warnings.catch_warnings():
        # torchrec 1.8 calls DDP with an argument that torch 2.13 renamed; nothing a user could do about it.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=world.device,
            plan=ShardingPlan({}),
            sharders=[],
        )


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """AdamW on all dense parameters, beside whatever optimizers run inside backward for sharded tables."""
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        ),
    )
    return CombinedOptimizer([model.fused_optimizer, dense])


def local_table(model: DistributedModelParallel) -> List[Tuple[int, Tensor]]:
    """This rank's rows of the item table as (first row, rows [·, D]); the whole table where it is replicated."""
    return [(0, model.module.embeddings.embeddings[TABLE].weight.detach())]
