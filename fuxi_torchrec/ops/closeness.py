"""How close two results must be that are sums: what tests and benchmarks compare kernels by.

A sum may cancel, so its rounding error is bounded by the size of what is summed and not by its own: whatever the order,
|error| <= tolerance * sum of |summands|, with the tolerance that `rounding` derives.

Shapes: T tokens, B users, N padded length, H heads, C channels, d value size per head, E = H * d; D embedding, K negatives
a token.
"""

from typing import Callable, List, Optional, Sequence

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout, from_padded, to_padded
from fuxi_torchrec.ops.sampled_softmax.common import MASKED_LOGIT
from fuxi_torchrec.ops.token_mixing.reference import dense_feature, dense_map
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS, Channel

MAP_ROUNDINGS = 64
"""Units of roundoff that an entry of a map, or of its derivative, may be off. With a power law's b up to 0.7 and gaps x of
up to 2e8 s: x is rounded twice and 1 + x once, ln(1 + x) <= 19 is off by 2 units of itself and its product with b by one,
so the exponent by 0.7 (3 + 2 * 19) + 0.7 * 19 = 42; e^ itself by 4, and products with a, b and ln(1 + x) by 6."""

UNDERFLOW = 1e-30
"""What entries of a map that underflow, below e^-87, may add up to, times gaps and rates."""


def rounding(dtype: torch.dtype, additions: int) -> float:
    """Bounds a sum's rounding error, as a part of the sum of its summands' absolute values.

    `additions` that one result passes through in `dtype` add 6 sqrt(additions) units of roundoff, the bound of Higham and
    Mary (2019, theorem 2.4) that one sum in 10^7 exceeds."""
    return (MAP_ROUNDINGS + 6 * additions**0.5) * torch.finfo(dtype).eps / 2


def softmax_rounding(outputs_TD: Tensor, others_KD: Tensor, temperature: float, additions: int) -> float:
    """Bounds the rounding error of a sampled softmax in float32, as a part of the sizes of `softmax_sizes`.

    A logit is off by `rounding` of a product of D times the product of the norms over the temperature; a candidate's
    probability relatively by that of its logit and of the log-sum-exp; `additions` of such summands follow."""
    norms = [x.double().norm(dim=-1).max().item() if x.numel() else 0.0 for x in (outputs_TD, others_KD)]
    logit = rounding(torch.float32, outputs_TD.shape[-1]) * norms[0] * norms[1] / temperature
    return 2 * logit + 2 * rounding(torch.float32, additions)


@torch.enable_grad()  # in a hook of backward too
def mixing_sizes(
    values_THd: Tensor,
    layout: JaggedLayout,
    channels: Sequence[Channel],
    gaps: Optional[TimeGaps],
    grad_THCd: Tensor,
) -> List[Tensor]:
    """Sums the absolute values of what `mix_reference` and its gradients sum, in float64.

    Returns:
        In the shapes of the output [T, H, C, d], the gradient of values [T, H, d] and of every parameter.
    """
    position_N = torch.arange(layout.max_length, device=layout.device)
    real_BN111 = (position_N < layout.lengths_B[:, None])[:, :, None, None, None]
    v_BNHd = to_padded(values_THd.detach().double().abs(), layout)
    grad_BNHCd = to_padded(grad_THCd.double().abs(), layout) * real_BN111
    output_BNHCd, grad_v_BNHd = torch.zeros_like(grad_BNHCd), torch.zeros_like(v_BNHd)
    params_sizes: List[Tensor] = []
    for c, (name, params) in enumerate(channels):
        if name == "zero":
            continue
        params = [p.detach().double().requires_grad_() for p in params]
        map_BNN = dense_map(name, params, layout, gaps)
        size_BNN, grad_BNHd = map_BNN.detach().abs().expand(layout.num_users, -1, -1), grad_BNHCd[:, :, :, c]
        output_BNHCd[:, :, :, c] = torch.einsum("bij,bjhd->bihd", size_BNN, v_BNHd)
        grad_v_BNHd += torch.einsum("bij,bihd->bjhd", size_BNN, grad_BNHd)
        by_map_BNN = torch.einsum("bihd,bjhd->bij", grad_BNHd, v_BNHd)
        if name in ("positional", "bucketed"):  # every slope is 0 or 1
            params_sizes += torch.autograd.grad(map_BNN.expand_as(by_map_BNN), params, by_map_BNN)
        else:
            assert gaps is not None
            feature_BNN = dense_feature(name, torch.float64, layout, gaps)
            params_sizes += _parameter_sizes(TIME_MAPS[name].evaluate, params, feature_BNN, by_map_BNN.tril())
    return [from_padded(output_BNHCd, layout), from_padded(grad_v_BNHd, layout), *params_sizes]


def _parameter_sizes(
    evaluate: Callable[..., Tensor], params: Sequence[Tensor], feature_BNN: Tensor, by_map_BNN: Tensor
) -> List[Tensor]:
    """Sums, over the entries of a map, the slope's absolute value times the size of the entry's gradient."""
    entries = by_map_BNN > 0
    slope_of = torch.func.grad(
        lambda *p_and_x: evaluate(p_and_x[-1][None], *p_and_x[:-1])[0], tuple(range(len(params)))
    )
    slopes = torch.func.vmap(slope_of, (None,) * len(params) + (0,))(*params, feature_BNN[entries])
    return [torch.einsum("n,n...->...", by_map_BNN[entries], slope.detach().abs()) for slope in slopes]


def softmax_sizes(
    outputs_TD: Tensor, positives_TD: Tensor, negatives_TKD: Tensor, is_masked_TK: Tensor, temperature: float
) -> List[Tensor]:
    """Sums the absolute values of what `sampled_softmax_reference` and its gradients sum, in float64.

    Returns:
        Of the loss (a token counts 1 more: what its logits' errors add does not shrink with it), and in the shapes of the
        gradients of outputs, positives and negatives.
    """
    o_TD, p_TD, n_TKD = (x.detach().double() for x in (outputs_TD, positives_TD, negatives_TKD))
    positive_T1 = (o_TD * p_TD).sum(-1, keepdim=True) / temperature
    negative_TK = (torch.einsum("td,tkd->tk", o_TD, n_TKD) / temperature).masked_fill(is_masked_TK, MASKED_LOGIT)
    logs_TK1 = torch.log_softmax(torch.cat([positive_T1, negative_TK], 1), 1)
    own_T1, others_TK = 1 + logs_TK1[:, :1].exp(), logs_TK1[:, 1:].exp()  # the positive's slope is its probability - 1
    by_outputs_TD = torch.einsum("tk,tkd->td", others_TK, n_TKD.abs()) + own_T1 * p_TD.abs()
    by_negatives_TKD = others_TK[:, :, None] * o_TD.abs()[:, None]
    by_rows = (by_outputs_TD, own_T1 * o_TD.abs(), by_negatives_TKD)
    return [(1 + logs_TK1[:, 0].abs()).sum(), *(x / temperature for x in by_rows)]
