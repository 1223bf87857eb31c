"""FuXi's query-free token mixing on jagged rows: y_c = A_c v with causal maps A_c that no query or key enters.

A channel is ("positional", (weight_N,)) with A[i,j] = weight_N[i - j], ("zero", ()), or (name, parameters) with a map
of `time_maps.TIME_MAPS`, A[i,j] = f(t_{i+1} - t_j). Source: FuXi-β (arXiv 2508.10615), section 3; docs/models.md, "FuXi
block".

Shapes: T tokens, N padded length, H heads, d value size per head, C channels.
"""

from typing import List, Literal, NamedTuple, Optional, Sequence, get_args

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing import native as mixing_native
from fuxi_torchrec.ops.token_mixing import triton as triton_mixing
from fuxi_torchrec.ops.token_mixing.linear import LINEAR_FORMS
from fuxi_torchrec.ops.token_mixing.operator import make_features, mix_op
from fuxi_torchrec.ops.token_mixing.reference import mix_reference
from fuxi_torchrec.ops.token_mixing.time_gaps import CACHED_ENTRIES, FeatureKey, TimeGaps
from fuxi_torchrec.ops.token_mixing.time_maps import Channel

Implementation = Literal["auto", "reference", "exact", "blocked", "native", "linear", "triton"]

LINEAR_FROM = 1024
"""Users with more rows than this are mixed in linear time by `linear`; for the others its exact fallbacks are faster."""
NATIVE_TO = 1024
"""Batches whose longest user has at most this many rows are mixed by `native` where it can be had."""


