"""Token mixing on small jagged batches, with outputs and gradients to compare."""

import torch

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing import time_maps
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

JAGGED = [0, 1, 5, 7, 101, 100, 0, 140, 139, 1]
LENGTHS = [JAGGED, [1], [37] * 4, [201, 2], [0, 3, 0]]


def times(lengths, largest_gap=10**6):
    """Non-decreasing int64 seconds with ties, and each row's next time."""
    past, future = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for length in lengths:
        steps = torch.randint(0, largest_gap, (length + 1,)) * torch.randint(0, 2, (length + 1,))
        t = 10**9 + steps.cumsum(0)
        past.append(t[:length])
        future.append(t[1 : length + 1])
    return torch.cat(past), torch.cat(future)


def parameters(name, longest):
    if name == "positional":
        return [torch.randn(longest + 3)]
    if name == "bucketed":
        return [torch.randn(time_maps.NUM_BUCKETS + 1)]
    if name == "nn":
        return [torch.randn(s) * 0.5 for s in ((5, 1), (5,), (5, 5), (5,), (1, 5), (1,))]
    return [torch.rand(1) * 0.6 + 0.1 for _ in range(CHANNELS[name].num_scalars)]


def output_and_gradients(lengths, names, implementation, dtype, heads=2, d=3, time_unit=1.0):
    torch.manual_seed(5)
    layout = JaggedLayout.from_lengths(lengths)
    gaps = TimeGaps(*times(lengths), layout, time_unit)
    values = torch.randn(layout.num_tokens, heads, d).to(dtype).requires_grad_()
    channels = [(n, [p.to(dtype).requires_grad_() for p in parameters(n, layout.max_length)]) for n in names]
    out = mix_tokens(values, layout, channels, gaps, implementation)
    leaves = [values] + [p for _, params in channels for p in params]
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape).to(dtype))
    return [out.detach(), *grads]


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.shape == e.shape
        assert torch.isfinite(a).all()
        assert (a - e).abs().max() <= tolerance * e.abs().max() + 1e-30
