"""How FuXi-β's mixer and tower compare with what they replace, forward and backward: ratios of interleaved runs.

    python -m benchmarks.encoder_time [ROW …] [--repeats 5] [--tokens 8192] [--short 2048] [--long 8192] [--threads N]

    mixer    token mixing of one user of --long events (H * d = D, positional and pow channels) against the dense reference,
             and its peak memory there and at half the length
    growth   FuXi-β at --tokens tokens: users of --long events against users of --short ones
    sasrec   SASRec on scaled_dot_product_attention against FuXi-β, at both lengths
    others   HSTU and FuXi-α, blocked and causal, against FuXi-β, at both lengths
    padded   HSTU and FuXi-α in their padded form (whole [B, H, N, N] maps) against their blocked one, users of --short
             events: at --long the maps do not fit

Towers: D = 256 and 4 heads unless --width and --heads say otherwise, two blocks, ffn 1, no dropout; a step makes the layout
of its batch, and what blocks share, anew. Prints a JSON line a row: median milliseconds of each contender, and the ratio of
the medians. All contenders of one invocation take turns, so ask for all rows that are to be compared at once; leave the
machine alone meanwhile.
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager, nullcontext
from typing import Callable, Dict, Iterator, List, Sequence

import torch

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder, fuxi_beta, hstu
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.pointwise_attention import silu_attention_reference
from fuxi_torchrec.ops.token_mixing.dispatch import mix_by_plan, plan_mixing
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from fuxi_torchrec.profiling.memory import PeakMemory

ROWS = ("mixer", "growth", "sasrec", "others", "padded")
Step = Callable[[], None]


def times_of(tokens: int) -> torch.Tensor:
    """int64 seconds, ascending, one more than tokens."""
    return 978_300_000 + torch.randint(0, 5000, (tokens + 1,)).cumsum(0)


def mixer_step(implementation: str, length: int, width: int, heads: int) -> Step:
    """Mixes one user's rows."""
    v_THd = torch.randn(length, heads, width // heads, requires_grad=True)
    weight_N = (0.02 * torch.randn(length)).requires_grad_()
    a, b = torch.tensor([0.1], requires_grad=True), torch.tensor([0.6], requires_grad=True)
    channels = [("positional", [weight_N]), ("pow", [a, b])]
    times_T1, grad_THCd = times_of(length), torch.randn(length, heads, 2, width // heads)

    def step() -> None:
        layout = JaggedLayout.from_lengths([length])
        gaps = TimeGaps(times_T1[:-1], times_T1[1:], layout)
        mixed_THCd = mix_by_plan(v_THd, channels, plan_mixing(v_THd, layout, channels, gaps, implementation))
        torch.autograd.grad(mixed_THCd, [v_THd, weight_N, a, b], grad_THCd)

    return step


def tower_step(name: str, length: int, options: argparse.Namespace) -> Step:
    """Trains a tower on users of one length; "name, padded" in its padded form."""
    encoder, _, padded = name.partition(", ")
    size = options.width // options.heads
    config = ModelConfig(
        encoder=encoder,
        embedding_dim=options.width,
        num_heads=options.heads,
        value_dim=size,
        qk_dim=size,
        num_blocks=options.blocks,
        ffn_multiply=1.0,
        input_dropout=0.0,
        dropout=0.0,
        token_mixing="reference" if padded else "auto",
    )
    tower, users = build_encoder(config, padded_length=length).train(), max(1, options.tokens // length)
    x_TD = torch.randn(users * length, options.width, requires_grad=True)
    times_T1, grad_TD = times_of(len(x_TD)), torch.randn(len(x_TD), options.width)

    def step() -> None:
        layout = JaggedLayout.from_lengths([length] * users)
        with whole_maps() if padded else nullcontext():
            tower(x_TD, times_T1[:-1], times_T1[1:], layout).backward(grad_TD)
        tower.zero_grad()
        x_TD.grad = None

    return step


@contextmanager
def whole_maps() -> Iterator[None]:
    """Pointwise attention through padded [B, H, N, N] maps."""
    before = fuxi_beta.silu_attention, hstu.silu_attention
    fuxi_beta.silu_attention = hstu.silu_attention = silu_attention_reference
    try:
        yield
    finally:
        fuxi_beta.silu_attention, hstu.silu_attention = before


def contenders(rows: Sequence[str], options: argparse.Namespace) -> Dict[str, Step]:
    """By "name at length": each once, however many rows it is in."""
    steps: Dict[str, Step] = {}
    if "mixer" in rows:
        for implementation in ("auto", "reference"):
            name = f"mixer {implementation} at {options.long}"
            steps[name] = mixer_step(implementation, options.long, options.width, options.heads)
    needed: List[tuple] = []
    both = (options.short, options.long)
    for row, towers, lengths in (
        ("growth", ["fuxi_beta"], both),
        ("sasrec", ["fuxi_beta", "sasrec"], both),
        ("others", ["fuxi_beta", "hstu", "fuxi_alpha"], both),
        ("padded", ["hstu", "hstu, padded", "fuxi_alpha", "fuxi_alpha, padded"], both[:1]),
    ):
        needed += [(tower, length) for length in lengths for tower in towers] if row in rows else []
    for tower, length in dict.fromkeys(needed):
        steps[f"{tower} at {length}"] = tower_step(tower, length, options)
    return steps


def interleaved_medians(steps: Dict[str, Step], repeats: int) -> Dict[str, float]:
    """Median milliseconds of each step, run in turns after a warm-up."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_megabytes(step: Step) -> float:
    """Of a step that has run before."""
    memory = PeakMemory(torch.device("cpu"))
    memory.restart()
    step()
    return (memory.peak() or 0) / 1e6


def report(rows: Sequence[str], ms: Dict[str, float], options: argparse.Namespace) -> Iterator[Dict[str, object]]:
    """Yields the lines of the table, by row: times and what they are to each other."""
    short, long = options.short, options.long

    def line(row: str, slow: str, fast: str, reach: object) -> Dict[str, object]:
        shown = {name: round(ms[name], 1) for name in (slow, fast)}
        return {"row": row, "milliseconds": shown, "ratio": round(ms[slow] / ms[fast], 2), "reach": reach}

    if "mixer" in rows:
        yield line("mixer", f"mixer reference at {long}", f"mixer auto at {long}", ">= 40")
        steps = {length: mixer_step("auto", length, options.width, options.heads) for length in (long // 2, long)}
        for step in steps.values():
            step()
        peaks = {length: round(peak_megabytes(step), 1) for length, step in steps.items()}
        ratio = round(peaks[long] / max(peaks[long // 2], 0.1), 2)
        yield {"row": "mixer", "peak_megabytes": peaks, "ratio": ratio, "reach": "about 2"}
    if "growth" in rows:
        yield line("growth", f"fuxi_beta at {long}", f"fuxi_beta at {short}", "<= 1.3")
    if "sasrec" in rows:
        yield line("sasrec", f"sasrec at {short}", f"fuxi_beta at {short}", ">= 1.2")
        yield line("sasrec", f"sasrec at {long}", f"fuxi_beta at {long}", ">= 2.5")
    if "others" in rows:
        for tower in ("hstu", "fuxi_alpha"):
            yield line("others", f"{tower} at {short}", f"fuxi_beta at {short}", "expect >= 2")
            yield line("others", f"{tower} at {long}", f"fuxi_beta at {long}", "expect >= 5")
    if "padded" in rows:
        for tower in ("hstu", "fuxi_alpha"):
            yield line("padded", f"{tower}, padded at {short}", f"{tower} at {short}", ">= 1")


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--short", type=int, default=2048)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = options.rows or ROWS
    medians = interleaved_medians(contenders(rows, options), options.repeats)
    m = torch.randn(2048, 2048)
    rate = interleaved_medians({"product": lambda: m @ m}, 5)["product"]
    machine = {"threads": torch.get_num_threads(), "matmul_gflops": round(2 * 2048**3 / rate / 1e6, 1)}
    print(json.dumps({"tokens": options.tokens, "repeats": options.repeats, **machine}), flush=True)
    for line in report(rows, medians, options):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
