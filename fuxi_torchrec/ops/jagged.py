"""Jagged batches: where each user's rows lie, and pure index moves between jagged and padded.

Shapes: T tokens of the batch, B users, G users of one length group, N its padded length, P padded slots of all groups.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

SHORTEST_TO_LONGEST = 0.7
"""Users share a length group while the shortest has at least this part of the longest's tokens."""
SLOTS_PER_GROUP = 2048
"""Padded slots that one group may hold (one user always fits); keeps a group's work in the cache."""
STRIP_ROWS = 100
"""Rows of a causal map that exist at a time, per user; columns right of a strip are skipped (causality)."""


@dataclass(frozen=True)
class LengthGroup:
    """Users of similar length, padded to the longest; slot (position p, user g) is row start + p * users + g of P."""

    start: int
    length: int
    users: int

    @property
    def stop(self) -> int:
        """Slot behind the group's last."""
        return self.start + self.length * self.users


@dataclass(frozen=True)
class Slots:
    """The length groups of a batch as tensors, the form in which operators take them.

    users_B5: int64 on the host, a row for each user with a token, in the order of the groups: its group's start, length
    and number of users, the user's first row in T, its length. token_P, slot_T, padding_slots: see `JaggedLayout`.
    """

    users_B5: Tensor
    token_P: Tensor
    slot_T: Tensor
    padding_slots: Tensor

    @cached_property
    def groups(self) -> List[LengthGroup]:
        """Length groups, longest first."""
        rows, groups, user = self.users_B5.tolist(), [], 0
        while user < len(rows):
            groups.append(LengthGroup(*rows[user][:3]))
            user += groups[-1].users
        return groups

    @property
    def max_length(self) -> int:
        """Length of the longest user."""
        return self.groups[0].length if self.groups else 0

    def split(self, longest: Optional[int]) -> Tuple[List[Tuple[int, int]], "Slots"]:
        """Takes out the users of the groups that have one of more than `longest` rows, as (first row, length);
        returns them and the other groups, with slots counted from their own first. None: no user is too long."""
        rows = self.users_B5.tolist()
        long = [] if longest is None else [row for row in rows if row[1] > longest]
        if not long:
            return [], self
        start, length, users = long[-1][:3]
        slots = start + length * users
        paddings = slots - sum(row[4] for row in long)
        short_B5 = self.users_B5[len(long) :] - torch.tensor([slots, 0, 0, 0, 0])
        moved = (self.token_P[slots:], self.slot_T - slots, self.padding_slots[paddings:] - slots)
        return [(row[3], row[4]) for row in long], Slots(short_B5, *moved)

    def strips(self) -> Iterator[Tuple[int, List[LengthGroup]]]:
        """Yields (first row, the groups that reach it) of every strip, groups longest first."""
        for first in range(0, self.max_length, STRIP_ROWS):
            yield first, [group for group in self.groups if group.length > first]


def row_tasks(lengths: Sequence[int], rows: int) -> Tensor:
    """Cuts every user into runs of `rows` rows: int64 [tasks, 3] on the host, (user, first row, last row + 1), those
    whose causal past is longest first."""
    lengths_B = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
    pieces_B = (lengths_B + rows - 1) // rows
    user_K = torch.arange(len(lengths_B), device="cpu").repeat_interleave(pieces_B)
    first_K = (torch.arange(len(user_K), device="cpu") - (pieces_B.cumsum(0) - pieces_B)[user_K]) * rows
    last_K = torch.minimum(first_K + rows, lengths_B[user_K])
    order_K = torch.argsort(last_K, descending=True, stable=True)
    return torch.stack([user_K, first_K, last_K], 1)[order_K].contiguous()


