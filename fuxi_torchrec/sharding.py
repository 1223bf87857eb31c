"""Process groups, and the model under TorchRec's DistributedModelParallel with its optimizers.

A sharded table is made on the meta device, so that no rank ever holds more than its part, and is trained inside backward
by fbgemm's fused optimizers. A replicated table is one that is left out of the sharding plan: DistributedDataParallel
keeps the copies equal and AdamW trains it densely, which is the papers' set-up (and the only data-parallel one that works
on a CPU).
"""

import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from fuxi_torchrec import planning
from fuxi_torchrec.config import Config, OptimizerConfig
from fuxi_torchrec.config_check import check_table
from fuxi_torchrec.data_format import DatasetIdentity
from fuxi_torchrec.errors import LostProcess, UserError
from fuxi_torchrec.model import TABLE, SequenceRecommender, build_model
from fuxi_torchrec.tables import TableChoice, init_rows
from fuxi_torchrec.versions import fbgemm_has_cuda

T = TypeVar("T")

# torchrec asks is_fx_tracing() at every forward, and torch warns about the name once.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass(frozen=True)
class World:
    """This process's place: the whole world at size 1 too.

    host_group: for values that the host has and needs, which must not wait for a GPU; None: the default group, which is
    gloo's.
    """

    rank: int
    size: int
    device: torch.device
    host_group: Optional[dist.ProcessGroup] = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """All ranks' sum, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """All ranks' maximum, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def sum_on_host(self, values: Sequence[int]) -> List[int]:
        """All ranks' sums of non-negative integers below 2**53, from host to host."""
        if self.size == 1:
            return list(map(int, values))
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return list(map(int, total.tolist()))

    def gathered(self, value: T) -> List[T]:
        """Every rank's value."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def device_type(device: str) -> str:
    """"cuda" or "cpu" for trainer.device. auto takes the GPU only where fbgemm has kernels for it as well.

    Raises UserError where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device: cuda is asked for, but torch sees no GPU here; use cpu or auto")
    return "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available() and fbgemm_has_cuda()) else "cpu"


@contextmanager
def start_world(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """Joins the process group that torchrun described in the environment, or makes one of this process alone.

    nccl on CUDA, gloo elsewhere. A collective that waits longer than timeout_minutes fails.

    Raises UserError where CUDA is asked for and absent, LostProcess where the others do not come.
    """
    use_cuda = device_type(device) == "cuda"
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
                f"({str(error).splitlines()[0][:200]}); start every rank, or raise trainer.timeout_minutes"
            ) from error
        host_group = dist.new_group(backend="gloo", timeout=timeout) if use_cuda else None
    else:
        # An in-process store: a single process needs no port, which another job could hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, place, host_group)
    finally:
        dist.destroy_process_group()


def build_distributed(
    config: Config, identity: DatasetIdentity, world: World
) -> Tuple[DistributedModelParallel, TableChoice]:
    """The run's model with its table replicated or sharded, freshly initialised; every rank calls it.

    Initial values don't depend on the sharding. Raises UserError where the table fits no plan.
    """
    check_table(config, world.device.type)
    machine = planning.this_machine(config, world.device, world.size)
    # Ranks whose hosts differ by a little memory must not decide differently.
    machine = world.from_main(machine)
    num_items, events = identity.num_items, planning.mean_events(identity)
    choice = planning.choose(config, machine, num_items, events)
    model = build_model(config, num_items, identity.time_unit, world.device, on_meta=choice.is_sharded)
    if not choice.is_sharded:
        return distribute(model, world, ShardingPlan({})), choice
    planning.apply_table_optimizer(model.embeddings, choice, config)
    plan, _ = planning.plan_table(model, config, choice, machine, num_items, events)
    model = distribute(model, world, plan)
    for row, column, part in local_parts(model):
        init_rows(part, config.trainer.seed, config.model.embedding_dim, row, column)
    return model, choice


