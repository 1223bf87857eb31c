"""Token mixing on small jagged batches, with outputs and gradients to compare."""

import torch

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing import time_maps
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from tests.helpers.closeness import assert_sums_close, mixing_sizes, rounding

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
    """[output, gradients of values and of every parameter]; implementation "sizes": of what these sum."""
    torch.manual_seed(5)
    layout = JaggedLayout.from_lengths(lengths)
    gaps = TimeGaps(*times(lengths), layout, time_unit)
    values = torch.randn(layout.num_tokens, heads, d).to(dtype).requires_grad_()
    channels = [(n, [p.to(dtype).requires_grad_() for p in parameters(n, layout.max_length)]) for n in names]
    if implementation == "sizes":
        return mixing_sizes(values, layout, channels, gaps, torch.randn(layout.num_tokens, heads, len(names), d))
    out = mix_tokens(values, layout, channels, gaps, implementation)
    leaves = [values] + [p for _, params in channels for p in params]
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape).to(dtype))
    return [out.detach(), *grads]


def assert_equals_reference(lengths, names, implementation, dtype, heads=2, d=3, approximation=0.0):
    """To rounding: an entry of a map's gradient adds up E products, a result that of one row; users add up in float64 or
    by halves. `approximation`: what entries of the maps may be off besides."""
    expected = output_and_gradients(lengths, names, "reference", torch.float64, heads, d)
    sizes = output_and_gradients(lengths, names, "sizes", torch.float64, heads, d)
    actual = output_and_gradients(lengths, names, implementation, dtype, heads, d)
    tolerance = approximation + sum(rounding(t, max(lengths) + heads * d) for t in (dtype, torch.float64))
    assert_sums_close([x.double() for x in actual], expected, sizes, tolerance)
