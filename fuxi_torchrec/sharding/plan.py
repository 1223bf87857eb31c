"""The item table's shards: which rectangles a plan cuts it into, what they take, and the plan as it is kept in every
checkpoint."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Dict, List, Tuple, Union

from torchrec.distributed.types import ShardingPlan

from fuxi_torchrec.model.recommender import TABLE
from fuxi_torchrec.sharding.memory_estimate import FLOAT_BYTES
from fuxi_torchrec.sharding.table_choice import TableChoice

PLAN_FILE = "sharding_plan.json"


@dataclass(frozen=True)
class Shard:
    """A rectangle of the table on a rank."""

    rank: int
    row: int
    column: int
    rows: int
    columns: int

    @property
    def table_bytes(self) -> int:
        """Bytes of the rectangle's float32 values."""
        return self.rows * self.columns * FLOAT_BYTES

    def optimizer_bytes(self, optimizer: str) -> int:
        """Returns the bytes of table.optimizer's state for this rectangle. Raises KeyError for one that trains no
        sharded table."""
        cells = self.rows * self.columns
        floats = {"rowwise_adagrad": self.rows, "adagrad": cells, "adam": 2 * cells, "adamw": 2 * cells}
        return floats[optimizer] * FLOAT_BYTES


def planned_shards(plan: ShardingPlan) -> Tuple[List[Shard], str]:
    """Reads a sharded table's rectangles, and the name of its sharding, from TorchRec's plan."""
    table = plan.plan["embeddings"][TABLE]
    shards = [
        Shard(part.placement.rank(), *part.shard_offsets, *part.shard_sizes) for part in table.sharding_spec.shards
    ]
    return shards, table.sharding_type


def replicated_shards(num_items: int, width: int, world_size: int) -> List[Shard]:
    """Makes one rectangle a rank, each the whole table."""
    return [Shard(rank, 0, 0, num_items, width) for rank in range(world_size)]


def plan_record(plan: ShardingPlan, choice: TableChoice, num_items: int, width: int, world_size: int) -> str:
    """Writes down a plan as the JSON text of sharding_plan.json: how a run's table is cut, over which ranks, what
    trains it, and the bytes that a shard's rows and their optimizer state take.

    Args:
        plan: DistributedModelParallel's; empty where the table is replicated.
        choice: what tables.choose_table made of the config.
    """
    if choice.is_sharded:
        shards, sharding = planned_shards(plan)
        kernel = plan.plan["embeddings"][TABLE].compute_kernel
    else:  # an ordinary parameter under DistributedDataParallel
        shards, sharding, kernel = replicated_shards(num_items, width, world_size), "replicated", "dense"
    sizes = [
        {"table_bytes": shard.table_bytes, "optimizer_bytes": shard.optimizer_bytes(choice.optimizer)}
        for shard in shards
    ]
    table = {
        "rows": num_items,
        "columns": width,
        "dtype": "float32",
        "sharding": sharding,
        "compute_kernel": kernel,
        "optimizer": choice.optimizer,
        "ranks": sorted({shard.rank for shard in shards}),
        "shards": [{**dataclasses.asdict(shard), **size} for shard, size in zip(shards, sizes)],
    }
    return json.dumps({"world_size": world_size, "tables": {TABLE: table}}, indent=1) + "\n"


def optimizer_identity(plan: ShardingPlan, choice: TableChoice) -> Dict[str, Union[int, str]]:
    """Names what must be the same for a checkpoint's optimizer state to be taken over, as {the name a user knows it
    by: its value}. Where the state lies doesn't matter, but row-wise Adagrad keeps a number for every part that a row
    is cut into."""
    parts = 1
    if choice.optimizer == "rowwise_adagrad":
        parts = len({shard.column for shard in planned_shards(plan)[0]})
    return {"table.optimizer": choice.optimizer, "the number of parts that columns are cut into": parts}
