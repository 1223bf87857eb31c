"""Time of an encoder's forward and backward in training mode on ML-1M's shape, and of the token mixer alone, blocked
against dense reference, interleaved.

    python -m benchmarks.encoder_time [--encoder fuxi_beta] [--users 128] [--repeats 15] [--threads N]
"""

import argparse
import statistics
import time

import torch

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.time_maps import TimeGaps
from fuxi_torchrec.ops.token_mixing import mix_tokens

LONGEST = 199


def batch(users):
    """Lengths as in the yardstick, times in seconds."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(users, generator=generator) + 4.6).exp().long().clamp(20, LONGEST).tolist()
    gaps = torch.randint(0, 5000, (sum(lengths) + 1,), generator=generator)
    times_T = 978_300_000 + gaps.cumsum(0)
    return lengths, times_T[:-1], times_T[1:]


def encoder_step(encoder, lengths, times_T, next_T):
    x_TD = torch.randn(len(times_T), encoder.embedding_dim, requires_grad=True)

    def step():
        layout = JaggedLayout.from_lengths(lengths)
        out_TD = encoder(x_TD, times_T, next_T, layout)
        out_TD.backward(torch.ones_like(out_TD))

    return step


def mixer_step(implementation, lengths, times_T, next_T, heads, value_dim):
    v_THd = torch.randn(len(times_T), heads, value_dim, requires_grad=True)
    weight_N = (0.02 * torch.randn(LONGEST + 12)).requires_grad_()
    a, b = torch.tensor([0.1], requires_grad=True), torch.tensor([0.6], requires_grad=True)
    channels = [("positional", [weight_N]), ("pow", [a, b])]

    def step():
        layout = JaggedLayout.from_lengths(lengths)
        gaps = TimeGaps(times_T, next_T, layout)
        y_THCd = mix_tokens(v_THd, layout, channels, gaps, implementation)
        y_THCd.backward(torch.ones_like(y_THCd))

    return step


def interleaved_medians(steps, repeats):
    """Median milliseconds of each step, run in turns after one warm-up."""
    times = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="fuxi_beta")
    parser.add_argument("--users", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ModelConfig(encoder=args.encoder)
    lengths, times_T, next_T = batch(args.users)
    encoder = build_encoder(config, padded_length=LONGEST + 12).train()
    mixer = (lengths, times_T, next_T, config.num_heads, config.value_dim)
    steps = {
        f"{args.encoder} forward + backward": encoder_step(encoder, lengths, times_T, next_T),
        "mixer, blocked": mixer_step("blocked", *mixer),
        "mixer, reference": mixer_step("reference", *mixer),
    }
    print(f"{len(times_T)} tokens, {args.users} users, {torch.get_num_threads()} threads, median of {args.repeats}")
    medians = interleaved_medians(steps, args.repeats)
    for name, milliseconds in medians.items():
        print(f"{name:32} {milliseconds:8.1f} ms")
    print(f"{'reference / blocked':32} {medians['mixer, reference'] / medians['mixer, blocked']:8.1f} x")


if __name__ == "__main__":
    main()