def distribute(model: SequenceRecommender, world: World, plan: ShardingPlan) -> DistributedModelParallel:
    """The model under DistributedModelParallel; a table that the plan leaves out is replicated."""
    with warnings.catch_warnings():
        # torchrec 1.8 calls DDP with an argument that torch 2.13 renamed; nothing a user could do about it.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=world.device,
            plan=plan,
            sharders=[planning.sharder(world.device.type)] if plan.plan else [],
            # Otherwise DDP orders its buckets anew after a process's first step, by the order in which gradients came. Where
            # a gradient lies in a bucket decides in what order gloo's ranks add it up: a resumed run, whose first step is
            # another one, would differ from the uninterrupted run in the last bit (of three ranks or more). On CUDA nothing
            # promises the last bit, and the search for unused parameters would cost time.
            data_parallel_wrapper=DefaultDataParallelWrapper(
                static_graph=False, find_unused_parameters=world.device.type == "cpu"
            ),
            # DDP copies every gradient into its buckets, also where there is nobody to average with.
            init_data_parallel=world.size > 1,
        )


def build_optimizer(
    model: DistributedModelParallel, config: OptimizerConfig, table_rate_ratio: float = 1.0
) -> CombinedOptimizer:
    """AdamW on all dense parameters, beside whatever optimizers run inside backward for sharded tables.

    Args:
        table_rate_ratio: learning rate of a sharded table over that of the dense parameters.
    """
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        ),
    )
    for groups, ratio in ((model.fused_optimizer.param_groups, table_rate_ratio), (dense.param_groups, 1.0)):
        for group in groups:
            group["rate_ratio"] = ratio
    return CombinedOptimizer([model.fused_optimizer, dense])


def prepare_step(optimizer: CombinedOptimizer, learning_rate: float) -> None:
    """Sets the step's learning rate and clears gradients. It must come before *forward*: zero_grad() is where a sharded
    table's optimizer hands its rate to fbgemm, whose lookup takes the rate along to backward."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_ratio"]
    optimizer.zero_grad()


def check_parameters(model: DistributedModelParallel, world: World, step: int) -> None:
    """Raises UserError, on all ranks, where any parameter of the model is not finite."""
    dense = in_backward_optimizer_filter(model.named_parameters())
    parts = [*(parameter for _, parameter in dense), *(part for _, _, part in local_parts(model))]
    # min and max tell it in one pass without a tensor of the table's size.
    extremes = [x for part in parts if part.numel() for x in torch.aminmax(part.detach())]
    broken = 1.0 - torch.isfinite(torch.stack(extremes)).all().double()
    if world.max(broken[None]).item():
        raise UserError(
            f"step {step}: the model's parameters are not finite, and not saved; "
            "try a lower optimizer.learning_rate or optimizer.clip_grad_norm, and go on from the last checkpoint"
        )


def is_sharded(model: DistributedModelParallel) -> bool:
    return isinstance(model.module.embeddings, ShardedEmbeddingCollection)


def local_parts(model: DistributedModelParallel) -> List[Tuple[int, int, Tensor]]:
    """This rank's parts of the item table as (first row, first column, values), sharing its memory."""
    if not is_sharded(model):
        return [(0, 0, model.module.embeddings.embeddings[TABLE].weight.detach())]
    shards = _sharded_table(model).local_shards()
    return [(*shard.metadata.shard_offsets, shard.tensor.detach()) for shard in shards]


def table_shards(model: DistributedModelParallel) -> Tuple[List[Tuple[int, int, int, int]], Tuple[int, int]]:
    """A sharded table's parts as (rank, first column, rows, columns), and its size (rows, columns)."""
    metadata = _sharded_table(model).metadata()
    shards = [
        (shard.placement.rank(), shard.shard_offsets[1], *shard.shard_sizes) for shard in metadata.shards_metadata
    ]
    return shards, tuple(metadata.size)


def _sharded_table(model: DistributedModelParallel) -> ShardedTensor:
    return model.module.embeddings.state_dict()[f"embeddings.{TABLE}.weight"]
