"""Random users in memory, in MovieLens' shape: what steps are timed on where a file would only be in the way."""

import numpy as np

from fuxi_torchrec.data.dataset import RowGroup, SequenceDataset, UserRows
from fuxi_torchrec.data.format import DatasetIdentity

SHORTEST = 20  # as in MovieLens, whose users have at least 20 events
FIRST_SECOND = 978_300_000  # of ML-1M
LONGEST_GAP = 5000


def random_lengths(longest: int, tokens: int, seed: int) -> np.ndarray:
    """Draws the lengths of users who have `tokens` events together, int64: log-normal with a median of half the
    longest and σ = 1, between SHORTEST and `longest`, which the first user has; the last user takes what is left.
    `tokens` are at least `longest`. (ML-1M cut at 200: median 96.)"""
    generator, lengths, left = np.random.default_rng([seed, longest]), [longest], tokens - longest
    while left > 0:
        drawn = int(np.exp(generator.normal(np.log(longest / 2), 1.0)))
        lengths.append(min(left, max(min(SHORTEST, longest), min(drawn, longest))))
        left -= lengths[-1]
    return np.array(lengths, dtype=np.int64)


class MemoryDataset(SequenceDataset):
    """A SequenceDataset of one row group, in memory.

    Args:
        lengths_B: int64 events of every user.
        item_ids_E: int64, 0 … num_items − 1.
        timestamps_E: int64 seconds, ascending within a user.
    """

    def __init__(self, lengths_B: np.ndarray, item_ids_E: np.ndarray, timestamps_E: np.ndarray, num_items: int):
        users = len(lengths_B)
        offsets_U1 = np.concatenate([[0], lengths_B.cumsum()])
        self.folder = ""
        self.rows = UserRows(np.arange(users), offsets_U1, item_ids_E, timestamps_E)
        self.identity = DatasetIdentity(
            name="memory",
            num_users=users,
            num_items=num_items,
            num_events=len(item_ids_E),
            catalogue="all",
            time_unit=1.0,
            min_timestamp=int(timestamps_E.min()),
            max_timestamp=int(timestamps_E.max()),
            max_events_per_user=int(lengths_B.max()),
            source="memory",
            source_checksum="",
            content_checksum="",
        )
        self.row_groups = [RowGroup("memory", 0, users)]

    def read(self, group: RowGroup, log_probs: bool = False) -> UserRows:
        """Returns all users, whichever row group is asked for."""
        return self.rows


def random_dataset(longest: int, tokens: int, items: int, seed: int) -> MemoryDataset:
    """Draws users whose training inputs have `random_lengths`; each has two events more, a first target and the
    tested one."""
    lengths_B = random_lengths(longest, tokens, seed) + 2
    generator, events = np.random.default_rng([seed, longest, 1]), int(lengths_B.sum())
    times_E = FIRST_SECOND + generator.integers(0, LONGEST_GAP, events).cumsum()
    return MemoryDataset(lengths_B, generator.integers(0, items, events), times_E, items)
