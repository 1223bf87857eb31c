"""Random inputs of the C kernels, of any shape and layout, against plain PyTorch in float64: python -m
tests.helpers.native_cases CASES runs so many (make sanitize)."""

import random
import sys

import torch
from torch.nn import functional as F

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise import dispatch as row_wise
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from tests.helpers.closeness import assert_sums_close, mixing_sizes, rounding
from tests.helpers.mixing import parameters, times

LAYOUTS = {
    "columns of a wider matrix": lambda T, H, d: torch.randn(T, H * d + 9)[:, 5 : 5 + H * d].unflatten(1, (H, d)),
    "columns of wider heads": lambda T, H, d: torch.randn(T, H, d + 16)[:, :, :d],
    "heads first": lambda T, H, d: torch.randn(H, T, d).transpose(0, 1),
    "columns first": lambda T, H, d: torch.randn(H, d, T).permute(2, 0, 1),
    "every other row": lambda T, H, d: torch.randn(2 * T, H, d)[::2],
    "one row for all": lambda T, H, d: torch.randn(1, H, d).expand(T, H, d),
}
"""Tensors [T, H, d] whose rows, heads or columns lie apart."""


def check_mixing(draw: random.Random) -> None:
    """Output and every gradient of users of 0 to 150 rows, and at times one who is mixed in linear time."""
    lengths = [draw.randint(1, 9), *(draw.choice((0, 1, draw.randint(1, 150))) for _ in range(draw.randint(0, 4)))]
    if draw.random() < 0.3:
        lengths.append(draw.randint(1025, 1300))
    heads, d = draw.choice(((1, 1), (1, 50), (2, 8), (3, 5), (8, 12)))
    names = draw.choice((("positional", "pow"), ("exp", "positional"), ("zero", "positional"), ("pow",)))
    implementation = draw.choice(("native", "linear"))
    layout = JaggedLayout.from_lengths(lengths)
    values = draw.choice(list(LAYOUTS.values()))(layout.num_tokens, heads, d)
    gaps = TimeGaps(*times(lengths), layout)
    channels = [(name, parameters(name, layout.max_length)) for name in names]
    grad = LAYOUTS["columns of wider heads"](layout.num_tokens, heads * len(names), d).unflatten(1, (heads, len(names)))
    results = []
    for kind, dtype in ((implementation, torch.float32), ("reference", torch.float64)):
        # Neither a copy nor a leaf: a copy would be contiguous.
        v = values if dtype == values.dtype else values.to(dtype)
        typed = [(name, [p.to(dtype).requires_grad_() for p in params]) for name, params in channels]
        leaves = [v.requires_grad_(), *(p for _, params in typed for p in params)]
        out = mix_tokens(v, layout, typed, gaps, kind)
        results.append([x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))])
    sizes = mixing_sizes(values, layout, channels, gaps, grad)
    approximation = 3 * gaps.times.tolerance if implementation == "linear" and "pow" in names else 0.0
    assert_sums_close(*results, sizes, approximation + rounding(torch.float32, max(lengths) + heads * d))


def check_softmax(draw: random.Random) -> None:
    """The loss and the gradients of outputs, positives and candidates."""
    T, U, K, D = draw.randint(0, 90), draw.randint(1, 60), draw.randint(1, 70), draw.randint(1, 70)
    rows = [F.normalize(torch.randn(n, D + 3)[:, :D]) for n in (T, T, U)]
    index, positive = torch.randint(0, U, (T, K)), torch.randint(-1, U, (T,))
    bias = torch.randn(U)
    inputs = [x.requires_grad_() for x in rows]
    exact = [x.detach().double().requires_grad_() for x in rows]
    loss = per_token_sampled_softmax(*inputs, index, positive, 0.1, bias, chunk_logits=draw.choice((1, 500, 10**6)))
    gathered = exact[2][index]
    expected = sampled_softmax_reference(exact[0], exact[1], gathered, index == positive[:, None], 0.1, bias[index])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    for a, e in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact)):
        # Weights of one token add up to 1, products are over the temperature, and a candidate may be any token's.
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-6 * max(1, T))


def check_rows(draw: random.Random) -> None:
    """Norms, gates and activations on views."""
    T, W = draw.randint(0, 60), 2 * draw.randint(1, 40)
    x, gate = (draw.choice((1.0, 30.0)) * torch.randn(T, W + 4)[:, 2:-2] for _ in range(2))
    table, position, first = torch.randn(7, W), torch.randint(0, 7, (T,)), draw.randint(0, W)
    cases = [
        (lambda x: row_wise.rms_norm(x), lambda x: F.rms_norm(x, (W,), eps=1e-6), [x]),
        (lambda g, x: row_wise.gated_rms_norm(g, x), lambda g, x: g * F.rms_norm(x, (W,), eps=1e-6), [gate, x]),
        (row_wise.swiglu, lambda x: F.silu(x[:, : W // 2]) * x[:, W // 2 :], [x]),
        (lambda x: torch.cat(row_wise.silu_split(x, (first, W - first)), 1), F.silu, [x]),
        (row_wise.l2_normalize, lambda x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-6), [x]),
        (
            lambda x, t: row_wise.add_positions(x, t, position, 0.0, True),
            lambda x, t: x * W**0.5 + t[position],
            [x, table],
        ),
    ]
    for function, plain, inputs in cases:
        leaves = [x.detach().requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        actual, expected = function(*leaves), plain(*exact)
        slope = torch.randn(actual.shape)
        results = (actual, *torch.autograd.grad(actual, leaves, slope))
        for a, e in zip(results, (expected, *torch.autograd.grad(expected, exact, slope.double()))):
            largest = max(1.0, e.abs().max().item() if e.numel() else 0.0)
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * largest)


def check(seed: int) -> None:
    """Checks one random case of each group of kernels."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    for one in (check_mixing, check_softmax, check_rows):
        one(draw)


if __name__ == "__main__":
    assert native.library() is not None, "the kernels could not be had"
    for seed in range(int(sys.argv[1])):
        check(seed)
    print(f"{sys.argv[1]} random cases agree with PyTorch in float64")
