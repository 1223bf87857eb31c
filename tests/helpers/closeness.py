"""How close two results must be that are sums.

A sum may cancel, so its rounding error is bounded by the size of what is summed and not by its own: whatever the order,
|error| <= tolerance * sum of |summands|, with the tolerance that `rounding` derives.

Shapes: T tokens, B users, N padded length, H heads, C channels, d value size per head, E = H * d.
"""

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout, from_padded, to_padded
from fuxi_torchrec.ops.token_mixing.reference import dense_feature, dense_map
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS

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


def assert_sums_close(actual, expected, sizes, tolerance: float) -> None:
    """Compares tensors, each to `tolerance` times the largest of its `sizes`, the sums of absolute values."""
    assert len(actual) == len(expected) == len(sizes)
    for a, e, size in zip(actual, expected, sizes):
        assert a.shape == e.shape == size.shape
        assert torch.isfinite(a).all()
        assert e.numel() == 0 or (a - e).abs().max() <= tolerance * size.max() + UNDERFLOW


@torch.enable_grad()  # in a hook of backward too
def mixing_sizes(values_THd: Tensor, layout: JaggedLayout, channels, gaps, grad_THCd: Tensor) -> list[Tensor]:
    """Sums the absolute values of what `mix_reference` and its gradients sum, in float64.

    Returns:
        In the shapes of the output [T, H, C, d], the gradient of values [T, H, d] and of every parameter.
    """
    real_BN111 = (torch.arange(layout.max_length) < layout.lengths_B[:, None])[:, :, None, None, None]
    v_BNHd = to_padded(values_THd.detach().double().abs(), layout)
    grad_BNHCd = to_padded(grad_THCd.double().abs(), layout) * real_BN111
    output_BNHCd, grad_v_BNHd, params_sizes = torch.zeros_like(grad_BNHCd), torch.zeros_like(v_BNHd), []
    for c, (name, params) in enumerate(channels):
        if name == "zero":
            continue
        params = tuple(p.detach().double().requires_grad_() for p in params)
        map_BNN = dense_map(name, params, layout, gaps)
        size_BNN, grad_BNHd = map_BNN.detach().abs().expand(layout.num_users, -1, -1), grad_BNHCd[:, :, :, c]
        output_BNHCd[:, :, :, c] = torch.einsum("bij,bjhd->bihd", size_BNN, v_BNHd)
        grad_v_BNHd += torch.einsum("bij,bihd->bjhd", size_BNN, grad_BNHd)
        by_map_BNN = torch.einsum("bihd,bjhd->bij", grad_BNHd, v_BNHd)
        if name in ("positional", "bucketed"):  # every slope is 0 or 1
            params_sizes += torch.autograd.grad(map_BNN.expand_as(by_map_BNN), params, by_map_BNN)
        else:
            feature_BNN = dense_feature(name, torch.float64, layout, gaps)
            params_sizes += _parameter_sizes(TIME_MAPS[name].evaluate, params, feature_BNN, by_map_BNN.tril())
    return [from_padded(output_BNHCd, layout), from_padded(grad_v_BNHd, layout), *params_sizes]


def _parameter_sizes(evaluate, params, feature_BNN: Tensor, by_map_BNN: Tensor) -> list[Tensor]:
    """Sums, over the entries of a map, the slope's absolute value times the size of the entry's gradient."""
    entries = by_map_BNN > 0
    slope_of = torch.func.grad(
        lambda *p_and_x: evaluate(p_and_x[-1][None], *p_and_x[:-1])[0], tuple(range(len(params)))
    )
    slopes = torch.func.vmap(slope_of, (None,) * len(params) + (0,))(*params, feature_BNN[entries])
    return [torch.einsum("n,n...->...", by_map_BNN[entries], slope.detach().abs()) for slope in slopes]
