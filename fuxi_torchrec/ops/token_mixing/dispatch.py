"""FuXi's query-free token mixing on jagged rows: y_c = A_c v with causal maps A_c that no query or key enters.

A channel is its name in `registry.CHANNELS` and its parameters: positional, A[i,j] = weight_N[i - j]; zero; or a map of
the time differences, A[i,j] = f(t_{i+1} - t_j). Source: FuXi-β (arXiv 2508.10615), section 3; docs/models.md, "The
equations". Which code mixes which channels of a batch, and what it reads of the times, is a `MixingPlan`, made once and
taken by every block.

Shapes: T tokens, N padded length, H heads, d value size per head, C channels.
"""

from dataclasses import dataclass
from typing import List, Literal, Optional, Sequence, Tuple, get_args

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.token_mixing import native as mixing_native
from fuxi_torchrec.ops.token_mixing import triton as triton_mixing
from fuxi_torchrec.ops.token_mixing.operator import make_features, mix_op
from fuxi_torchrec.ops.token_mixing.reference import mix_reference
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS, LINEAR
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
    plan = plan_mixing(values_THd, layout, channels, gaps, implementation, shared=False)
    return mix_by_plan(values_THd, channels, plan)


@dataclass(frozen=True)
class MixingPart:
    """The channels that one call of the operator mixes.

    Attributes:
        members: their places among all channels.
        linear_from: users with more rows than this are mixed in linear time; None: nobody is.
        in_c: whether `native` mixes the others.
        features: for each member, what it reads of the times (`operator.make_features`); empty: it is made when needed.
    """

    members: Tuple[int, ...]
    linear_from: Optional[int]
    in_c: bool
    features: Tuple[Tensor, ...]


@dataclass(frozen=True)
class MixingPlan:
    """The choice of which code mixes which channels of a batch; for values of one type, of every block that has these
    channels.

    Attributes:
        kernel: the code; "torch" mixes `parts` by the operator, the others take all channels at once.
        dtype: of the values.
        layout, gaps: the batch's.
    """

    kernel: Literal["triton", "native", "torch", "reference"]
    dtype: torch.dtype
    layout: JaggedLayout
    gaps: Optional[TimeGaps]
    parts: Tuple[MixingPart, ...] = ()


def plan_mixing(
    like: Tensor,
    layout: JaggedLayout,
    channels: Sequence[Channel],
    gaps: Optional[TimeGaps] = None,
    implementation: Implementation = "auto",
    shared: bool = True,
) -> MixingPlan:
    """Plans the mixing of a batch; arguments as of `mix_tokens`.

    Args:
        like: any tensor of the values' type and device.
        shared: several blocks will take the plan: what they read of the times is made now, and kept in `gaps`.

    Raises:
        ValueError: no channel, or an implementation that does not exist.
    """
    if not channels or implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"token mixing: {len(channels)} channels by {implementation!r}; it takes one or more, by {known}")
    kernel, parts = _kernel(like, layout, channels, implementation), []
    if kernel == "torch":
        froms = [_linear_from(name, layout, gaps, implementation) for name, _ in channels]
        for linear_from in dict.fromkeys(froms):
            members = tuple(c for c, start in enumerate(froms) if start == linear_from)
            chosen = [channels[c] for c in members]
            in_c = implementation in ("auto", "linear") and _by_kernel(like, chosen)
            features = tuple(_features(like, channel, gaps, linear_from, in_c, shared) for channel in chosen)
            parts.append(MixingPart(members, linear_from, in_c, features))
    return MixingPlan(kernel, like.dtype, layout, gaps, tuple(parts))


def mix_by_plan(values_THd: Tensor, channels: Sequence[Channel], plan: MixingPlan) -> Tensor:
    """Mixes values as planned, [T, H, C, d]; the channels are those of the plan, by name and order.

    Raises:
        ValueError: values of another type than planned for.
    """
    if values_THd.dtype != plan.dtype:
        raise ValueError(f"token mixing was planned for {plan.dtype}, not for {values_THd.dtype}")
    if plan.kernel == "reference":
        return mix_reference(values_THd, plan.layout, channels, plan.gaps)
    if plan.kernel == "triton":
        return triton_mixing.triton_mix_tokens(values_THd, plan.layout, channels, plan.gaps)
    if plan.kernel == "native":
        return mixing_native.mix_native(values_THd, plan.layout, channels, plan.gaps)
    parts = [_mix(values_THd, [channels[c] for c in part.members], plan, part) for part in plan.parts]
    if len(parts) == 1:
        return parts[0]
    mixed, order = torch.cat(parts, 2), [c for part in plan.parts for c in part.members]
    return mixed if order == sorted(order) else mixed[:, :, [order.index(c) for c in range(len(order))]]


def _kernel(
    like: Tensor, layout: JaggedLayout, channels: Sequence[Channel], implementation: Implementation
) -> Literal["triton", "native", "torch", "reference"]:
    if implementation in ("reference", "triton", "native"):
        return implementation
    if implementation in ("auto", "exact"):
        if triton_mixing.can_mix(like, channels):
            return "triton"
        within = implementation == "exact" or layout.max_length <= NATIVE_TO
        if within and _by_kernel(like, channels):
            return "native"
    return "torch"


def _by_kernel(like: Tensor, channels: Sequence[Channel]) -> bool:
    return native.is_chosen("token_mixing") and mixing_native.supports(like, channels)


def _linear_from(
    name: str, layout: JaggedLayout, gaps: Optional[TimeGaps], implementation: Implementation
) -> Optional[int]:
    is_known = LINEAR in CHANNELS[name].versions
    if implementation in ("blocked", "exact") or not is_known or layout.max_length <= LINEAR_FROM:
        return None
    if CHANNELS[name].time_map is None:
        return LINEAR_FROM
    assert gaps is not None
    return LINEAR_FROM if gaps.are_sorted else None  # a scan over chunks takes time to run forwards


def _features(
    like: Tensor, channel: Channel, gaps: Optional[TimeGaps], linear_from: Optional[int], in_c: bool, shared: bool
) -> Tensor:
    name, params = channel
    if gaps is None or CHANNELS[name].time_map is None:
        return like.new_empty(0)
    key = FeatureKey(name, linear_from, in_c, params[0].dtype)
    if shared and key not in gaps.features:
        gaps.features[key] = make_features(key, gaps.times, gaps.layout.slots, CACHED_ENTRIES)
    return gaps.features.get(key, like.new_empty(0))


def _mix(values_THd: Tensor, channels: Sequence[Channel], plan: MixingPlan, part: MixingPart) -> Tensor:
    nothing = values_THd.new_empty(0)
    gaps, slots = plan.gaps, plan.layout.slots
    times = [nothing, nothing] if gaps is None else list(gaps.times[:2])
    time_unit, tolerance = (1.0, 1e-6) if gaps is None else gaps.times[2:]
    where = [slots.users_B5, slots.token_P, slots.slot_T, slots.padding_slots]
    params: List[Tensor] = [p for _, ps in channels for p in ps]
    kinds = " ".join(name for name, _ in channels)
    settings = (kinds, part.linear_from, part.in_c, time_unit, tolerance)
    return mix_op(values_THd, times, where, list(part.features), params, *settings)
