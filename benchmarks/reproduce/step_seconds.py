"""Training steps of several configs on one data set, in turns in one process: who is faster, under equal load.

    python -m benchmarks.reproduce.step_seconds data/ml-1m CONFIG.yaml [CONFIG.yaml …] [--steps 7] [--output steps.json]

A step is the trainer's own: batch (splitting, collation, negatives), tower, loss, backward, AdamW. All models see the same
batches. Prints median and quickest seconds of each, and the ratio of medians to the first config's. Use an otherwise
idle machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Dict, List

import torch

from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import StreamCursor
from fuxi_torchrec.distributed.world import World, start_world
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.training.build import build_trainer


class Stepper:
    """`step()` makes the next training step of a config, one epoch after the other."""

    def __init__(self, path: str, dataset: SequenceDataset, world: World, stack: ExitStack):
        config = load_config(path, ["--trainer.device", "cpu"])
        run = RunFolder(stack.enter_context(tempfile.TemporaryDirectory()))
        self.trainer = build_trainer(config, dataset, run, world)
        stack.callback(self.trainer.progression.close)
        self.batches = self.trainer.stream.epoch(StreamCursor())

    def step(self) -> float:
        """Seconds of the step."""
        started = time.perf_counter()
        batch = next(self.batches, None)
        if batch is None:
            self.batches = self.trainer.stream.epoch(StreamCursor(epoch=self.trainer.state.cursor.epoch + 1))
            return self.step()
        self.trainer.step(batch)
        return time.perf_counter() - started


def measure(configs: Dict[str, str], dataset: SequenceDataset, steps: int) -> Dict[str, List[float]]:
    """{name: seconds of each step} of {name: config's path}; the first turn, which warms up, is left out."""
    with ExitStack() as stack:
        world = stack.enter_context(start_world("cpu"))
        steppers = {name: Stepper(path, dataset, world, stack) for name, path in configs.items()}
        turns = [{name: stepper.step() for name, stepper in steppers.items()} for _ in range(steps + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in configs}


def main() -> None:
    """Measures the steps from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of a prepared data set")
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output", help="also write them to this JSON file")
    options = parser.parse_args()
    seconds = measure({path: path for path in options.configs}, SequenceDataset(options.data), options.steps)
    medians = {path: statistics.median(values) for path, values in seconds.items()}
    print(f"{torch.get_num_threads()} threads, {options.steps} steps in turns")
    for path, median in medians.items():
        ratio = median / medians[options.configs[0]]
        print(f"{path}: {median:.4f} s (quickest {min(seconds[path]):.4f}), {ratio:.3f} of the first")
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"threads": torch.get_num_threads(), "seconds": seconds}, file, indent=1)


if __name__ == "__main__":
    main()
