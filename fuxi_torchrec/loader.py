"""Streams of batches. What comes next is a function of (seed, epoch, rank, position), so a position resumes exactly.

An epoch shuffles the row groups, deals them to the ranks, and shuffles the users inside buffers of whole row groups.
Only the current buffer is in memory; a position is (epoch, buffer, users already taken of it). What is left of an epoch
can be dealt again to another number of ranks: no user is seen twice, and none is left out.
"""

import queue
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar

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


def positions_after(state: Dict[str, Any], rank: int, world_size: int) -> Tuple[Position, List[List[Position]]]:
    """Where a rank goes on from what was saved ("positions" of all ranks, earlier "deals"), and the stream's deals.

    At another world size the rest of the epoch is dealt anew.
    """
    positions = [Position(**position) for position in state["positions"]]
    deals = [[Position(**position) for position in world] for world in state["deals"]]
    epoch = positions[0].epoch
    deals = [world for world in deals if world[0].epoch == epoch]
    if len(positions) == world_size or not any(position.buffer or position.taken for position in positions):
        return positions[rank % len(positions)], deals
    return Position(epoch=epoch, step=positions[0].step), [*deals, positions]


@dataclass(frozen=True)
class Buffer:
    """Row groups whose users are shuffled together, in an order that `key` decides; of that order the users
    [begin, end) are this buffer's."""

    groups: Tuple[RowGroup, ...]
    key: Tuple[int, ...]
    begin: int
    end: int

    @property
    def users(self) -> int:
        return max(self.end - self.begin, 0)


class TrainingStream:
    """Batches of the training split.

    Args:
        dataset, config: what is read and how it is batched.
        sampler: draws the negatives at collation.
        seed: decides the order.
        rank, world_size: an epoch's shuffled row groups are dealt one by one, to the rank with the fewest users so far.

    Attributes:
        deals: where the ranks of each earlier world stood in the current epoch when that world ended.
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
        self.deals: List[List[Position]] = []

    def epoch(self, position: Position) -> Iterator[SequenceBatch]:
        """The rest of an epoch. No user is dropped: the last batch of a buffer may be smaller than the others."""
        buffers = self._buffers(position.epoch)
        for number in range(position.buffer, len(buffers)):
            buffer = buffers[number]
            taken = max(buffer.begin, position.taken if number == position.buffer else 0)
            rows = concatenate([self.dataset.read(group) for group in buffer.groups])
            users = windows(rows, self.config, "train")
            users = users.take(self._random(*buffer.key).permutation(len(users.user_ids_U))[: buffer.end])
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

    def _buffers(self, epoch: int) -> List[Buffer]:
        """This rank's buffers of an epoch, each of about shuffle_buffer users."""
        order = self._random(epoch).permutation(len(self.dataset.row_groups))
        groups = [self.dataset.row_groups[index] for index in order]
        begun: List[Buffer] = []
        deals = self.deals if self.deals and self.deals[0][0].epoch == epoch else []
        for generation, positions in enumerate(deals):
            dealt = self._deal(groups, begun, len(positions), epoch, generation)
            begun, groups = _unfinished(dealt, positions)
        return self._deal(groups, begun, self.world_size, epoch, len(deals))[self.rank]

    def _deal(
        self, groups: Sequence[RowGroup], begun: Sequence[Buffer], ranks: int, epoch: int, generation: int
    ) -> List[List[Buffer]]:
        """Buffers of every rank: first those that an earlier world had begun, then new ones of whole row groups."""
        dealt: List[List[Buffer]] = [[] for _ in range(ranks)]
        users = [0] * ranks
        for buffer in _pieces(begun, ranks):
            rank = users.index(min(users))
            dealt[rank].append(buffer)
            users[rank] += buffer.users
        hands: List[List[RowGroup]] = [[] for _ in range(ranks)]
        for group in groups:
            rank = users.index(min(users))
            hands[rank].append(group)
            users[rank] += group.num_rows
        for rank, hand in enumerate(hands):
            for number, part in enumerate(_cut(hand, self.config.shuffle_buffer)):
                # A later deal draws other orders than the first, whose ranks and numbers it would repeat.
                this = (epoch, rank, number, generation) if generation else (epoch, rank, number)
                dealt[rank].append(Buffer(tuple(part), this, 0, sum(group.num_rows for group in part)))
        return dealt

    def _batch_end(self, ends_U: np.ndarray, begin: int) -> int:
        end = min(begin + self.config.batch_size, len(ends_U))
        if self.config.tokens_per_batch is not None:
            before = ends_U[begin - 1] if begin else 0
            fitting = int(np.searchsorted(ends_U, before + self.config.tokens_per_batch, side="right"))
            end = min(end, max(fitting, begin + 1))
        return end

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


def _cut(groups: Sequence[RowGroup], users: int) -> List[List[RowGroup]]:
    """Runs of whole row groups, each closed once it holds `users` users."""
    parts: List[List[RowGroup]] = []
    held = users
    for group in groups:
        if held >= users:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += group.num_rows
    return parts


def _unfinished(
    dealt: Sequence[Sequence[Buffer]], positions: Sequence[Position]
) -> Tuple[List[Buffer], List[RowGroup]]:
    """What the ranks of an earlier world left: buffers already begun (anything but untouched), and row groups."""
    begun: List[Buffer] = []
    groups: List[RowGroup] = []
    for buffers, position in zip(dealt, positions):
        for number in range(position.buffer, len(buffers)):
            buffer = buffers[number]
            taken = max(buffer.begin, position.taken if number == position.buffer else 0)
            whole = sum(group.num_rows for group in buffer.groups)
            if (taken, buffer.end) == (0, whole):
                groups += buffer.groups
            elif taken < buffer.end:
                begun.append(replace(buffer, begin=taken))
    return begun, groups


def _pieces(begun: Sequence[Buffer], ranks: int) -> List[Buffer]:
    """The buffers, cut where there are fewer of them than ranks. A piece's rank reads the whole buffer's row groups."""
    if not begun:
        return []
    each = -(-ranks // len(begun))
    pieces = []
    for buffer in begun:
        edges = [buffer.begin + buffer.users * i // each for i in range(each + 1)]
        pieces += [replace(buffer, begin=low, end=high) for low, high in zip(edges, edges[1:]) if low < high]
    return pieces


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
    ready: queue.Queue = queue.Queue(maxsize=depth)
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
