"""What each stage of FuXi-β's training step must at least cost, beside what `fuxi-torchrec bench` measured; as Markdown.

    fuxi-torchrec bench --encoders fuxi_beta … --output runs/bench
    python -m benchmarks.roofline runs/bench/bench.json [--gb-s 20] [--gpu-tflops 66.9] [--gpu-gb-s 3350]

Two numbers a stage, from the config and the lengths: FLOPs (matrix products, causal pairs only) and bytes from and to memory,
if every product reads its factors and writes its result once and all that is element-wise is fused into a neighbour. A
stage's least time is the greater of FLOPs over the rate of products and bytes over the bandwidth. Here these are the
rate that bench measured, or was told, and the bandwidth of a large copy, measured now (or --gb-s). The last column divides by
what the data sheet of a GPU states (default: an H100 SXM's float32 without tensor cores and its HBM3): an estimate by
arithmetic alone, of kernels that reach both peaks and need no time to start. No GPU has been timed.
"""

import argparse
import json
import time
from typing import Dict, Tuple

import torch

from fuxi_torchrec.bench.random_dataset import random_lengths
from fuxi_torchrec.config import CHANNEL_PRESETS, Config, DataConfig, LossConfig, ModelConfig
from fuxi_torchrec.profiling.flops import encoder_flops, loss_flops, non_embedding_parameters
from fuxi_torchrec.profiling.stages import STAGES
from fuxi_torchrec.sharding.memory_estimate import FLOAT_BYTES, ID_BYTES, distinct

OPTIMIZER_FLOATS = 7  # AdamW reads a weight, its gradient and two moments, and writes all but the gradient


def least(config: Config, length: int, tokens: int, items: int) -> Dict[str, Tuple[float, float]]:
    """(bytes, FLOPs) of every stage of a step on bench's random users, per_token negatives and a replicated table."""
    model, K = config.model, config.loss.num_negatives
    lengths = random_lengths(length, tokens, config.trainer.seed).tolist()
    D, E, F = model.embedding_dim, model.num_heads * model.value_dim, int(model.embedding_dim * model.ffn_multiply)
    C, events = len(model.channels or CHANNEL_PRESETS["fuxi_beta"]), tokens + len(lengths)
    candidates = distinct(tokens * K, items)
    blocks = non_embedding_parameters(model, length + 11)
    weights = blocks + (length + 11 + items) * D
    # A block, a token: input and residual read, z written, v read, y written, u and y read, the residual sum written and
    # read twice, the feed-forward layer's two halves written and read, the output written.
    of_block = 6 * D + (4 * C + 2) * E + 4 * F
    forward = FLOAT_BYTES * (tokens * (model.num_blocks * of_block + 2 * D) + blocks)
    # Outputs, positives and candidates are read, each position's drawn numbers too; candidates come from the cache after that.
    loss = FLOAT_BYTES * (2 * tokens * D + candidates * D + tokens * K)
    tower, softmax = encoder_flops(model, lengths), loss_flops(tokens, K, D)
    stages = {
        # Ids and times in, a drawn number for every negative out.
        "loader": (2 * ID_BYTES * events + FLOAT_BYTES * tokens * K, 0),
        "lookup and exchange": (2 * FLOAT_BYTES * D * (events + candidates), 0),
        "encoder forward": (forward, tower),
        "loss": (loss, softmax),
        # Each factor's gradient needs the other factor and the result's gradient; the table's rows get theirs.
        "backward": (2 * (forward + loss) + FLOAT_BYTES * items * D, 2 * (tower + softmax)),
        "optimizer": (OPTIMIZER_FLOATS * FLOAT_BYTES * weights, 0),
    }
    assert tuple(stages) == STAGES
    return stages


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy much larger than the cache."""
    x = torch.ones(2**27)
    y, best = torch.empty_like(x), float("inf")
    for _ in range(7):
        start = time.perf_counter()
        y.copy_(x)
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


def table(row: dict, config: Config, items: int, rates: Tuple[float, float], gpu: Tuple[float, float]) -> str:
    """Markdown; rates: FLOP/s and bytes/s."""
    lines = [
        f"**{row['length']:,} events at most, {row['users']} users, {row['tokens']:,} tokens:** "
        f"{1000 * row['seconds']:,.1f} ms a step, {row['tokens_per_second']:,.0f} tokens/s.",
        "",
        "| stage | MB | GFLOP | least here, ms | measured, ms | measured / least | GPU at least, µs (estimate) |",
        "|---|---|---|---|---|---|---|",
    ]
    totals = [0.0] * 5
    for name, (bytes_, flops) in least(config, row["length"], row["tokens"], items).items():
        here, there = (max(flops / rate, bytes_ / bandwidth) for rate, bandwidth in (rates, gpu))
        values = (bytes_ / 1e6, flops / 1e9, 1e3 * here, 1e3 * row["stages"][name], 1e6 * there)
        totals = [total + value for total, value in zip(totals, values)]
        lines.append(_line(name, *values))
    return "\n".join([*lines, _line("all", *totals)])


def _line(name: str, megabytes: float, gigaflops: float, here: float, measured: float, there: float) -> str:
    ratio = f"{measured / here:.1f}"
    return f"| {name} | {megabytes:,.1f} | {gigaflops:,.2f} | {here:,.2f} | {measured:,.2f} | {ratio} | {there:,.0f} |"


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="bench.json, of one process")
    parser.add_argument("--gb-s", type=float, default=None, help="memory bandwidth here, 10^9 bytes/s; default: measured")
    parser.add_argument("--gpu-tflops", type=float, default=66.9)
    parser.add_argument("--gpu-gb-s", type=float, default=3350.0)
    options = parser.parse_args()
    with open(options.results, encoding="utf-8") as file:
        results = json.load(file)
    machine, sections = results["machine"], results["config"]
    model, loss = ModelConfig(**sections["model"]), LossConfig(**sections["loss"])
    if model.encoder != "fuxi_beta" or loss.negatives != "per_token":
        parser.error("the least costs are those of fuxi_beta with per_token negatives")
    bandwidth = options.gb_s * 1e9 if options.gb_s else copy_rate()
    rates, gpu = (machine["peak_tflops"] * 1e12, bandwidth), (options.gpu_tflops * 1e12, options.gpu_gb_s * 1e9)
    print(f"Products {rates[0] / 1e9:,.0f} GFLOP/s, memory {bandwidth / 1e9:,.1f} GB/s here.\n")
    for row in results["rows"]:
        if row["encoder"] == "fuxi_beta":
            config = Config(data=DataConfig(max_sequence_length=row["length"]), model=model, loss=loss)
            config.trainer.seed = sections["trainer"]["seed"]
            print(table(row, config, machine["items"], rates, gpu) + "\n")


if __name__ == "__main__":
    main()
