"""Token mixing, dense, padded and obvious: what every other implementation is tested against.

Shapes: T tokens, B users, N padded length, H heads, d value size per head; i rows and j columns of a map.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout, from_padded, to_padded
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps, gap_feature
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS, Channel


def mix_reference(
    values_THd: Tensor, layout: JaggedLayout, channels: Sequence[Channel], gaps: Optional[TimeGaps]
) -> Tensor:
    """Mixes values by whole maps, [T, H, C, d]; see `token_mixing.mix_tokens`. Memory grows with B * N²."""
    v_BNHd = to_padded(values_THd, layout)
    outputs = []
    for name, params in channels:
        map_BNN = values_THd.new_zeros(()) if name == "zero" else dense_map(name, params, layout, gaps)
        map_BNN = map_BNN.to(values_THd.dtype).expand(layout.num_users, layout.max_length, layout.max_length)
        outputs.append(from_padded(torch.einsum("bij,bjhd->bihd", map_BNN, v_BNHd), layout))
    return torch.stack(outputs, 2)


def dense_map(name: str, params: Sequence[Tensor], layout: JaggedLayout, gaps: Optional[TimeGaps]) -> Tensor:
    """Makes the causal map of a channel for all users, [B or 1, N, N], in the parameters' type."""
    i_N1, j_N = (torch.arange(layout.max_length, device=layout.device).view(shape) for shape in ((-1, 1), (-1,)))
    if name == "positional":
        map_BNN = params[0][(i_N1 - j_N).clamp(min=0)][None]
    else:
        assert gaps is not None
        map_BNN = TIME_MAPS[name].evaluate(dense_feature(name, params[0].dtype, layout, gaps), *params)
    return map_BNN.masked_fill(j_N > i_N1, 0)


def dense_feature(name: str, dtype: torch.dtype, layout: JaggedLayout, gaps: TimeGaps) -> Tensor:
    """Makes what a temporal channel's map is a function of, for every pair of a user's rows, [B, N, N]."""
    past_BN, next_BN = to_padded(gaps.timestamps_T, layout), to_padded(gaps.next_timestamps_T, layout)
    return gap_feature(next_BN[:, :, None] - past_BN[:, None, :], gaps.time_unit, TIME_MAPS[name].feature, dtype)
