"""Which users a rank gets in an epoch, in which order, and how a global batch is shared, so that no rank keeps the others
waiting. A step takes as long as its slowest rank, and users' lengths differ.

A data set within one shuffle buffer is read by every rank, and each global batch is assigned user by user. Of a larger one
each rank reads its own row groups; then the order inside a buffer is what makes the ranks' batches alike.

Shape suffix: U users.
"""

from dataclasses import asdict, dataclass, replace
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, TypeVar

import numpy as np

from fuxi_torchrec.data.dataset import RowGroup


@dataclass(frozen=True)
class StreamCursor:
    """Where a training stream is: `taken` users of buffer `buffer` of epoch `epoch` are behind it, after `step` batches
    in all (the step decides the negatives)."""

    epoch: int = 0
    buffer: int = 0
    taken: int = 0
    step: int = 0

    def to_dict(self) -> Dict[str, int]:
        """Returns the fields as plain values, for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """Rows [begin, end) of a row group: all of it, or a part where two ranks meet in it."""

    group: RowGroup
    begin: int
    end: int

    @property
    def users(self) -> int:
        """Number of rows, each a user."""
        return self.end - self.begin

    def cut(self, low: int, high: int) -> "Rows":
        """Returns the rows [low, high) of these."""
        return replace(self, begin=self.begin + low, end=self.begin + high)


def whole_groups(groups: Iterable[RowGroup]) -> List[Rows]:
    """Takes all rows of some row groups, in their order."""
    return [Rows(group, 0, group.num_rows) for group in groups]


@dataclass(frozen=True)
class Buffer:
    """Users that are shuffled together, in an order that `key` decides; of that order [begin, end) are this buffer's.
    `shared`: every rank has the same buffer and takes its part of each global batch."""

    rows: Tuple[Rows, ...]
    key: Tuple[int, ...]
    begin: int
    end: int
    shared: bool = False

    @property
    def users(self) -> int:
        """Number of users."""
        return max(self.end - self.begin, 0)

    def cut(self, low: int, high: int) -> "Buffer":
        """Returns the users [low, high) of these, in the same order."""
        return replace(self, begin=self.begin + low, end=self.begin + high)


Piece = TypeVar("Piece", Rows, Buffer)


def assign_epoch(
    rows: Sequence[Rows], epoch: int, earlier_cursors: Sequence[Sequence[StreamCursor]], ranks: int, buffer_users: int
) -> List[List[Buffer]]:
    """Assigns an epoch's users to the ranks, as buffers of each, or what is left of them where other worlds began the
    epoch.

    Args:
        rows: the epoch's row groups, in its order.
        earlier_cursors: the cursors at which the ranks of each earlier world ended in this epoch.
        buffer_users: shuffle_buffer.
    """
    users = sum(piece.users for piece in rows)
    if users <= buffer_users:
        taken = max((cursor.taken for world in earlier_cursors for cursor in world), default=0)
        return [[Buffer(tuple(rows), (epoch, 0, 0), taken, users, shared=True)]] * ranks
    resumed: List[Buffer] = []
    for reshard_count, cursors in enumerate(earlier_cursors):
        resumed, rows = _unfinished(_assign(rows, resumed, len(cursors), epoch, reshard_count, buffer_users), cursors)
    return _assign(rows, resumed, ranks, epoch, len(earlier_cursors), buffer_users)


def _assign(
    rows: Sequence[Rows], resumed: Sequence[Buffer], ranks: int, epoch: int, reshard_count: int, buffer_users: int
) -> List[List[Buffer]]:
    """Assigns buffers to every rank: first those that an earlier world had begun, in their old order, then new ones."""
    assigned = cut_evenly(resumed, ranks)
    for rank, shard in enumerate(cut_evenly(rows, ranks)):
        for number, part in enumerate(_buffers(shard, buffer_users)):
            # A later assignment draws other orders than the first, whose ranks and numbers it would repeat.
            key = (epoch, rank, number, reshard_count) if reshard_count else (epoch, rank, number)
            assigned[rank].append(Buffer(tuple(part), key, 0, sum(piece.users for piece in part)))
    return assigned


def cut_evenly(pieces: Sequence[Piece], ranks: int) -> List[List[Piece]]:
    """Lays the pieces' users end to end and cuts that line into equally long parts: only a piece at a cut is shared."""
    ends = np.cumsum([piece.users for piece in pieces], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    assigned: List[List[Piece]] = []
    for rank in range(ranks):
        low, high = total * rank // ranks, total * (rank + 1) // ranks
        first, last = int(np.searchsorted(ends, low, side="right")), int(np.searchsorted(ends, high, side="left"))
        shard = []
        for piece, end in zip(pieces[first : last + 1], ends[first : last + 1].tolist()):
            begin = end - piece.users
            if max(low, begin) < min(high, end):
                shard.append(piece.cut(max(low, begin) - begin, min(high, end) - begin))
        assigned.append(shard)
    return assigned


def _buffers(rows: Sequence[Rows], users: int) -> List[List[Rows]]:
    """Runs of row groups, each closed once it holds `users` users."""
    parts: List[List[Rows]] = []
    held = users
    for piece in rows:
        if held >= users:
            parts.append([])
            held = 0
        parts[-1].append(piece)
        held += piece.users
    return parts


def _unfinished(assigned: Sequence[Sequence[Buffer]], cursors: Sequence[StreamCursor]) -> Tuple[List[Buffer], List[Rows]]:
    """Finds what the ranks of an earlier world left: buffers that they had begun, and untouched row groups."""
    resumed: List[Buffer] = []
    rows: List[Rows] = []
    for buffers, cursor in zip(assigned, cursors):
        for number in range(cursor.buffer, len(buffers)):
            buffer = buffers[number]
            taken = max(buffer.begin, cursor.taken if number == cursor.buffer else 0)
            whole = sum(piece.users for piece in buffer.rows)
            if (taken, buffer.end) == (0, whole):
                rows += buffer.rows
            elif taken < buffer.end:
                resumed.append(replace(buffer, begin=taken))
    return resumed, rows


def even_order(lengths_U: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws a random order in which any run of users has about the mean length, so that ranks that know nothing of
    each other have batches alike; int64 [U].

    Sorted by length, users are visited as a van der Corput sequence with Owen's scrambling visits [0, 1): every aligned
    run of 2^k users has one of each of the 2^k quantiles of length (Owen 1995, base 2).
    """
    cells = np.zeros(1, dtype=np.int64)
    while len(cells) < len(lengths_U):
        # The next as many users fall into the other half of the cell of those before them.
        flips = random.integers(0, 2, len(cells))
        cells = np.concatenate([2 * cells + flips, 2 * cells + 1 - flips])
    quantile_U = np.argsort(np.argsort(cells[: len(lengths_U)]))
    by_length_U = np.lexsort((random.random(len(lengths_U)), lengths_U))  # ties in any order
    return by_length_U[quantile_U]


def next_batch(lengths_U: np.ndarray, ranks: int, users: int, tokens: Optional[int]) -> np.ndarray:
    """Chooses the next global batch of an order of users: for each of its first users the rank that takes it, int64.

    Every rank gets at most `users` users and, unless it has a single one, `tokens` tokens.

    Args:
        lengths_U: tokens of the users ahead, at least one.
        tokens: None for no bound.
    """
    end = min(ranks * users, len(lengths_U))
    if tokens is None:
        return _share(lengths_U[:end], ranks)
    ends_U = np.cumsum(lengths_U[:end])
    room = ranks * tokens
    while True:
        end = max(int(np.searchsorted(ends_U, room, side="right")), 1)
        rank_of_user_U = _share(lengths_U[:end], ranks)
        most = np.bincount(rank_of_user_U, weights=lengths_U[:end]).max()
        if most <= tokens or end <= ranks:
            return rank_of_user_U
        room = min(room - int(most - tokens), int(ends_U[end - 1]) - 1)


def _share(lengths_U: np.ndarray, ranks: int) -> np.ndarray:
    """Who takes which user: in rounds from the longest users to the shortest, each rank gets one, the rank with the
    fewest tokens so far the longest. Counts are equal to within one."""
    rank_of_user_U = np.zeros(len(lengths_U), dtype=np.int64)
    if ranks == 1:
        return rank_of_user_U
    by_length_U = np.argsort(-lengths_U, kind="stable")
    tokens_R = np.zeros(ranks, dtype=np.int64)
    for begin in range(0, len(by_length_U), ranks):
        round_U = by_length_U[begin : begin + ranks]
        ranks_of_round = np.argsort(tokens_R, kind="stable")[: len(round_U)]
        rank_of_user_U[round_U] = ranks_of_round
        tokens_R[ranks_of_round] += lengths_U[round_U]
    return rank_of_user_U
