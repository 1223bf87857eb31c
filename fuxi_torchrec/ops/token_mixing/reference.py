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
    """[T, H, C, d]; see `token_mixing.mix_tokens`. Memory grows with B * N²."""
    v_BNHd = to_padded(values_THd, layout)
    N = layout.max_length
    i_N1, j_N = torch.arange(N, device=layout.device)[:, None], torch.arange(N, device=layout.device)
    outputs = []
    for name, params in channels:
        if name == "zero":
            map_BNN = values_THd.new_zeros(1, N, N)
        elif name == "positional":
            map_BNN = params[0][(i_N1 - j_N).clamp(min=0)][None]
        else:
            time_map = TIME_MAPS[name]
            past_BN, next_BN = to_padded(gaps.timestamps_T, layout), to_padded(gaps.next_timestamps_T, layout)
            ticks_BNN = next_BN[:, :, None] - past_BN[:, None, :]
            feature_BNN = gap_feature(ticks_BNN, gaps.time_unit, time_map.feature, params[0].dtype)
            map_BNN = time_map.evaluate(feature_BNN, *params)
        map_BNN = map_BNN.masked_fill(j_N > i_N1, 0).to(values_THd.dtype).expand(layout.num_users, N, N)
        outputs.append(from_padded(torch.einsum("bij,bjhd->bihd", map_BNN, v_BNHd), layout))
    return torch.stack(outputs, 2)
