"""Pointwise (SiLU) attention on jagged rows: HSTU's attention and FuXi-α's semantic channel.

A^(head)[i,j] = SiLU(q_i · k_j + bias[i,j]) · scale for j <= i of the same user, y = A v. Source: HSTU (arXiv
2402.17152), equation 2; docs/models.md.

Shapes: T tokens, H heads, q query/key and d value size per head; in a length group G users and n positions.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fuxi_torchrec.ops.fused import wide
from fuxi_torchrec.ops.jagged import JaggedLayout, LengthGroup, from_slots, to_slots
from fuxi_torchrec.ops.time_maps import TIME_MAPS, TimeGaps


def silu_attention(
    queries_THq: Tensor,
    keys_THq: Tensor,
    values_THd: Tensor,
    layout: JaggedLayout,
    scale: float,
    lag_weights_N: Optional[Tensor] = None,
    bucket_weights: Optional[Tensor] = None,
    gaps: Optional[TimeGaps] = None,
) -> Tensor:
    """y = A v on jagged rows, [T, H, d]; dense within a length group, one group at a time.

    The bias is lag_weights_N[i - j] + bucket_weights[bucket(t_{i+1} - t_j)], the same for every head; without weights
    there is none. Bias and SiLU are float32 under autocast, the products are not.
    """
    qkv_P = [to_slots(x, layout) for x in (queries_THq, keys_THq, values_THd)]
    outputs = [values_THd.new_zeros(0, *values_THd.shape[1:])]
    for group in layout.groups:
        q_GHnq, k_GHnq, v_GHnd = (
            x[group.start : group.stop].unflatten(0, (group.length, group.users)).permute(1, 2, 0, 3) for x in qkv_P
        )
        scores_GHnn = wide(q_GHnq @ k_GHnq.mT)
        bias_Gnn = _bias(group, lag_weights_N, bucket_weights, gaps)
        if bias_Gnn is not None:
            scores_GHnn = scores_GHnn + bias_Gnn.unsqueeze(1)
        map_GHnn = (F.silu(scores_GHnn) * scale).tril()
        y_GHnd = map_GHnn.to(v_GHnd.dtype) @ v_GHnd
        outputs.append(y_GHnd.permute(2, 0, 1, 3).flatten(0, 1))
    return from_slots(torch.cat(outputs), layout)


def _bias(
    group: LengthGroup, lag_weights_N: Optional[Tensor], bucket_weights: Optional[Tensor], gaps: Optional[TimeGaps]
) -> Optional[Tensor]:
    """[G or 1, n, n], or None."""
    bias = None
    n = group.length
    if lag_weights_N is not None:
        position_n = torch.arange(n, device=lag_weights_N.device)
        bias = lag_weights_N[(position_n[:, None] - position_n).clamp(min=0)][None]
    if bucket_weights is not None:
        assert gaps is not None
        bucket_Gnn = gaps.strip(group, (0, n), "bucket", bucket_weights.dtype)
        time_Gnn = TIME_MAPS["bucketed"].evaluate(bucket_Gnn, bucket_weights)
        bias = time_Gnn if bias is None else bias + time_Gnn
    return bias
