"""Streams of batches. What comes next is a function of (seed, epoch, rank, cursor), so a cursor resumes exactly.

An epoch shuffles the row groups, assigns them to the ranks, and shuffles the users inside buffers of row groups
(batch_sampler.py). Only the current buffer is in memory; a cursor is (epoch, buffer, users already taken of it). What is left
of an epoch can be assigned again to another number of ranks: no user is seen twice, and none is left out.
"""

from dataclasses import replace
from typing import Iterable, Iterator, List, Tuple

import numpy as np

from fuxi_torchrec.config import Config, DataConfig
from fuxi_torchrec.data.batch import SequenceBatch, collate
from fuxi_torchrec.data.batch_sampler import (
    Buffer,
    StreamCursor,
    assign_epoch,
    cut_evenly,
    even_order,
    next_batch,
    whole_groups,
)
from fuxi_torchrec.data.dataset import SequenceDataset, UserRows, concatenate
from fuxi_torchrec.data.negative_sampler import NegativeSampler
from fuxi_torchrec.data.splits import Windows, windows
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject

# What decides the order of an epoch's users, and which users it has.
EPOCH_ORDER = (
    ("trainer", "seed"),
    ("data", "shuffle_buffer"),
    ("data", "max_sequence_length"),
    ("data", "split"),
    ("data", "temporal_cutoffs"),
)


def check_same_order(where: str, state: JsonObject, config: Config) -> None:
    """Raises UserError, naming the key, where an epoch would go on in another order than it was begun in: users would be
    seen twice, others not at all. Between epochs the order may change.

    Args:
        where: named in the message.
        state: a checkpoint's, with the "config" that it was made under.
        config: the one to go on with.
    """
    cursors = [StreamCursor(**cursor) for cursor in state["positions"]]
    if not is_inside_epoch(cursors):
        return
    for section, key in EPOCH_ORDER:
        was, wanted = state["config"][section].get(key), getattr(getattr(config, section), key)
        if was != wanted:
            raise UserError(
                f"{where}: {section}.{key} was {was} when epoch {cursors[0].epoch + 1} was begun, not {wanted}; in the "
                "middle of an epoch that would leave users out and train on others twice: change it at an epoch's end"
            )


def is_inside_epoch(cursors: Iterable[StreamCursor]) -> bool:
    """Tells whether any rank has taken a user of the epoch."""
    return any(cursor.buffer or cursor.taken for cursor in cursors)


def cursor_after(state: JsonObject, rank: int, world_size: int) -> Tuple[StreamCursor, List[List[StreamCursor]]]:
    """Finds the resume point of one rank: its cursor, and the epoch's earlier assignments.

    At the same world size each rank takes its own cursor back; at another, in the middle of an epoch, every rank starts on a
    new assignment of the users that are left.

    Args:
        state: a checkpoint's, with "positions" (the cursors of all ranks) and "deals" (those of earlier worlds).
    """
    cursors = [StreamCursor(**cursor) for cursor in state["positions"]]
    earlier_cursors = [[StreamCursor(**cursor) for cursor in world] for world in state["deals"]]
    epoch = cursors[0].epoch
    earlier_cursors = [world for world in earlier_cursors if world[0].epoch == epoch]
    if len(cursors) == world_size or not is_inside_epoch(cursors):
        return cursors[rank % len(cursors)], earlier_cursors
    return StreamCursor(epoch=epoch, step=cursors[0].step), [*earlier_cursors, cursors]


class TrainingStream:
    """The training split's batches, resumable at any of them.

    Args:
        dataset, config: what is read and how it is batched.
        sampler: draws the negatives at collation.
        seed: decides the order.
        rank, world_size: whose part of the epoch it is.

    Attributes:
        earlier_cursors: the cursors at which the ranks of each earlier world ended in the current epoch.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        config: DataConfig,
        sampler: NegativeSampler,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.config, self.sampler, self.seed = dataset, config, sampler, seed
        self.rank, self.world_size = rank, world_size
        self.earlier_cursors: List[List[StreamCursor]] = []

    def epoch(self, cursor: StreamCursor) -> Iterator[SequenceBatch]:
        """Yields the batches of the rest of an epoch. No user is dropped: the last batch of a buffer may be smaller
        than the others."""
        buffers = self._buffers(cursor.epoch)
        for number in range(cursor.buffer, len(buffers)):
            buffer = buffers[number]
            rank, ranks = (self.rank, self.world_size) if buffer.shared else (0, 1)
            taken = max(buffer.begin, cursor.taken if number == cursor.buffer else 0)
            rows, users = self._read(buffer)
            lengths_U = users.stop_U - users.start_U - 1
            while taken < len(lengths_U):
                most = self._most_users(buffer, len(lengths_U) - taken)
                rank_of_user_U = next_batch(lengths_U[taken:], ranks, most, self.config.tokens_per_batch)
                mine = users.take(taken + np.flatnonzero(rank_of_user_U == rank))
                taken += len(rank_of_user_U)
                cursor = replace(cursor, buffer=number, taken=taken, step=cursor.step + 1)
                yield collate(rows, mine, self.sampler, step=cursor.step, cursor=cursor)

    def empty_batch(self, cursor: StreamCursor) -> SequenceBatch:
        """Makes a batch without users, with which a rank whose data have ended takes part in a step of the others."""
        nothing = np.zeros(0, dtype=np.int64)
        rows = UserRows(nothing, np.zeros(1, dtype=np.int64), nothing, nothing)
        cursor = replace(cursor, step=cursor.step + 1)
        return collate(rows, Windows(nothing, nothing, nothing), self.sampler, step=cursor.step, cursor=cursor)

    def _buffers(self, epoch: int) -> List[Buffer]:
        """This rank's buffers of an epoch, each of about shuffle_buffer users."""
        order = self._random(epoch).permutation(len(self.dataset.row_groups))
        rows = whole_groups([self.dataset.row_groups[index] for index in order])
        earlier = [world for world in self.earlier_cursors if world[0].epoch == epoch]
        return assign_epoch(rows, epoch, earlier, self.world_size, self.config.shuffle_buffer)[self.rank]

    def _read(self, buffer: Buffer) -> Tuple[UserRows, Windows]:
        """A buffer's events, and its users in their order."""
        rows = concatenate([self.dataset.read(part.group).cut(part.begin, part.end) for part in buffer.rows])
        users = windows(rows, self.config, "train")
        random = self._random(*buffer.key)
        lengths_U = users.stop_U - users.start_U
        order = random.permutation(len(lengths_U)) if buffer.shared else even_order(lengths_U, random)
        return rows, users.take(order[: buffer.end])

    def _most_users(self, buffer: Buffer, left: int) -> int:
        """Users of the next batch where no token budget ends it. A rank's own buffer is cut into equal batches, as the
        other ranks' buffers end at other steps, where a small last batch would have them wait."""
        batches = -(-left // self.config.batch_size)
        return self.config.batch_size if buffer.shared else -(-left // batches)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


def evaluation_batches(
    dataset: SequenceDataset,
    config: DataConfig,
    split: str,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[SequenceBatch]:
    """Yields every user of a split once; each rank has an even run of the data set's order.

    A batch has no negatives; the target of user b is the last of its events. With world_size > 1 the ranks may have
    different numbers of batches.
    """
    for part in cut_evenly(whole_groups(dataset.row_groups), world_size)[rank]:
        rows = dataset.read(part.group, log_probs=dataset.has_log_probs).cut(part.begin, part.end)
        users = windows(rows, config, split)
        for begin in range(0, len(users.user_ids_U), batch_size):
            yield collate(rows, users.take(slice(begin, begin + batch_size)))
