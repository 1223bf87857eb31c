"""The item table's kind: which sharding and which optimizer a run takes, and the table's initial values.

Rows' initial values are a function of (seed, row) alone: blocks of INIT_ROWS rows have a generator each, so a table
starts the same however it is cut, and no rank makes more of it than its part.
"""

from dataclasses import dataclass

from fuxi_torchrec.config import Config
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.sharding.memory_estimate import ADAMW_COPIES, FLOAT_BYTES

# auto replicates a table whose rows, gradient and two AdamW moments take at most this part of a rank's memory. Beyond
# it, all-reducing and stepping a gradient of the whole table would outweigh the encoder.
SMALL_PART = 0.02


@dataclass(frozen=True)
class TableChoice:
    """What a run does: sharding as in TableConfig ("auto" there: sharded as the planner likes), the optimizer's name,
    and the table's highest learning rate over that of the dense parameters."""

    sharding: str
    optimizer: str
    learning_rate: float
    rate_ratio: float

    @property
    def is_sharded(self) -> bool:
        """Whether the table is cut into parts, rather than copied to every rank."""
        return self.sharding != "replicated"


def choose_table(config: Config, num_items: int, memory: int) -> TableChoice:
    """Resolves `auto` and the defaults.

    auto is replicated if the optimizer asked for is adamw; sharded if it is another one; and with none asked for,
    replicated if 4 copies (rows, gradient, AdamW's two moments) fit SMALL_PART of a rank's memory.

    Args:
        num_items: V.
        memory: bytes of a rank: HBM on a GPU, its share of the host's on a CPU.

    Raises:
        UserError: auto must shard, and the width is none that fbgemm shards.
    """
    table, width = config.table, config.model.embedding_dim
    sharding = table.sharding
    if sharding == "auto":
        small = ADAMW_COPIES * num_items * width * FLOAT_BYTES <= SMALL_PART * memory
        if table.optimizer == "adamw" or (table.optimizer is None and small):
            sharding = "replicated"
        elif width % 4:
            raise UserError(
                f"model.embedding_dim: a table of {num_items} items is to be sharded here, and fbgemm's sharded tables "
                f"need a multiple of 4, not {width}; change it, or take table.sharding=replicated"
            )
    rate = table.learning_rate or config.optimizer.learning_rate
    if sharding == "replicated":
        return TableChoice(sharding, "adamw", config.optimizer.learning_rate, 1.0)
    return TableChoice(sharding, table.optimizer or "rowwise_adagrad", rate, rate / config.optimizer.learning_rate)
