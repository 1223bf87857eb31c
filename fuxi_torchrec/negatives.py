"""Negative samplers. They run while a batch is collated, so that a pipeline can start the exchange of ids early.

Draws are uniform over the catalogue, with replacement, and a function of (seed, rank, step) alone: nothing about them
has to be saved for a run to go on exactly where it was.
"""

from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from fuxi_torchrec.config import LossConfig

# Up to this many items, unique ids are found by marking them in a table of the catalogue's size; beyond it by sorting.
MARK_LIMIT = 1 << 26
# With this many draws an item or more, nearly every item is drawn: all are looked up, and no unique ids are sought.
FEW_ITEMS = 4


@dataclass
class Negatives:
    """A batch's negatives.

    ids_U: int64 ids to look up, each once: those drawn, or all there are (per_token); or the pool itself, in drawing
        order (shared).
    index_TK: int32 rows of ids_U, a set for each position; None for a shared pool.
    positive_index_T: int64 row of ids_U that is the position's own positive, −1 where none is; None for a shared pool.
    """

    ids_U: Tensor
    index_TK: Optional[Tensor] = None
    positive_index_T: Optional[Tensor] = None


class NegativeSampler:
    """`sample(positives, step)` draws a batch's negatives.

    Args:
        config: kind and number.
        num_items: V.
        seed, rank: with the step they decide the draws.
    """

    def __init__(self, config: LossConfig, num_items: int, seed: int, rank: int = 0):
        self.config, self.num_items, self.seed, self.rank = config, num_items, seed, rank

    def sample(self, positive_ids_T: np.ndarray, step: int) -> Negatives:
        """Draws for the positions' positives (int64 [T]) at a step."""
        generator = np.random.default_rng([self.seed, self.rank, step])
        if self.config.negatives == "shared":
            pool = generator.integers(0, self.num_items, self.config.num_negatives, dtype=np.int64)
            return Negatives(torch.from_numpy(pool))
        dtype = np.int32 if self.num_items <= np.iinfo(np.int32).max else np.int64
        drawn_TK = generator.integers(0, self.num_items, (len(positive_ids_T), self.config.num_negatives), dtype=dtype)
        if self.num_items <= drawn_TK.size // FEW_ITEMS:
            positive_T = torch.from_numpy(positive_ids_T)
            return Negatives(torch.arange(self.num_items), torch.from_numpy(drawn_TK), positive_T)
        return _unique(drawn_TK, positive_ids_T, self.num_items)


def _unique(drawn_TK: np.ndarray, positive_ids_T: np.ndarray, num_items: int) -> Negatives:
    """Unique ids in ascending order, and where each drawn id and each positive stands among them."""
    if num_items <= MARK_LIMIT:
        row_of_item = np.full(num_items, -1, dtype=np.int32)
        row_of_item[drawn_TK.reshape(-1)] = 0
        ids_U = np.flatnonzero(row_of_item == 0)
        row_of_item[ids_U] = np.arange(len(ids_U), dtype=np.int32)
        index_TK = row_of_item[drawn_TK]
        positive_T = row_of_item[positive_ids_T].astype(np.int64)
    else:
        ids_U, inverse = np.unique(drawn_TK, return_inverse=True)
        index_TK = inverse.reshape(drawn_TK.shape).astype(np.int32)
        near_T = np.searchsorted(ids_U, positive_ids_T).clip(max=max(len(ids_U) - 1, 0))
        found_T = ids_U[near_T] == positive_ids_T if len(ids_U) else np.zeros(len(positive_ids_T), dtype=bool)
        positive_T = np.where(found_T, near_T, -1)
    return Negatives(
        torch.from_numpy(ids_U.astype(np.int64)), torch.from_numpy(index_TK), torch.from_numpy(positive_T)
    )
