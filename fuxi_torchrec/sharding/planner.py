"""Where the item table's rows or columns go: TorchRec's EmbeddingShardingPlanner with the run's real numbers.

The planner's own defaults (32 GB, batch 512, one id a sample) mislead; it is given the memory, the batch, and how many
ids an average user brings. Nothing here needs a process group, so a cluster that one doesn't have can be planned too.
"""

import os
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple, Union

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.optim import RowWiseAdagrad

from fuxi_torchrec.config import Config, OptimizerConfig, TableConfig
from fuxi_torchrec.data.batch import EVENTS, NEGATIVES
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.distributed.private_api import apply_optimizer_in_backward, best_plan
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.model.recommender import TABLE
from fuxi_torchrec.sharding import memory_estimate
from fuxi_torchrec.sharding.table_choice import TableChoice, choose_table

GIB = 1 << 30
BYTES_PER_MS = 10**6  # of 10^9 bytes a second
# Of a rank's memory, left at least to the encoder, its activations, the loss, and what the allocator loses.
RESERVED_PART = 0.15
SHARDINGS = ("row_wise", "table_wise", "column_wise")
OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class Machine:
    """What a rank has: memories in bytes (hbm 0 on a CPU), how many ranks there are, in all and on a host, and what a
    rank exchanges within and between hosts, 10^9 bytes a second (None: TorchRec's defaults)."""

    device_type: str
    hbm: int
    ddr: int
    world_size: int
    local_world_size: int
    intra_host_gb_s: Optional[float] = None
    inter_host_gb_s: Optional[float] = None

    @property
    def memory(self) -> int:
        """Bytes of the memory that the table lives in."""
        return self.hbm if self.device_type == "cuda" else self.ddr

    def topology(self, reserved: int = 0) -> Topology:
        """Describes the machine to TorchRec's planner, with `reserved` bytes of each rank kept from it."""
        hbm, ddr = (max(self.hbm - reserved, 0), self.ddr) if self.hbm else (0, max(self.ddr - reserved, 0))
        given = {"intra_host_bw": self.intra_host_gb_s, "inter_host_bw": self.inter_host_gb_s}
        return Topology(
            world_size=self.world_size,
            local_world_size=self.local_world_size,
            compute_device=self.device_type,
            hbm_cap=hbm,
            ddr_cap=ddr,
            **{name: speed * BYTES_PER_MS for name, speed in given.items() if speed is not None},
        )


def this_machine(table: TableConfig, device: torch.device, world_size: int) -> Machine:
    """Describes the machine that this process runs on; table.hbm_gb and table.ddr_gb override what it says of itself."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    ddr = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if table.hbm_gb is not None and device.type == "cuda":
        hbm = int(table.hbm_gb * GIB)
    if table.ddr_gb is not None:
        ddr = int(table.ddr_gb * GIB)
    return Machine(device.type, hbm, ddr, world_size, local, table.intra_host_gb_s, table.inter_host_gb_s)


def mean_events(identity: DatasetIdentity) -> float:
    """Divides the data set's events by its users."""
    return identity.num_events / max(identity.num_users, 1)


def choose(config: Config, machine: Machine, num_items: int, events: float) -> TableChoice:
    """Chooses the table's sharding and optimizer for the memory that a batch leaves. Raises UserError as
    table_choice.choose_table does."""
    return choose_table(config, num_items, machine.memory - batch_bytes(config, machine, num_items, events), events)


def apply_table_optimizer(embeddings: nn.Module, choice: TableChoice, optimizer: OptimizerConfig) -> None:
    """Marks the (unsharded) table, so that its shards are updated inside backward. Changes no value."""
    settings: Dict[str, Union[float, Tuple[float, ...]]] = {"lr": choice.learning_rate, "eps": 1e-8}
    if choice.optimizer == "adam":
        settings["betas"] = tuple(optimizer.betas)
    apply_optimizer_in_backward(OPTIMIZERS[choice.optimizer], embeddings.parameters(), settings, register_hook=False)


def sharder(device_type: str) -> EmbeddingCollectionSharder:
    """Makes the sharder that tells TorchRec how an embedding collection may be cut."""
    # fbgemm's deduplication of ids before their exchange (jagged_unique_indices) has no CPU kernel.
    return EmbeddingCollectionSharder(use_index_dedup=device_type == "cuda")


