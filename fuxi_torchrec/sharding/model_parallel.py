"""Process groups, and the model under TorchRec's DistributedModelParallel with its optimizers.

A sharded table is made on the meta device, so that no rank ever holds more than its part, and is trained inside backward
by fbgemm's fused optimizers. A replicated table is one that is left out of the sharding plan: DistributedDataParallel
keeps the copies equal and AdamW trains it densely, which is the papers' set-up (and the only data-parallel one that works
on a CPU).
"""

import warnings
from typing import List, Tuple

import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.rules import check_table
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.distributed.private_api import ShardedTensor
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.model.recommender import TABLE, SequenceRecommender, build_model
from fuxi_torchrec.model.table_init import init_rows
from fuxi_torchrec.sharding import planner
from fuxi_torchrec.sharding.table_choice import TableChoice


def build_distributed(
    config: Config, identity: DatasetIdentity, world: World
) -> Tuple[DistributedModelParallel, TableChoice]:
    """Builds the run's model, freshly initialised, with its table replicated or sharded; every rank calls it.

    Initial values don't depend on the sharding. Raises UserError where the table fits no plan.
    """
    check_table(config, world.device.type)
    machine = planner.this_machine(config.table, world.device, world.size)
    # Ranks whose hosts differ by a little memory must not decide differently.
    machine = world.from_main(machine)
    num_items, events = identity.num_items, planner.mean_events(identity)
    choice = planner.choose(config, machine, num_items, events)
    model = build_model(config, num_items, identity.time_unit, world.device, on_meta=choice.is_sharded)
    if not choice.is_sharded:
        return distribute(model, world, ShardingPlan({})), choice
    planner.apply_table_optimizer(model.embeddings, choice, config.optimizer)
    plan, _ = planner.plan_table(model, config, choice, machine, num_items, events)
    model = distribute(model, world, plan)
    for row, column, part in local_parts(model):
        init_rows(part, config.trainer.seed, config.model.embedding_dim, row, column)
    return model, choice


def distribute(model: SequenceRecommender, world: World, plan: ShardingPlan) -> DistributedModelParallel:
    """Wraps the model in DistributedModelParallel; a table that the plan leaves out is replicated."""
    with warnings.catch_warnings():
        # torchrec 1.8 calls DDP with an argument that torch 2.13 renamed; nothing a user could do about it.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=world.device,
            plan=plan,
            sharders=[planner.sharder(world.device.type)] if plan.plan else [],
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








def is_sharded(model: DistributedModelParallel) -> bool:
    """Tells whether the item table is sharded, not replicated."""
    return isinstance(model.module.embeddings, ShardedEmbeddingCollection)


def local_parts(model: DistributedModelParallel) -> List[Tuple[int, int, Tensor]]:
    """Returns this rank's parts of the item table as (first row, first column, float32 values [rows, columns]); the
    values share the table's memory."""
    if not is_sharded(model):
        return [(0, 0, model.module.embeddings.embeddings[TABLE].weight.detach())]
    parts = []
    for shard in _sharded_table(model).local_shards():
        row, column = shard.metadata.shard_offsets
        parts.append((row, column, shard.tensor.detach()))
    return parts


def table_shards(model: DistributedModelParallel) -> Tuple[List[Tuple[int, int, int, int]], Tuple[int, int]]:
    """Returns a sharded table's parts as (rank, first column, rows, columns), and its size (rows, columns)."""
    metadata = _sharded_table(model).metadata()
    shards = []
    for shard in metadata.shards_metadata:
        rank = shard.placement.rank() if shard.placement is not None else None
        assert rank is not None  # a plan gives every part a rank
        rows, columns = shard.shard_sizes
        shards.append((rank, shard.shard_offsets[1], rows, columns))
    rows, columns = metadata.size
    return shards, (rows, columns)


def _sharded_table(model: DistributedModelParallel) -> ShardedTensor:
    return model.module.embeddings.state_dict()[f"embeddings.{TABLE}.weight"]
