"""What surely does not fit a rank's memory is refused before anything is allocated: an allocation that the system grants
and cannot keep ends the process without a word."""

from fuxi_torchrec.config import Config, TableConfig
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.profiling.flops import non_embedding_parameters
from fuxi_torchrec.sharding.memory_estimate import ADAMW_COPIES, FLOAT_BYTES, ID_BYTES, positions
from fuxi_torchrec.sharding.planner import GIB, this_machine

SIZES = "model.num_blocks, num_heads, embedding_dim, value_dim, qk_dim, ffn_multiply or padded_length"


def check_training_memory(config: Config, identity: DatasetIdentity, world: World) -> None:
    """Checks the parts that can be told beforehand: the encoder's parameters and the negatives that are drawn.

    Activations, logits and the item table come on top; a run that passes may still run out of memory.

    Raises:
        UserError: one of the parts alone is larger than the memory that a rank has.
    """
    memory = this_machine(TableConfig(), world.device, world.size).memory  # table.ddr_gb is what the planner may count with
    check_memory(config, identity, memory)


def check_memory(config: Config, identity: DatasetIdentity, memory: int) -> None:
    """Checks the same against `memory` bytes of a rank."""
    parameters = non_embedding_parameters(config.model, config.padded_length)
    parameters += config.padded_length * config.model.embedding_dim
    needed: float = ADAMW_COPIES * parameters * FLOAT_BYTES
    if needed > memory:
        raise UserError(
            f"model: {parameters:,} parameters with their gradient and AdamW's moments take {needed / GIB:,.1f} GiB, and a "
            f"rank has {memory / GIB:,.1f}; lower {SIZES} (which data.max_sequence_length sets where it is null)"
        )
    needed = _drawn_bytes(config, identity)
    if needed > memory:
        key = "num_negatives" if config.loss.num_negatives >= config.loss.uniform_negatives else "uniform_negatives"
        raise UserError(
            f"loss.{key}: {getattr(config.loss, key):,} items take {needed / GIB:,.1f} GiB when they are drawn for a batch, "
            f"and a rank has {memory / GIB:,.1f}; lower it, or data.batch_size"
        )


def _drawn_bytes(config: Config, identity: DatasetIdentity) -> float:
    """Bytes of the negatives of a batch: their numbers (int32) for per_token, ids and embeddings for a pool."""
    loss, data = config.loss, config.data
    if loss.negatives == "per_token":
        users = min(1.0, identity.num_users / data.batch_size)  # of those that a batch could hold
        tokens = positions(data, identity.num_events / max(identity.num_users, 1)) * users
        return min(tokens, data.tokens_per_batch or tokens) * loss.num_negatives * FLOAT_BYTES
    if loss.negatives in ("shared", "mixed"):
        return (loss.num_negatives + loss.uniform_negatives) * (ID_BYTES + config.model.embedding_dim * FLOAT_BYTES)
    return 0.0
