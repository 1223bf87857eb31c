"""The item table's kind: which sharding and which optimizer a run takes, and the table's initial values.

Rows' initial values are a function of (seed, row) alone: blocks of INIT_ROWS rows have a generator each, so a table
starts the same however it is cut, and no rank makes more of it than its part.
"""

from dataclasses import dataclass

from fuxi_torchrec.config import Config
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.profiling.flops import training_flops
from fuxi_torchrec.sharding.memory_estimate import ADAMW_COPIES, FLOAT_BYTES, candidates, positions

# auto replicates no table whose rows, gradient and two AdamW moments take more than this part of a rank's memory.
SMALL_PART = 0.02
# Nor one over which gradient and AdamW pass, at every step, for more than this part of the step.
CHEAP_PART = 0.1
# A gradient of the whole table is written as zeros, then AdamW reads four arrays and writes three.
DENSE_PASSES = 8
# Floating-point operations of a step's products in the time in which a byte of such a pass goes by. Two CPU cores: 60
# GFLOP/s of a whole step's time, 15 GB/s.
FLOPS_A_BYTE = 4


@dataclass(frozen=True)
class TableChoice:
    """What a run does: sharding as in TableConfig ("auto" there: sharded as the planner likes), the optimizer's name,
    and the table's highest learning rate over that of the dense parameters."""

    sharding: str
    optimizer: str
    learning_rate: float
    rate_ratio: float
    note: str = ""
    """What a user should know of the choice; empty for nothing."""

    @property
    def is_sharded(self) -> bool:
        """Whether the table is cut into parts, rather than copied to every rank."""
        return self.sharding != "replicated"


def dense_part(config: Config, num_items: int, events: float) -> float:
    """Estimates the part of a training step that passes over the whole of a replicated table take.

    Args:
        events: mean events of a user.
    """
    tokens, model = positions(config.data, events), config.model
    lengths = [max(1, round(tokens / config.data.batch_size))] * config.data.batch_size
    compared = config.loss.num_negatives
    if config.loss.negatives != "per_token":
        compared = round(candidates(config, num_items, events))
    step = training_flops(model, lengths, compared) / FLOPS_A_BYTE
    dense = DENSE_PASSES * FLOAT_BYTES * num_items * model.embedding_dim
    return dense / (dense + step)


def choose_table(config: Config, num_items: int, memory: int, events: float) -> TableChoice:
    """Resolves `auto` and the defaults.

    auto is replicated if the optimizer asked for is adamw; sharded if it is another one; and with none asked for,
    replicated if 4 copies (rows, gradient, AdamW's two moments) fit SMALL_PART of a rank's memory, and passing over them
    takes at most CHEAP_PART of a step. A width that fbgemm does not shard is replicated as long as it fits, with a note.

    Args:
        num_items: V.
        memory: bytes of a rank: HBM on a GPU, its share of the host's on a CPU.
        events: mean events of a user.

    Raises:
        UserError: auto must shard, and the width is none that fbgemm shards.
    """
    table, width, note = config.table, config.model.embedding_dim, ""
    sharding = table.sharding
    if sharding == "auto":
        small = ADAMW_COPIES * num_items * width * FLOAT_BYTES <= SMALL_PART * memory
        part = dense_part(config, num_items, events)
        if table.optimizer == "adamw" or (table.optimizer is None and small and part <= CHEAP_PART):
            sharding = "replicated"
        elif table.optimizer is None and small and width % 4:
            sharding = "replicated"
            note = (
                f"table.sharding: auto: about {part:.0%} of a step passes over the whole table of {num_items} items; a "
                f"model.embedding_dim that is a multiple of 4, unlike {width}, would let it be sharded (row_wise)"
            )
        elif width % 4:
            raise UserError(
                f"model.embedding_dim: a table of {num_items} items is to be sharded here, and fbgemm's sharded tables "
                f"need a multiple of 4, not {width}; change it, or take table.sharding=replicated"
            )
    rate = table.learning_rate or config.optimizer.learning_rate
    if sharding == "replicated":
        return TableChoice(sharding, "adamw", config.optimizer.learning_rate, 1.0, note)
    return TableChoice(sharding, table.optimizer or "rowwise_adagrad", rate, rate / config.optimizer.learning_rate)
