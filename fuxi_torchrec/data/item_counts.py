"""Counts each item's training events: they weigh negatives and logQ, and rank by popularity.

A split is counted in one pass over the data set that the ranks share, and kept for as long as the data set is open; a
resumed run counts again and, since counts are integers, finds the same.

Shape suffixes: V catalogue.
"""

from typing import NamedTuple, Optional, Protocol, Tuple

import numpy as np
import torch
from torch import Tensor

from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.data.batch_sampler import cut_evenly, whole_groups
from fuxi_torchrec.data.dataset import SequenceDataset, ranges
from fuxi_torchrec.data.splits import histories, windows

CHUNK = 2**22
"""Counts that are added up over the ranks at a time: what a device has to hold of them."""


class CountKey(NamedTuple):
    """What decides the counts of a data set: its content, where training ends, and how much of it is counted."""

    content_checksum: str
    split: str
    temporal_cutoffs: Tuple[int, ...]
    max_sequence_length: Optional[int]  # None: whole histories


class Ranks(Protocol):
    """The processes that count together."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def device(self) -> torch.device:
        """Device that sums are taken on."""

    def sum(self, values: Tensor) -> Tensor:
        """Adds up the ranks' values, in place."""


def count_training_events(
    dataset: SequenceDataset, config: DataConfig, ranks: Ranks, whole_histories: bool
) -> np.ndarray:
    """Counts each item's events in the training split. A collective: every rank calls it, and gets all ranks' counts.

    Args:
        whole_histories: count every training event; else those that the model sees, which are the newest
            max_sequence_length + 1 of each user who has at least two.

    Returns:
        [V], int32 where the counts fit; not to be written to.
    """
    length = None if whole_histories else config.max_sequence_length
    key = CountKey(dataset.identity.content_checksum, config.split, tuple(config.temporal_cutoffs or ()), length)
    if key not in dataset.item_counts:
        counts_V = _count_own_users(dataset, config, ranks, whole_histories)
        if ranks.size > 1:
            for start in range(0, len(counts_V), CHUNK):
                chunk = torch.from_numpy(counts_V[start : start + CHUNK])
                chunk.copy_(ranks.sum(chunk.to(ranks.device)))
        dataset.item_counts[key] = narrowed(counts_V)
    return dataset.item_counts[key]


def _count_own_users(dataset: SequenceDataset, config: DataConfig, ranks: Ranks, whole_histories: bool) -> np.ndarray:
    counts_V = np.zeros(dataset.identity.num_items, dtype=np.int64)
    for part in cut_evenly(whole_groups(dataset.row_groups), ranks.size)[ranks.rank]:
        rows = dataset.read(part.group).cut(part.begin, part.end)
        kept = histories(rows, config) if whole_histories else windows(rows, config, "train")
        np.add.at(counts_V, rows.item_ids_E[ranges(kept.start_U, kept.stop_U)], 1)
    return counts_V


def narrowed(counts_V: np.ndarray) -> np.ndarray:
    """Casts counts to int32 where they fit, and makes them read-only."""
    if counts_V.max(initial=0) <= np.iinfo(np.int32).max:
        counts_V = counts_V.astype(np.int32)
    counts_V.setflags(write=False)
    return counts_V
