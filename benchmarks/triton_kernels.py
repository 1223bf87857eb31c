"""The Triton kernels against the plain implementations on one device: largest difference of output and gradients, and
milliseconds of a forward and backward, interleaved. Needs torch and Triton alone.

    python -m benchmarks.triton_kernels [--lengths 128 512 2048 8192] [--tokens 16384] [--heads 8] [--value-dim 32]

On a CPU it runs with TRITON_INTERPRET=1, to try the script; those times say nothing.
"""

import argparse
import statistics
import time

import torch

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

TAU = 0.05


def jagged_lengths(longest, tokens):
    """Users of half the length to the whole of it, about `tokens` in all; at least one has the longest."""
    lengths = [longest]
    while sum(lengths) < tokens:
        lengths.append(longest - len(lengths) * 37 % (longest // 2 + 1))
    return lengths


def mixing(lengths, heads, value_dim, dtype, form, device):
    """implementation -> a step that returns [output, gradients]."""
    torch.manual_seed(0)
    layout = JaggedLayout.from_lengths(lengths, device)
    T = layout.num_tokens
    times = 1_000_000_000 + torch.randint(0, 5000, (T + 1,)).cumsum(0).to(device)
    values = torch.randn(T, heads, value_dim).to(device, dtype).requires_grad_()
    shapes = {"positional": [max(lengths)], "pow": [1, 1], "bucketed": [129]}
    channels = [
        (name, [torch.rand(n).to(device).requires_grad_() for n in shapes[name]]) for name in ("positional", form)
    ]
    leaves = [values] + [p for _, params in channels for p in params]
    grad = torch.randn(T, heads, 2, value_dim).to(device, dtype)

    def step(implementation):
        gaps = TimeGaps(times[:-1], times[1:], layout)  # made for every batch in training too
        out = mix_tokens(values, layout, channels, gaps, implementation)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    return {name: lambda name=name: step(name) for name in ("triton", "blocked")}


def losses(kind, tokens, width, device, pool=2048, negatives=128, unique=3706):
    """Makes a step of a sampled softmax on random data, by its implementation."""
    torch.manual_seed(0)
    rows = tokens, tokens, pool if kind == "shared" else unique
    inputs = [l2_normalize(torch.randn(n, width)).to(device).requires_grad_() for n in rows]
    own = torch.randint(0, rows[2], (tokens,)).to(device)
    index = torch.randint(0, unique, (tokens, negatives), dtype=torch.int32).to(device)

    def step(implementation):
        if kind == "shared":
            ids = torch.arange(pool, device=device)
            loss = shared_sampled_softmax(*inputs, ids, own, TAU, implementation=implementation)
        else:
            loss = per_token_sampled_softmax(*inputs, index, own, TAU, implementation=implementation)
        return [loss, *torch.autograd.grad(loss, inputs)]

    return {name: lambda name=name: step(name) for name in ("triton", "chunked")}


def compare(title, steps, device, repeats):
    """Prints medians of interleaved runs and the largest difference, relative to the largest entry."""
    results = {name: step() for name, step in steps.items()}
    kernels, plain = results.values()
    differences = [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(kernels, plain)]
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times[name].append(1000 * (time.perf_counter() - start))
    medians = ", ".join(f"{name} {statistics.median(t):.3f} ms" for name, t in times.items())
    print(f"{title}: {medians}; largest difference {max(differences):.1e}", flush=True)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main():
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--value-dim", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreted: these times say nothing")
    for longest in args.lengths:
        lengths = jagged_lengths(longest, args.tokens)
        for dtype in (torch.float32, torch.bfloat16):
            for form in ("pow", "bucketed"):
                steps = mixing(lengths, args.heads, args.value_dim, dtype, form, device)
                title = f"mixing, {form}, {dtype}, {len(lengths)} users of up to {longest}"
                compare(title, steps, device, args.repeats)
    for kind in ("shared", "per_token"):
        width = args.heads * args.value_dim
        compare(f"{kind} loss, D = {width}", losses(kind, args.tokens, width, device), device, args.repeats)


if __name__ == "__main__":
    main()
