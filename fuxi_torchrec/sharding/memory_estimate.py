"""What a step looks up, keeps and sends, counted from the config: bytes of a rank, for the planner and `fuxi-torchrec plan`.

Expectations for users of mean length, items drawn evenly: skewed data repeat items more often and need less. No torch.
"""

import math
from typing import Tuple

from fuxi_torchrec.config import Config, DataConfig, LossConfig

ID_BYTES, FLOAT_BYTES = 8, 4
ADAMW_COPIES = 4  # of a parameter: itself, its gradient, and AdamW's two moments
# Floats kept for backward, per token and block, in widths of the model: measured on no device, an upper guess.
KEPT_WIDTHS = 24
# A logit of a chunk of the loss, its exponential and a mask.
LOGIT_BYTES = 2 * FLOAT_BYTES + 1
# Matrices of the candidates' size that are alive at once: forward the embeddings (twice where ranks' counts differ) and
# their gradient, backward the gradient kept, scaled, and laid out for the exchange. Of a rank's own candidates besides:
# the normalised embeddings and the gradient that comes back.
CANDIDATE_COPIES, OWN_COPIES = 3, 2


def positions(data: DataConfig, events: float) -> float:
    """Counts the supervised tokens of a rank's batch, T. events: mean events of a user, before they are cut to the
    window."""
    return data.batch_size * max(min(events, data.max_sequence_length + 1) - 1, 1)


def ids_per_user(config: Config, num_items: int, events: float) -> Tuple[float, float]:
    """Estimates the ids that an average user of a batch looks up: (events, negatives)."""
    events = min(events, config.data.max_sequence_length + 1)
    # In-batch negatives are events; a pool is looked up besides.
    draws = float(_pool(config.loss, num_items))
    if config.loss.negatives == "per_token":
        # Each drawn id is looked up once.
        draws = distinct(config.loss.num_negatives * positions(config.data, events), num_items)
    return events, draws / config.data.batch_size


def distinct(draws: float, num_items: int) -> float:
    """Expects this number of different items among draws with replacement, all items equally likely; no other
    distribution has more."""
    return num_items * -math.expm1(draws * math.log1p(-1 / num_items)) if num_items > 1 else 1.0


def activation_bytes(config: Config, events: float) -> int:
    """Guesses the bytes of the encoder's activations that a rank keeps for backward."""
    width = config.model.embedding_dim
    return round(KEPT_WIDTHS * positions(config.data, events) * width * config.model.num_blocks * FLOAT_BYTES)


def candidates(config: Config, num_items: int, events: float) -> float:
    """Estimates how many candidates a rank itself offers to its loss."""
    if config.loss.negatives == "per_token":
        return ids_per_user(config, num_items, events)[1] * config.data.batch_size
    in_batch = 0.0
    if config.loss.negatives in ("in_batch", "mixed"):
        in_batch = distinct(positions(config.data, events), num_items)
        in_batch = min(in_batch, config.loss.max_in_batch or math.inf)
    return _pool(config.loss, num_items) + in_batch


def candidate_bytes(config: Config, num_items: int, events: float, world_size: int) -> int:
    """Estimates the memory of the loss in bytes: the candidates that a rank's tokens are compared with (those of all
    ranks with loss.cross_rank), their gradient, and a chunk of logits."""
    own, row = candidates(config, num_items, events), config.model.embedding_dim * FLOAT_BYTES
    count = own * world_size if config.loss.cross_rank else own
    logits = max(config.loss.chunk_logits, round(count)) * LOGIT_BYTES  # a chunk is one position at least
    drawn = 0.0
    if config.loss.negatives == "per_token":  # which of them each position has drawn
        drawn = positions(config.data, events) * config.loss.num_negatives * FLOAT_BYTES
    return round(own * OWN_COPIES * row + count * (CANDIDATE_COPIES * row + ID_BYTES) + drawn) + logits


def candidate_traffic_bytes(config: Config, num_items: int, events: float, world_size: int) -> int:
    """Estimates the bytes that a rank sends and receives a step for loss.cross_rank: every rank's candidates go to
    all, forward with their ids and what logQ needs to know of them, and their gradients come back. 0 without it."""
    if not config.loss.cross_rank:
        return 0
    row = 2 * config.model.embedding_dim * FLOAT_BYTES + ID_BYTES
    if config.loss.log_q:
        row += FLOAT_BYTES * (2 if config.loss.negatives in ("in_batch", "mixed") else 1)
    return round(2 * (world_size - 1) * candidates(config, num_items, events) * row)


def _pool(loss: LossConfig, num_items: int) -> int:
    if loss.negatives in ("in_batch", "full"):
        return num_items if loss.negatives == "full" else 0
    return loss.num_negatives + loss.uniform_negatives
