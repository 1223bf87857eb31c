"""Where one token mixer overtakes another: both channels, forward and backward, at a fixed number of tokens.

    python -m benchmarks.mixer_crossing [--tokens 8192] [--widths 64 256] [--lengths 512 1024 2048 4096] [--rounds 3]

Prints a JSON line for each width and length: median milliseconds of interleaved rounds.
"""

import argparse
import json
import statistics
import time

import torch

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing.dispatch import mix_by_plan, plan_mixing
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

IMPLEMENTATIONS = ("native", "linear", "blocked")


def compare(tokens: int, width: int, length: int, rounds: int) -> dict:
    """Times the implementations in turns at one length; returns their medians."""
    torch.manual_seed(0)
    layout = JaggedLayout.from_lengths([length] * max(1, tokens // length))
    times_T = torch.randint(0, 5000, (layout.num_tokens,)).cumsum(0)
    values = torch.randn(layout.num_tokens, 1, width, requires_grad=True)
    parameters = [x.requires_grad_() for x in (torch.randn(length), torch.tensor([0.1]), torch.tensor([0.6]))]
    channels = [("positional", parameters[:1]), ("pow", parameters[1:])]
    gaps, slope = TimeGaps(times_T, times_T + 50, layout), torch.randn(layout.num_tokens, 1, 2, width)
    milliseconds = {name: [] for name in IMPLEMENTATIONS}
    for turn in range(rounds + 1):
        for name, taken in milliseconds.items():
            plan = plan_mixing(values, layout, channels, gaps, name)
            start = time.perf_counter()
            mixed = mix_by_plan(values, channels, plan)
            torch.autograd.grad(mixed, [values, *parameters], slope)
            if turn:  # the first one warms up
                taken.append(1e3 * (time.perf_counter() - start))
    medians = {name: round(statistics.median(taken), 1) for name, taken in milliseconds.items()}
    return {"tokens": layout.num_tokens, "width": width, "length": length, **medians}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for width in options.widths:
        for length in options.lengths:
            print(json.dumps(compare(options.tokens, width, length, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
