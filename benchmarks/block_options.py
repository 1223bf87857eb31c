"""What trainer.compile, trainer.activation_checkpointing and trainer.precision do to a training step, in turns.

    python -m benchmarks.block_options [--config FILE.yaml] [--encoder fuxi_beta] [--length 200] [--tokens 14627] [--steps 7]

Training steps on random users, as `fuxi-torchrec bench` makes them. Prints a JSON line a choice: median seconds of a step and
of forward and backward in it (the loss's backward included), and peak memory of a step.
"""

import argparse
import dataclasses
import json
from contextlib import ExitStack

from fuxi_torchrec.bench.timing import BenchCase, BenchSize
from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.distributed.world import start_world

CHOICES = {
    "plain": {},
    "compile": {"compile": True},
    "activation_checkpointing": {"activation_checkpointing": True},
    "compile, activation_checkpointing": {"compile": True, "activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config")
    parser.add_argument("--encoder")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=14627)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    options = parser.parse_args()
    config = load_config(options.config) if options.config else Config()
    config.model.encoder = options.encoder or config.model.encoder
    size = BenchSize(options.tokens, items=3706, steps=options.steps)
    with start_world("cpu") as world, ExitStack() as stack:
        cases = {}
        for name in options.choices:
            trainer = dataclasses.replace(config.trainer, device="cpu", **CHOICES[name])
            chosen = dataclasses.replace(config, trainer=trainer)
            cases[name] = BenchCase(chosen, options.length, size, world, stack)
            cases[name].warm_up()
        for _ in range(size.steps):
            for case in cases.values():
                case.turns.append(case.step())
        for name, case in cases.items():
            row = case.row(1.0)
            tower = row.stages["encoder forward"] + row.stages["backward"]
            line = {"seconds": row.seconds, "tower_seconds": tower, "peak_mb": (row.peak_bytes or 0) / 1e6}
            print(json.dumps({"choice": name, **{key: round(value, 4) for key, value in line.items()}}), flush=True)


if __name__ == "__main__":
    main()
