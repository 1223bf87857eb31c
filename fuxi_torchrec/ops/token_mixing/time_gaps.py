"""Time differences of a batch as the features that the maps take.

Shapes as in time_maps.py."""

import functools
import math
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops import jagged
from fuxi_torchrec.ops.jagged import JaggedLayout, LengthGroup, Slots
from fuxi_torchrec.ops.token_mixing.exponential_sums import DEFAULT_TOLERANCE
from fuxi_torchrec.ops.token_mixing.time_maps import NUM_BUCKETS, TIME_MAPS

CACHED_ENTRIES = 2**24
"""Feature entries kept per batch; a batch with more of them (long sequences) makes them again when they are needed."""


def gap_feature(ticks: Tensor, time_unit: float, feature: str, dtype: torch.dtype) -> Tensor:
    """Converts int64 time differences to what the maps read: "seconds", "log1p" = ln(1 + max(seconds, 0)), or
    "bucket"."""
    seconds = ticks.to(dtype)
    if time_unit != 1.0:
        seconds.mul_(time_unit)
    if feature == "seconds":
        return seconds
    if feature == "log1p":
        return seconds.clamp_(min=0).log1p_()
    assert feature == "bucket"
    return (seconds.abs_().clamp_(min=1).log_() / 0.301).to(torch.int32).clamp_(0, NUM_BUCKETS)


class Times(NamedTuple):
    """The times of a batch: int64 [T] ticks of the events and of what follows each, seconds per tick; and the largest
    relative error of a map that is approximated (`exponential_sums`)."""

    timestamps_T: Tensor
    next_timestamps_T: Tensor
    time_unit: float = 1.0
    tolerance: float = DEFAULT_TOLERANCE


class FeatureKey(NamedTuple):
    """What tells the features of a batch's time gaps apart: whose map reads them (a temporal channel's name), from which
    length on users are mixed in linear time (None: nobody is), whether the others are mixed in C, and the maps' dtype."""

    channel: str
    linear_from: Optional[int]
    in_c: bool
    dtype: torch.dtype


class StripGaps:
    """One feature of t_{i+1} - t_j for the strips of some length groups: rows i, columns j of every user of a group.

    cached: what `all_strips` returned; None: a strip is made whenever it is asked for.
    """

    def __init__(
        self, slots: Slots, times: Times, feature: str, dtype: torch.dtype, cached: Optional[Tensor] = None
    ) -> None:
        self.slots, self.times, self.feature, self.dtype = slots, times, feature, dtype
        self._cached: Dict[Tuple[int, int], Tensor] = {}
        if cached is not None:
            start = 0
            for key, shape in self._shapes():
                size = math.prod(shape)
                self._cached[key] = cached[start : start + size].view(shape)
                start += size

    def _shapes(self) -> Iterator[Tuple[Tuple[int, int], Tuple[int, int, int]]]:
        for first, groups in self.slots.strips():
            for group in groups:
                last = min(first + jagged.STRIP_ROWS, group.length)
                yield (group.start, first), (group.users, last - first, last)

    def count(self) -> int:
        """Counts the entries of all strips."""
        return sum(math.prod(shape) for _, shape in self._shapes())

    def all_strips(self) -> List[Tensor]:
        """Makes every strip's entries, flat."""
        return [self.strip(group, first).flatten() for first, groups in self.slots.strips() for group in groups]

    def strip(self, group: LengthGroup, first: int) -> Tensor:
        """Returns [G, rows, columns] for the strip's rows, first <= i < last, and the columns 0 <= j < last; not to
        be changed."""
        if (group.start, first) in self._cached:
            return self._cached[group.start, first]
        last = min(first + jagged.STRIP_ROWS, group.length)
        past_GN, next_GN = (
            times_P[group.start : group.stop].view(group.length, group.users).T.contiguous() for times_P in self._times_P
        )
        ticks = next_GN[:, first:last, None] - past_GN[:, None, :last]
        return gap_feature(ticks, self.times.time_unit, self.feature, self.dtype)

    @functools.cached_property
    def _times_P(self) -> List[Tensor]:
        return [times_T[self.slots.token_P] for times_T in self.times[:2]]


class TimeGaps:
    """The times of a batch, and what is made of them once for all blocks.

    timestamps_T, next_timestamps_T: int64 [T] ticks; time_unit: seconds per tick; tolerance: see `Times`. features: what
    `token_mixing.prepare` made of them.
    """

    def __init__(
        self,
        timestamps_T: Tensor,
        next_timestamps_T: Tensor,
        layout: JaggedLayout,
        time_unit: float = 1.0,
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> None:
        assert timestamps_T.dtype == next_timestamps_T.dtype == torch.int64
        self.times = Times(timestamps_T, next_timestamps_T, time_unit, tolerance)
        self.layout = layout
        self.features: Dict[FeatureKey, Tensor] = {}

    @property
    def timestamps_T(self) -> Tensor:
        """int64 [T] ticks of the events."""
        return self.times.timestamps_T

    @property
    def next_timestamps_T(self) -> Tensor:
        """int64 [T] ticks of what follows each event."""
        return self.times.next_timestamps_T

    @property
    def time_unit(self) -> float:
        """Seconds per tick."""
        return self.times.time_unit

    def strips(self, name: str, dtype: torch.dtype) -> StripGaps:
        """Makes the strips of the temporal channel `name`, for all users; from what `token_mixing.plan_mixing` made
        for "blocked", if it did."""
        cached = self.features.get(FeatureKey(name, linear_from=None, in_c=False, dtype=dtype))
        cached = None if cached is None or not cached.numel() else cached
        return StripGaps(self.layout.slots, self.times, TIME_MAPS[name].feature, dtype, cached)

    @functools.cached_property
    def are_sorted(self) -> bool:
        """Whether time never runs backwards within a user; not looked at, and taken for granted, off the CPU."""
        if self.timestamps_T.device.type != "cpu" or self.layout.num_tokens == 0:
            return True
        same_user = self.layout.user_T[1:] == self.layout.user_T[:-1]
        forward = bool((self.timestamps_T <= self.next_timestamps_T).all())
        return forward and bool((self.timestamps_T.diff().ge(0) | ~same_user).all())
