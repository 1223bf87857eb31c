"""Streams of batches. What comes next is a function of (seed, epoch, rank, position), so a position resumes exactly.

An epoch shuffles the row groups, deals them to the ranks, and shuffles the users inside buffers of whole row groups.
Only the current buffer is in memory; a position is (epoch, buffer, users already taken of it).
"""

import queue
import threading
from dataclasses import asdict, dataclass, replace
from typing import Dict, Iterable, Iterator, List, Optional, TypeVar

import numpy as np

from fuxi_torchrec.batch import SequenceBatch, collate
from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.dataset import RowGroup, SequenceDataset, UserRows, Windows, concatenate, windows
from fuxi_torchrec.negatives import NegativeSampler

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """Where a training stream is: `taken` users of buffer `buffer` of epoch `epoch` are behind it, after `step` batches
    in all (the step decides the negatives)."""

    epoch: int = 0
    buffer: int = 0
    taken: int = 0
    step: int = 0

    def to_dict(self) -> Dict[str, int]:
        return asdict(self)


class TrainingStream:
    """Batches of the training split.

    Args:
        dataset, config: what is read and how it is batched.
        sampler: draws the negatives at collation.
        seed: decides the order.
        rank, world_size: an epoch's shuffled row groups are dealt round robin.
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

    def epoch(self, position: Position) -> Iterator[SequenceBatch]:
        """The rest of an epoch. No user is dropped: the last batch of a buffer may be smaller than the others."""
        buffers = self._buffers(position.epoch)
        for number in range(position.buffer, len(buffers)):
            taken = position.taken if number == position.buffer else 0
            rows = concatenate([self.dataset.read(group) for group in buffers[number]])
            users = windows(rows, self.config, "train")
            users = users.take(self._random(position.epoch, self.rank, number).permutation(len(users.user_ids_U)))
            ends_U = np.cumsum(users.stop_U - users.start_U - 1)
            while taken < len(ends_U):
                end = self._batch_end(ends_U, taken)
                position = replace(position, buffer=number, taken=end, step=position.step + 1)
                batch_users = users.take(slice(taken, end))
                yield collate(rows, batch_users, self.sampler, step=position.step, position=position)
                taken = end

    def empty_batch(self, position: Position) -> SequenceBatch:
        """What a rank without data left contributes while others still have some."""
        nothing = np.zeros(0, dtype=np.int64)
        rows = UserRows(nothing, np.zeros(1, dtype=np.int64), nothing, nothing)
        position = replace(position, step=position.step + 1)
        return collate(rows, Windows(nothing, nothing, nothing), self.sampler, step=position.step, position=position)

    def _buffers(self, epoch: int) -> List[List[RowGroup]]:
        """This rank's row groups in the epoch's order, cut into buffers of about shuffle_buffer users."""
        groups = self.dataset.row_groups
        order = self._random(epoch).permutation(len(groups))
        buffers: List[List[RowGroup]] = []
        users = self.config.shuffle_buffer
        for index in order[self.rank :: self.world_size]:
            if users >= self.config.shuffle_buffer:
                buffers.append([])
                users = 0
            buffers[-1].append(groups[index])
            users += groups[index].num_rows
        return buffers

    def _batch_end(self, ends_U: np.ndarray, begin: int) -> int:
        end = min(begin + self.config.batch_size, len(ends_U))
        if self.config.tokens_per_batch is not None:
            before = ends_U[begin - 1] if begin else 0
            fitting = int(np.searchsorted(ends_U, before + self.config.tokens_per_batch, side="right"))
            end = min(end, max(fitting, begin + 1))
        return end

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
    """Every user of a split once, in the data set's order; row groups are dealt round robin to the ranks.

    A batch has no negatives; the target of user b is the last of its events. With world_size > 1 the ranks have
    different numbers of batches.
    """
    for group in dataset.row_groups[rank::world_size]:
        rows = dataset.read(group, log_probs=dataset.has_log_probs)
        users = windows(rows, config, split)
        for begin in range(0, len(users.user_ids_U), batch_size):
            yield collate(rows, users.take(slice(begin, begin + batch_size)))


def prefetch_depth(config: DataConfig, device_type: str) -> int:
    """config.prefetch, or what suits the device. On a CPU a background thread makes every parallel operation wait for
    the core it occupies."""
    return config.prefetch if config.prefetch is not None else 0 if device_type == "cpu" else 2


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Makes the next `depth` items in a background thread; exceptions arrive where the item would have."""
    if depth <= 0:
        yield from items
        return
    ready: "queue.Queue" = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(value: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        outcome: Optional[BaseException] = None
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            outcome = error
        put((end, outcome))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