class JaggedLayout:
    """The places of a batch's B users in the T jagged rows; made once per batch and shared by every block.

    offsets_B1: int64 [B + 1], user b owns the rows offsets_B1[b]:offsets_B1[b + 1]; max_length and num_tokens are its
    longest user and its T, known on the host. `host_lengths` spares the one copy from the device that the length
    groups need.
    """

    def __init__(
        self, offsets_B1: Tensor, max_length: int, num_tokens: int, host_lengths: Optional[Sequence[int]] = None
    ) -> None:
        assert offsets_B1.dtype == torch.int64 and offsets_B1.ndim == 1
        self.offsets_B1 = offsets_B1
        self.max_length = max_length
        self.num_tokens = num_tokens
        self._host_lengths = host_lengths
        self._row_tasks: Dict[int, Tensor] = {}

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: Optional[torch.device] = None) -> "JaggedLayout":
        """Makes the layout from the users' lengths on the host."""
        host = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        offsets_B1 = torch.zeros(len(host) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(host, 0, out=offsets_B1[1:])
        longest = int(host.max()) if len(host) else 0
        return cls(offsets_B1.to(device or "cpu"), longest, int(offsets_B1[-1]), host.tolist())

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.offsets_B1.device

    @property
    def num_users(self) -> int:
        """Number of users, B."""
        return self.offsets_B1.numel() - 1

    @cached_property
    def lengths_B(self) -> Tensor:
        """int64 [B]: the users' lengths."""
        return self.offsets_B1.diff()

    @cached_property
    def user_T(self) -> Tensor:
        """int64 [T]: the user of each row."""
        users_B = torch.arange(self.num_users, device=self.device)
        return users_B.repeat_interleave(self.lengths_B, output_size=self.num_tokens)

    @cached_property
    def position_T(self) -> Tensor:
        """int64 [T]: the row's index within its user's sequence, from 0."""
        return torch.arange(self.num_tokens, device=self.device) - self.offsets_B1[self.user_T]

    def row_tasks(self, rows: int) -> Tensor:
        """Cuts the batch's users into tasks, once for each number of rows: see `row_tasks`."""
        if rows not in self._row_tasks:
            self._row_tasks[rows] = row_tasks(self.host_lengths, rows)
        return self._row_tasks[rows]

    @property
    def host_lengths(self) -> Sequence[int]:
        """The users' lengths on the host."""
        if self._host_lengths is None:
            self._host_lengths = self.lengths_B.tolist()
        return self._host_lengths

    @property
    def groups(self) -> List[LengthGroup]:
        """Length groups of all users with at least one token, longest first."""
        return self.slots.groups

    @property
    def token_P(self) -> Tensor:
        """int64 [P]: the jagged row in each padded slot; slots past a user's end repeat its last row."""
        return self.slots.token_P

    @property
    def slot_T(self) -> Tensor:
        """int64 [T]: the padded slot of each jagged row."""
        return self.slots.slot_T

    @property
    def padding_slots(self) -> Tensor:
        """int64: the slots of P past their user's end."""
        return self.slots.padding_slots

    @cached_property
    def slots(self) -> Slots:
        """The length groups."""
        lengths_B = torch.as_tensor(self.host_lengths, dtype=torch.int64)
        starts_B = torch.cumsum(lengths_B, 0) - lengths_B
        order_B = torch.argsort(lengths_B, descending=True, stable=True)
        slot_T = torch.empty(self.num_tokens, dtype=torch.int64)
        rows, tokens, paddings, done = [], [], [], 0
        for first, last in _runs_of_similar_length(lengths_B[order_B].tolist()):
            users_G = order_B[first:last]
            length, lengths_G = int(lengths_B[users_G[0]]), lengths_B[users_G]
            position_N1 = torch.arange(length)[:, None]
            token_NG = starts_B[users_G] + torch.minimum(position_N1, lengths_G - 1)
            real_NG = position_N1 < lengths_G
            slot_NG = done + torch.arange(token_NG.numel()).view_as(token_NG)
            slot_T[token_NG[real_NG]] = slot_NG[real_NG]
            tokens.append(token_NG.flatten())
            paddings.append(slot_NG[~real_NG])
            group_G3 = torch.tensor([done, length, last - first]).expand(last - first, 3)
            rows.append(torch.cat([group_G3, torch.stack([starts_B[users_G], lengths_G], 1)], 1))
            done += token_NG.numel()
        empty = [torch.empty(0, dtype=torch.int64)]
        moves = (torch.cat(tokens + empty), slot_T, torch.cat(paddings + empty))
        users_B5 = torch.cat([*rows, torch.empty(0, 5, dtype=torch.int64)])
        return Slots(users_B5, *(index.to(self.device, non_blocking=True) for index in moves))


def _runs_of_similar_length(descending: Sequence[int]) -> Iterator[Tuple[int, int]]:
    """(first, last) ranges of the non-zero lengths that one group takes."""
    first = 0
    while first < len(descending) and descending[first] > 0:
        longest = descending[first]
        limit = first + max(1, SLOTS_PER_GROUP // longest)
        last = first + 1
        while last < min(limit, len(descending)) and descending[last] >= max(1, SHORTEST_TO_LONGEST * longest):
            last += 1
        yield first, last
        first = last


def to_padded(values_T: Tensor, layout: JaggedLayout) -> Tensor:
    """Pads [T, ...] to [B, max_length, ...]; slots past a user's end repeat its last row (any row for an empty user)."""
    position_N = torch.arange(layout.max_length, device=layout.device)
    last_B = (layout.lengths_B - 1).clamp(min=0)
    token_BN = layout.offsets_B1[:-1, None] + torch.minimum(position_N, last_B[:, None])
    if layout.num_tokens == 0:
        return values_T.new_zeros(layout.num_users, layout.max_length, *values_T.shape[1:])
    return values_T[token_BN.clamp(max=layout.num_tokens - 1)]


def from_padded(padded_BN: Tensor, layout: JaggedLayout) -> Tensor:
    """Takes [T, ...] out of [B, max_length, ...]; padding is dropped."""
    return padded_BN[layout.user_T, layout.position_T]


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_T: Tensor, layout: JaggedLayout) -> Tensor:
        ctx.layout = layout
        return values_T.index_select(0, layout.token_P)

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> Tuple[Tensor, None]:
        return grad_P.index_select(0, ctx.layout.slot_T), None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_P: Tensor, layout: JaggedLayout) -> Tensor:
        ctx.layout = layout
        return values_P.index_select(0, layout.slot_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> Tuple[Tensor, None]:
        return slots_with_zero_padding(grad_T, ctx.layout), None


def slots_with_zero_padding(values_T: Tensor, layout: JaggedLayout) -> Tensor:
    """Lays [T, ...] out as [P, ...], zero past a user's end."""
    return values_T.index_select(0, layout.token_P).index_fill_(0, layout.padding_slots, 0)


def to_slots(values_T: Tensor, layout: JaggedLayout) -> Tensor:
    """Lays [T, ...] out as [P, ...] in length groups. What is computed *from* padding must not reach a real row's
    result: the gradient that comes back to a padded slot is dropped."""
    return _ToSlots.apply(values_T, layout)


def from_slots(values_P: Tensor, layout: JaggedLayout) -> Tensor:
    """Takes [T, ...] out of [P, ...]; padding is dropped and gets a zero gradient."""
    return _FromSlots.apply(values_P, layout)