def plan_table(
    model: nn.Module, config: Config, choice: TableChoice, machine: Machine, num_items: int, events: float
) -> Tuple[ShardingPlan, List[ShardingOption]]:
    """Plans the sharding of a model whose table is on the meta device. Returns the plan and the planner's own account
    of it.

    Args:
        choice: a sharded one, its optimizer applied by apply_table_optimizer.
        events: mean events of a user.

    Raises:
        UserError: no plan fits into the memory.
    """
    reserved = reserved_bytes(model, config, machine, num_items, events)
    topology = machine.topology(reserved)
    types = [ShardingType[kind.upper()].value for kind in _shardings(choice)]
    width = config.model.embedding_dim
    constraints = ParameterConstraints(
        sharding_types=types,
        compute_kernels=["fused"],
        min_partition=narrowest_part(width, machine.world_size),
        pooling_factors=list(memory_estimate.ids_per_user(config, num_items, events)),
        feature_names=[EVENTS, NEGATIVES],
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=config.data.batch_size,
        constraints={TABLE: constraints},
        storage_reservation=FixedPercentageStorageReservation(0.0),  # it would keep back HBM only, of no CPU's memory
        stats=[],
        debug=False,
    )
    try:
        plan = planner.plan(model, [sharder(machine.device_type)])
    except PlannerError as error:
        raise _does_not_fit(config, machine, num_items, reserved) from error
    return plan, best_plan(planner)


def _shardings(choice: TableChoice) -> Tuple[str, ...]:
    """What the planner may choose among. Row-wise Adagrad trains every part of a row by itself: to cut columns would make
    a run depend on the number of ranks, and its state unfit for another, so only who asks for it by name gets it."""
    if choice.sharding in SHARDINGS:
        return (choice.sharding,)
    return tuple(kind for kind in SHARDINGS if (kind, choice.optimizer) != ("column_wise", "rowwise_adagrad"))


def reserved_bytes(model: nn.Module, config: Config, machine: Machine, num_items: int, events: float) -> int:
    """Computes the bytes of a rank that no table may take: what the encoder and its loss need, and RESERVED_PART of
    the memory at least."""
    return max(round(RESERVED_PART * machine.memory), dense_bytes(model) + batch_bytes(config, machine, num_items, events))


def batch_bytes(config: Config, machine: Machine, num_items: int, events: float) -> int:
    """Estimates the bytes that a rank's batch takes whatever becomes of the table: activations, and the candidates of
    the loss, which are those of all ranks with loss.cross_rank."""
    candidates = memory_estimate.candidate_bytes(config, num_items, events, machine.world_size)
    return memory_estimate.activation_bytes(config, events) + candidates


def dense_bytes(model: nn.Module) -> int:
    """Counts the bytes of the encoder's parameters, their gradient, and AdamW's two moments."""
    own = (p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings"))
    return memory_estimate.ADAMW_COPIES * sum(own) * memory_estimate.FLOAT_BYTES


def narrowest_part(width: int, world_size: int) -> Optional[int]:
    """Finds the fewest columns of a part where a table `width` wide is cut over the ranks by columns: a divisor of
    the width and a multiple of 4, as fbgemm wants it, at least width / world_size. None where there is none."""
    return next((part for part in range(4, width + 1, 4) if width % part == 0 and part * world_size >= width), None)


def _does_not_fit(config: Config, machine: Machine, num_items: int, reserved: int) -> UserError:
    table = num_items * config.model.embedding_dim * memory_estimate.FLOAT_BYTES / GIB
    return UserError(
        f"table.sharding: {config.table.sharding} finds no plan for {num_items:,} items x {config.model.embedding_dim} "
        f"({table:,.1f} GiB with fp32 rows) on {machine.world_size} ranks of {machine.memory / GIB:,.1f} GiB "
        f"(table.{'hbm' if machine.device_type == 'cuda' else 'ddr'}_gb, or the machine's), of which "
        f"{reserved / GIB:,.1f} are kept for encoder, activations and loss; take row_wise, more ranks, a narrower table or a "
        "smaller batch (fuxi-torchrec plan tells)"
    )
