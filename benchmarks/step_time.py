"""One training step of this project against the same step as research code spells it, in turns in one process.

    python -m benchmarks.step_time [SHAPE …] [--steps 5] [--seed 0]

Both train on the same users with the same hyperparameters. Ours is the product's own: `Trainer`'s step with its batch
made in line (splitting, collation, negative sampling), TorchRec's table under DistributedModelParallel, tower, loss,
backward and AdamW. Prints one JSON line a shape: median and quickest seconds of each, their ratio, the losses of the
first and the last step (they agree up to the random draws), and the machine's matrix-product rate and load in the same
minute. Compare on an otherwise idle machine: threads whose core something else uses wait for each other, which can cost
a step ten times its own work.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Callable, Dict, List

import numpy as np
import torch

from benchmarks.research_step import LONGEST, SHAPES, PaddedUsers, ResearchStep, Shape, draw_users
from fuxi_torchrec.bench.random_dataset import MemoryDataset
from fuxi_torchrec.config import Config, DataConfig, ModelConfig, TrainerConfig
from fuxi_torchrec.data.loader import StreamCursor
from fuxi_torchrec.distributed.world import start_world
from fuxi_torchrec.profiling.memory import keep_freed_memory
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.training.build import build_trainer


def memory_dataset(shape: Shape, users: PaddedUsers) -> MemoryDataset:
    """Exactly the padded users, each with one more event: the one that is tested on."""
    events_B = (users.lengths_B + 2).numpy()
    keep_BN = np.arange(users.ids_BN.shape[1])[None] < events_B[:, None]
    ids_E, times_E = users.ids_BN.numpy()[keep_BN] - 1, users.timestamps_BN.numpy()[keep_BN]
    return MemoryDataset(events_B, ids_E, times_E, shape.items)


class OwnStep:
    """`step()` trains on the users once, an epoch of one batch, and returns the loss. Close the stack after use."""

    def __init__(self, shape: Shape, users: PaddedUsers, seed: int, stack: ExitStack):
        config = Config(
            data=DataConfig(max_sequence_length=LONGEST, batch_size=shape.users),
            model=ModelConfig(
                encoder="fuxi_beta",
                embedding_dim=shape.embedding_dim,
                num_blocks=shape.blocks,
                num_heads=shape.heads,
                value_dim=shape.value_dim,
                ffn_multiply=shape.ffn_multiply,
            ),
            trainer=TrainerConfig(device="cpu", seed=seed),
        )
        run = RunFolder(stack.enter_context(tempfile.TemporaryDirectory()))
        world = stack.enter_context(start_world("cpu"))
        self.trainer = build_trainer(config, memory_dataset(shape, users), run, world)
        stack.callback(self.trainer.progression.close)
        self.cursor = StreamCursor()

    def step(self) -> float:
        """Trains on all users once; returns the loss."""
        (batch,) = self.trainer.stream.epoch(self.cursor)
        self.trainer.step(batch)
        loss = self.trainer.record.loss
        self.cursor = replace(self.cursor, epoch=self.cursor.epoch + 1, step=batch.cursor.step)
        return loss


def compare(shape: Shape, steps: int, seed: int) -> Dict[str, object]:
    """Times both programs' steps in turns on the same users; returns medians and their ratio."""
    users, load = draw_users(shape, seed), os.getloadavg()[0]
    with ExitStack() as stack:
        contenders = {"research": ResearchStep(shape, users, seed), "ours": OwnStep(shape, users, seed, stack)}
        seconds: Dict[str, List[float]] = {name: [] for name in contenders}
        losses: Dict[str, List[float]] = {name: [] for name in contenders}
        for turn in range(steps + 1):
            for name, contender in contenders.items():
                taken = clock(lambda: losses[name].append(contender.step()))  # noqa: B023 (called at once)
                if turn:  # the first one warms up
                    seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    m = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / statistics.median(clock(lambda: m @ m) for _ in range(5)) / 1e9
    return {
        "tokens": users.tokens,
        "steps": steps,
        **{f"{name}_seconds": round(median[name], 4) for name in contenders},
        **{f"{name}_quickest": round(min(seconds[name]), 4) for name in contenders},
        "ratio": round(median["research"] / median["ours"], 2),
        "ratio_of_quickest": round(min(seconds["research"]) / min(seconds["ours"]), 2),
        "ours_tokens_per_second": round(users.tokens / median["ours"]),
        **{f"{name}_losses": [round(losses[name][0], 4), round(losses[name][-1], 4)] for name in contenders},
        "threads": torch.get_num_threads(),
        "matmul_gflops": round(rate, 1),
        "load_before": round(load, 2),
    }


def clock(work: Callable[[], object]) -> float:
    """Runs the work; returns its seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    keep_freed_memory()  # as training does, and for both
    for name in options.shapes or SHAPES:
        print(json.dumps({"shape": name, **compare(SHAPES[name], options.steps, options.seed)}), flush=True)


if __name__ == "__main__":
    main()
