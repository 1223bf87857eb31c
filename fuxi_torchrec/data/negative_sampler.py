"""Negative samplers. They run while a batch is collated, so that a pipeline can start the exchange of ids early.

Draws are with replacement, uniform or by frequency^alpha, and a function of (seed, rank, step) and the batch alone:
nothing about them has to be saved for a run to go on exactly where it was.

Shape suffixes: T positions, K negatives a position, U ids to look up, N in-batch items, P candidates (the U ids, then
the N in-batch items), V catalogue.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from fuxi_torchrec.config import DataConfig, LossConfig
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.item_counts import Ranks, count_training_events, narrowed
from fuxi_torchrec.data.item_distribution import ItemDistribution

# Up to this many items a draw, unique ids are found by marking them in a table of the catalogue's size, beyond by sorting:
# about where the two take the same time, so that no step costs more for a larger catalogue.
MARKED_ITEMS = 16
# With this many draws an item or more, nearly every item is drawn: all are looked up, and no unique ids are sought.
FEW_ITEMS = 4


@dataclass(frozen=True)
class PerTokenNegatives:
    """A set of negatives for each token (loss.negatives: per_token).

    index_TK: int32 rows of the ids that are looked up.
    positive_index_T: int64 row among them that is the position's own positive, −1 where none is.
    expected_draws_U: float32, how often each id is expected among a position's draws: K · q(id); None without loss.log_q.
    """

    index_TK: Tensor
    positive_index_T: Tensor
    expected_draws_U: Optional[Tensor] = None


@dataclass(frozen=True)
class InBatchItems:
    """The positives that serve as candidates of all tokens, each item once.

    They are looked up as events already, so that they cost no exchange.

    index_N: int64 positions whose positives they are.
    kept: part of the batch's distinct positives that they are (loss.max_in_batch).
    item_share_P: float32, each candidate's part of the training events, add-one smoothed: how likely a position's
        positive is to be it. None without loss.log_q.
    """

    index_N: Tensor
    kept: float = 1.0
    item_share_P: Optional[Tensor] = None


@dataclass(frozen=True)
class SharedNegatives:
    """What all tokens share as candidates: the ids that are looked up, in drawing order (shared, mixed, full), and
    in-batch items (in_batch, mixed).

    expected_draws_P: float32, how often each candidate is expected among this rank's draws: Σ count · q(candidate);
        None without loss.log_q.
    """

    in_batch: Optional[InBatchItems] = None
    expected_draws_P: Optional[Tensor] = None


Negatives = Union[PerTokenNegatives, SharedNegatives]


class Sampled(NamedTuple):
    """What a batch's sampling gave: ids_U, int64 ids to look up (each once, but for a pool, which is in drawing order;
    none for in_batch), and how positions are set against them."""

    ids_U: Tensor
    negatives: Negatives


class NegativeSampler:
    """Draws a batch's negatives: `sample(positives, step)`.

    Args:
        config: kinds and numbers.
        num_items: V.
        seed, rank: with the step they decide the draws.
        frequency_V: items' training frequency, where `training_frequency` says that the config needs it.
    """

    def __init__(
        self,
        config: LossConfig,
        num_items: int,
        seed: int,
        rank: int = 0,
        frequency_V: Optional[np.ndarray] = None,
    ):
        self.config, self.num_items, self.seed, self.rank = config, num_items, seed, rank
        self.distribution = ItemDistribution(num_items, frequency_V, config.sampling_alpha)
        # Each position's positive is taken for a draw from this, when in-batch items are weighed.
        self.positives = ItemDistribution(num_items, frequency_V, 1.0) if _weighs_in_batch(config) else None

    def sample(self, positive_ids_T: np.ndarray, step: int) -> Sampled:
        """Draws the negatives of a step. positive_ids_T: int64, the tokens' positives."""
        generator = np.random.default_rng([self.seed, self.rank, step])
        if self.config.negatives == "full":
            return Sampled(torch.arange(self.num_items), SharedNegatives())
        if self.config.negatives == "per_token":
            return self._per_token(generator, positive_ids_T)
        return self._shared(generator, positive_ids_T, step)

    def _per_token(self, generator: np.random.Generator, positive_ids_T: np.ndarray) -> Sampled:
        dtype = np.int32 if self.num_items <= np.iinfo(np.int32).max else np.int64
        drawn_TK = self.distribution.draw(generator, (len(positive_ids_T), self.config.num_negatives), dtype)
        ids_U, index_TK, positive_T = np.arange(self.num_items), drawn_TK, positive_ids_T
        if self.num_items > drawn_TK.size // FEW_ITEMS:
            ids_U, index_TK, positive_T = _unique(drawn_TK, positive_ids_T, self.num_items)
        draws_U = self._expected_draws(ids_U) if self.config.log_q else None
        return Sampled(
            torch.from_numpy(ids_U),
            PerTokenNegatives(torch.from_numpy(index_TK), torch.from_numpy(positive_T), draws_U),
        )

    def draw_pool(self, generator: np.random.Generator, step: int) -> np.ndarray:
        """Draws the candidates that all positions share, int64; none for in_batch."""
        if self.config.negatives == "in_batch":
            return np.zeros(0, dtype=np.int64)
        pool = self.distribution.draw(generator, self.config.num_negatives, np.int64)
        if not self.config.uniform_negatives:
            return pool
        uniform = generator.integers(0, self.num_items, self.config.uniform_negatives, dtype=np.int64)
        return np.concatenate([pool, uniform])

    def _shared(self, generator: np.random.Generator, positive_ids_T: np.ndarray, step: int) -> Sampled:
        ids_U, in_batch = self.draw_pool(generator, step), None
        ids_P = ids_U
        if self.config.negatives != "shared":
            in_batch = self._in_batch(generator, positive_ids_T)
            ids_P = np.concatenate([ids_U, positive_ids_T[in_batch.index_N.numpy()]])
        if not self.config.log_q:
            return Sampled(torch.from_numpy(ids_U), SharedNegatives(in_batch))
        if in_batch is not None:
            assert self.positives is not None
            shares_P = torch.from_numpy(self.positives.probability(ids_P)).float()
            in_batch = replace(in_batch, item_share_P=shares_P)
        return Sampled(torch.from_numpy(ids_U), SharedNegatives(in_batch, self._expected_draws(ids_P)))

    def _in_batch(self, generator: np.random.Generator, positive_ids_T: np.ndarray) -> InBatchItems:
        index_N = np.unique(positive_ids_T, return_index=True)[1]
        distinct, most = len(index_N), self.config.max_in_batch
        if most is None or distinct <= most:
            return InBatchItems(torch.from_numpy(index_N))
        index_N = np.sort(generator.choice(index_N, most, replace=False))
        return InBatchItems(torch.from_numpy(index_N), most / distinct)

    def _expected_draws(self, ids_P: np.ndarray) -> Tensor:
        """What the logQ correction needs to know of every candidate: how often it is drawn on average."""
        drawn = 0 if self.config.negatives == "in_batch" else self.config.num_negatives
        draws_P = drawn * self.distribution.probability(ids_P) + self.config.uniform_negatives / self.num_items
        return torch.from_numpy(draws_P).float()


def training_frequency(
    loss: LossConfig, data: DataConfig, dataset: SequenceDataset, ranks: Ranks
) -> Optional[np.ndarray]:
    """Counts the training events of each item [V], where the config's sampler needs them; else None, and nothing is
    read.

    items.parquet's frequency leaves out what leave_one_out tests on; the events of another split are counted, by all ranks
    together.
    """
    if loss.sampling_alpha == 0 and not _weighs_in_batch(loss):
        return None
    if data.split == "leave_one_out":
        return narrowed(dataset.frequencies())
    return count_training_events(dataset, data, ranks, whole_histories=True)


def _weighs_in_batch(config: LossConfig) -> bool:
    return config.log_q and config.negatives in ("in_batch", "mixed")


def _unique(
    drawn_TK: np.ndarray, positive_ids_T: np.ndarray, num_items: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unique ids in ascending order, and where each drawn id and each positive stands among them."""
    if num_items <= MARKED_ITEMS * drawn_TK.size:
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
    return ids_U.astype(np.int64), index_TK, positive_T
