"""FuXi's query-free token mixing on jagged rows: y_c = A_c v with causal maps A_c that no query or key enters.

A channel is ("positional", (weight_N,)) with A[i,j] = weight_N[i - j], ("zero", ()), or (name, parameters) with a map
of `time_maps.TIME_MAPS`, A[i,j] = f(t_{i+1} - t_j). Source: FuXi-β (arXiv 2508.10615), section 3; docs/models.md, "FuXi
block".

Shapes: T tokens, N padded length, H heads, d value size per head, C channels.
"""

from typing import Literal, Optional, Sequence

from torch import Tensor

from fuxi_torchrec.ops import mixing_native, triton_mixing
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.mixing_blocked import mix_blocked
from fuxi_torchrec.ops.mixing_reference import mix_reference
from fuxi_torchrec.ops.time_maps import Channel, TimeGaps

Implementation = Literal["auto", "reference", "blocked", "native", "triton"]


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
            "triton" is a fused CUDA kernel (`triton_mixing`); "auto" is the fastest for the input on a CPU, and on CUDA
            "triton" wherever its kernels know the channels, which no GPU has timed yet.

    Returns:
        [T, H, C, d] in v's type: per head, the channels' outputs side by side, in the order given.
    """
    assert channels, "at least one channel"
    if implementation == "reference":
        return mix_reference(values_THd, layout, channels, gaps)
    if implementation == "triton" or implementation == "auto" and triton_mixing.can_mix(values_THd, channels):
        return triton_mixing.triton_mix_tokens(values_THd, layout, channels, gaps)
    if implementation == "native" or implementation == "auto" and mixing_native.supports(values_THd, channels):
        return mixing_native.mix_native(values_THd, layout, channels, gaps)
    assert implementation in ("auto", "blocked"), implementation
    return mix_blocked(values_THd, layout, channels, gaps)