def mix_tokens(
    values_THd: Tensor,
    layout: JaggedLayout,
    channels: Sequence[Channel],
    gaps: Optional[TimeGaps] = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Mixes every user's rows causally, once per channel.

    Args:
        values_THd: v, [T, H, d]; every head uses the same maps.
        layout: where the users lie in T.
        channels: see the module's docstring. Parameters are float32 (or v's wider type) and so are the maps; the
            products are in v's type.
        gaps: the batch's time gaps; needed by temporal channels, shared by all blocks.
        implementation: "reference" is dense, padded and obvious; "blocked" is exact and causal in length groups and
            strips of rows, keeps no map and makes it again in backward; "native" is the same in C, for float32 on a CPU;
            "linear" costs O(n log n) for long users, with sums of exponentials for `pow` (for 0.05 <= b <= 3) and `exp`,
            and is native, or else blocked, for other maps and shorter users; "triton" is a fused CUDA kernel
            (`triton.py`); "auto" is the fastest for the input on a CPU, and on CUDA "triton" wherever its kernels know
            the channels, which no GPU has timed yet; "exact" is the same without "linear".

    Returns:
        [T, H, C, d] in v's type: per head, the channels' outputs side by side, in the order given.
    """
    assert len(channels) > 0, "at least one channel"
    if implementation == "reference":
        return mix_reference(values_THd, layout, channels, gaps)
    chosen = _kernels(values_THd, layout, channels, implementation)
    if chosen == "triton":
        return triton_mixing.triton_mix_tokens(values_THd, layout, channels, gaps)
    if chosen == "native":
        return mixing_native.mix_native(values_THd, layout, channels, gaps)
    parts = _parts(values_THd, layout, channels, gaps, implementation)
    mixed = [_mix(values_THd, layout, [channels[c] for c in part.members], gaps, part) for part in parts]
    if len(parts) == 1:
        return mixed[0]
    mixed, order = torch.cat(mixed, 2), [c for part in parts for c in part.members]
    return mixed if order == sorted(order) else mixed[:, :, [order.index(c) for c in range(len(order))]]


class _Part(NamedTuple):
    """Channels that one call of the operator mixes: their places among all, from which length on they are mixed in
    linear time (None: never), and whether `native` mixes the shorter users."""

    members: List[int]
    linear_from: Optional[int]
    in_c: bool


def _parts(
    values_THd: Optional[Tensor],
    layout: JaggedLayout,
    channels: Sequence[Channel],
    gaps: Optional[TimeGaps],
    implementation: Implementation,
) -> List[_Part]:
    """The channels, those of one length to be linear from together; values None: as far as it can be told from the
    parameters, for values of their type."""
    autocast = values_THd is None and torch.is_autocast_enabled(layout.device.type)
    froms = [_linear_from(name, layout, gaps, implementation) for name, _ in channels]
    parts = []
    for linear_from in dict.fromkeys(froms):
        members = [c for c, start in enumerate(froms) if start == linear_from]
        in_c = not autocast and _in_c(values_THd, [channels[c] for c in members], implementation)
        parts.append(_Part(members, linear_from, in_c))
    return parts


def _kernels(
    values_THd: Optional[Tensor], layout: JaggedLayout, channels: Sequence[Channel], implementation: Implementation
) -> Literal["triton", "native", "torch", "reference"]:
    """Which code runs; values None: as far as it can be told from the parameters, for values of their type."""
    assert implementation in get_args(Implementation), implementation
    if implementation in ("reference", "triton", "native"):
        return implementation
    if implementation in ("auto", "exact"):
        like = values_THd if values_THd is not None else next((p for _, ps in channels for p in ps), None)
        if like is None:
            return "torch"
        if triton_mixing.can_mix(like, channels):
            return "triton"
        within = implementation == "exact" or layout.max_length <= NATIVE_TO
        autocast = values_THd is None and torch.is_autocast_enabled(like.device.type)
        if within and not autocast and mixing_native.supports(like, channels):
            return "native"
    return "torch"


def _linear_from(
    name: str, layout: JaggedLayout, gaps: Optional[TimeGaps], implementation: Implementation
) -> Optional[int]:
    if implementation in ("blocked", "exact") or name not in LINEAR_FORMS or layout.max_length <= LINEAR_FROM:
        return None
    # A scan over chunks takes time to run forwards.
    return LINEAR_FROM if name in ("positional", "zero") or gaps.are_sorted else None


def _in_c(values_THd: Optional[Tensor], channels: Sequence[Channel], implementation: Implementation) -> bool:
    """Whether users who are not mixed in linear time are mixed by `native`."""
    like = values_THd if values_THd is not None else next((p for _, ps in channels for p in ps), None)
    return implementation in ("auto", "linear") and like is not None and mixing_native.supports(like, channels)


def _mix(values_THd, layout, channels, gaps: Optional[TimeGaps], part: _Part) -> Tensor:
    _, linear_from, in_c = part
    params = [p for _, ps in channels for p in ps]
    nothing = values_THd.new_empty(0)
    times = [nothing, nothing] if gaps is None else list(gaps.times[:2])
    made = {} if gaps is None else gaps.features
    keys = [FeatureKey(name, linear_from, in_c, ps[0].dtype) if ps else None for name, ps in channels]
    features = [made.get(key, nothing) for key in keys]
    slots = layout.slots
    slots = [slots.users_B5, slots.token_P, slots.slot_T, slots.padding_slots]
    kinds = " ".join(name for name, _ in channels)
    unit, tolerance = (1.0, 1e-6) if gaps is None else gaps.times[2:]
    return mix_op(values_THd, times, slots, features, params, kinds, linear_from, in_c, unit, tolerance)


def prepare(
    layout: JaggedLayout, channels: Sequence[Channel], gaps: TimeGaps, implementation: Implementation = "auto"
) -> None:
    """Makes what `mix_tokens` reads of the times once for every block of a batch that has these channels."""
    if _kernels(None, layout, channels, implementation) != "torch":
        return  # these make it in registers
    for part in _parts(None, layout, channels, gaps, implementation):
        for name, params in (channels[c] for c in part.members):
            if name in ("positional", "zero"):
                continue
            key = FeatureKey(name, part.linear_from, part.in_c, params[0].dtype)
            if key not in gaps.features:
                gaps.features[key] = make_features(key, gaps.times, layout.slots, CACHED_ENTRIES)
