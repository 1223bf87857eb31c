"""SequenceBatch: what a training or evaluation step takes, as plain attributes that a pipeline can send ahead.

Shape suffixes: B users, E events (each user's window with its target), T = E − B positions that predict something,
K negatives a position.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Callable, List, Optional, Sequence, TypeVar, Union

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from fuxi_torchrec.data.batch_sampler import StreamCursor
from fuxi_torchrec.data.dataset import UserRows, ranges
from fuxi_torchrec.data.negative_sampler import (
    InBatchItems,
    Negatives,
    NegativeSampler,
    PerTokenNegatives,
    SharedNegatives,
)
from fuxi_torchrec.data.splits import Windows
from fuxi_torchrec.files import JsonObject

BEGINNING = StreamCursor()
EVENTS, NEGATIVES = "events", "negatives"
Record = TypeVar("Record", bound=Union["SequenceBatch", Negatives, InBatchItems])
Move = Callable[[Any], Any]


@dataclass
class SequenceBatch(Pipelineable):
    """A batch: users' windows x_1 … x_{n+1}, of which the first n events are the inputs and the last n what they
    should predict.

    ids: KeyedJaggedTensor with the keys events [E] (int64) and negatives (unique ids or a pool, all in the first
        sample, since every key shares one number of samples; empty where there is no loss to take).
    timestamps_E: int64 ticks of the events.
    input_index_T: int64 positions of the inputs among the events; their targets stand one behind.
    offsets_B1: int64, inputs of user b are [offsets[b], offsets[b + 1]).
    host_lengths: every user's n, on the host, so that an encoder can plan its work without asking the device.
    negatives: how positions are set against the negatives' ids; None: there is no loss to take.
    user_ids_B: int64, on the host.
    target_log_prob_B: float64 on the host, the generator's own log p of each user's last event (synthetic data).
    cursor: where the stream stands behind this batch (what a checkpoint keeps).
    """

    ids: KeyedJaggedTensor
    timestamps_E: Tensor
    input_index_T: Tensor
    offsets_B1: Tensor
    host_lengths: List[int]
    user_ids_B: Tensor
    negatives: Optional[Negatives] = None
    target_log_prob_B: Optional[Tensor] = None
    cursor: StreamCursor = BEGINNING

    @property
    def num_tokens(self) -> int:
        """Number of supervised tokens, T."""
        return self.input_index_T.numel()

    @property
    def num_candidates(self) -> int:
        """Number of items that each token's loss compares with its positive, on this rank."""
        if isinstance(self.negatives, PerTokenNegatives):
            return self.negatives.index_TK.shape[1]
        in_batch = self.negatives.in_batch if self.negatives else None
        return self.ids.values().numel() - self.timestamps_E.numel() + (in_batch.index_N.numel() if in_batch else 0)

    def _map(self, move: Move) -> "SequenceBatch":
        return _moved(self, move, kept=("user_ids_B", "target_log_prob_B"))

    def to(self, device: torch.device, non_blocking: bool = False) -> "SequenceBatch":
        """Copies the batch to a device; what the host reads stays there."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SequenceBatch":
        """Copies the batch into page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that a CUDA stream uses the batch's tensors."""
        self._map(lambda x: (x.record_stream(stream), x)[1])


def _moved(record: Record, move: Move, kept: Sequence[str] = ()) -> Record:
    """A copy of a dataclass with every tensor moved, those of the records in it too, but for `kept`, which stay on the
    host."""
    changes: JsonObject = {}
    for name in (field.name for field in fields(record) if field.name not in kept):
        value = getattr(record, name)
        if isinstance(value, (Tensor, KeyedJaggedTensor)):
            changes[name] = move(value)
        elif isinstance(value, (PerTokenNegatives, SharedNegatives, InBatchItems)):
            changes[name] = _moved(value, move)
    return replace(record, **changes)


def collate(
    rows: UserRows,
    windows: Windows,
    sampler: Optional[NegativeSampler] = None,
    step: int = 0,
    cursor: StreamCursor = BEGINNING,
) -> SequenceBatch:
    """Builds the batch of some users' windows; no users give a batch of one empty one, with which a rank keeps step."""
    start_B, stop_B = windows.start_U, windows.stop_U
    if len(start_B) == 0:
        start_B = stop_B = np.zeros(1, dtype=np.int64)
    lengths_B = stop_B - start_B
    events = ranges(start_B, stop_B)
    ends_B = np.cumsum(lengths_B)
    input_index_T = np.delete(np.arange(len(events)), (ends_B - 1)[lengths_B > 0])
    item_ids_E = rows.item_ids_E[events]
    drawn = sampler.sample(item_ids_E[input_index_T + 1], step) if sampler else None
    negative_ids_U = torch.empty(0, dtype=torch.int64) if drawn is None else drawn.ids_U
    inputs_B = np.maximum(lengths_B - 1, 0)
    return SequenceBatch(
        ids=_keyed(torch.from_numpy(item_ids_E), torch.from_numpy(lengths_B), negative_ids_U),
        timestamps_E=torch.from_numpy(rows.timestamps_E[events]),
        input_index_T=torch.from_numpy(input_index_T),
        offsets_B1=torch.from_numpy(np.concatenate([[0], np.cumsum(inputs_B)])),
        host_lengths=inputs_B.tolist(),
        user_ids_B=torch.from_numpy(windows.user_ids_U),
        negatives=None if drawn is None else drawn.negatives,
        target_log_prob_B=None if rows.log_probs_E is None else torch.from_numpy(rows.log_probs_E[stop_B - 1]),
        cursor=cursor,
    )


def _keyed(item_ids_E: Tensor, lengths_B: Tensor, negatives_U: Tensor) -> KeyedJaggedTensor:
    negative_lengths_B = torch.zeros_like(lengths_B)
    negative_lengths_B[0] = negatives_U.numel()
    return KeyedJaggedTensor(
        keys=[EVENTS, NEGATIVES],
        values=torch.cat([item_ids_E, negatives_U]),
        lengths=torch.cat([lengths_B, negative_lengths_B]),
        # Told here, they are not asked of the device.
        length_per_key=[len(item_ids_E), len(negatives_U)],
        offset_per_key=[0, len(item_ids_E), len(item_ids_E) + len(negatives_U)],
    )
