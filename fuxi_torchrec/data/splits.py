"""Which of a user's events a split shows and asks for."""

from dataclasses import dataclass
from typing import Union

import numpy as np

from fuxi_torchrec.config import DataConfig, evaluation_splits
from fuxi_torchrec.data.dataset import SequenceDataset, UserRows
from fuxi_torchrec.errors import UserError


@dataclass
class Windows:
    """A window of each kept user, the events [start, stop): the last one is the target of the position before it."""

    user_ids_U: np.ndarray
    start_U: np.ndarray
    stop_U: np.ndarray

    def take(self, index: Union[np.ndarray, slice]) -> "Windows":
        """Picks some users: int64 indices or a slice."""
        return Windows(self.user_ids_U[index], self.start_U[index], self.stop_U[index])


def windows(rows: UserRows, config: DataConfig, split: str) -> Windows:
    """Cuts each user's history to the events that a split shows.

    train: at most the last max_sequence_length + 1 training events. validation, test: the target event, and before it
    at most the last max_sequence_length events of its history. Users left with fewer than two events have nothing to
    predict (or nothing to predict it from) and are left out.
    """
    first_U, end_U = rows.offsets_U1[:-1], rows.offsets_U1[1:]
    stop_U = _stops(rows, config, split, first_U, end_U)
    start_U = np.maximum(first_U, stop_U - config.max_sequence_length - 1)
    kept = np.flatnonzero(stop_U - start_U >= 2)
    return Windows(rows.user_ids_U[kept], start_U[kept], stop_U[kept])


def histories(rows: UserRows, config: DataConfig) -> Windows:
    """Returns all training events of every user, however many or few: what there is to count, where `windows` says
    what is seen."""
    first_U, end_U = rows.offsets_U1[:-1], rows.offsets_U1[1:]
    return Windows(rows.user_ids_U, first_U, np.maximum(first_U, _stops(rows, config, "train", first_U, end_U)))


def _stops(rows: UserRows, config: DataConfig, split: str, first_U: np.ndarray, end_U: np.ndarray) -> np.ndarray:
    if config.split == "leave_one_out":
        return {"train": end_U - 1, "test": end_U}[split]
    if config.split == "leave_two_out":
        return {"train": end_U - 2, "validation": end_U - 1, "test": end_U}[split]
    cutoffs = config.temporal_cutoffs or []
    before = [_count_before(rows, cutoff) + first_U for cutoff in cutoffs]
    if split == "train":
        return before[0]
    # The target is the user's first event of the period; a user without one gets an empty window.
    begin_U = before[-1] if split == "test" else before[0]
    period_end_U = end_U if split == "test" else before[1]
    return np.where(begin_U < period_end_U, begin_U + 1, first_U)


def _count_before(rows: UserRows, cutoff: int) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(rows.timestamps_E < cutoff)])
    return total[rows.offsets_U1[1:]] - total[rows.offsets_U1[:-1]]


def check_splits(dataset: SequenceDataset, config: DataConfig) -> None:
    """Checks that every split has a user, before a run begins; reads on only until each has one. Raises UserError."""
    wanted = {"train", *evaluation_splits(config)}
    for group in dataset.row_groups:
        rows = dataset.read(group)
        wanted = {split for split in wanted if not len(windows(rows, config, split).user_ids_U)}
        if not wanted:
            return
    raise UserError(
        f"{dataset.folder}: no user has two events in the {' and the '.join(sorted(wanted))} split of "
        f"data.split={config.split}; take another split, other cut-offs or more data"
    )
