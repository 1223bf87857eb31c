"""A trained run's metrics with exact token mixing and with token mixing in linear time, for users of every length.

    python -m benchmarks.mixer_agreement RUN_DIR [--checkpoint best] [--chunk 32]

`linear` would leave users of up to 1,024 events to the exact kernels; here it takes everybody, and in chunks so short that
most of a history is seen through the sums of exponentials. Prints one JSON line each.
"""

import argparse
import dataclasses
import json
import sys
from typing import Dict

from fuxi_torchrec.config import evaluation_splits
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.evaluate import evaluate
from fuxi_torchrec.evaluation.load_model import open_model
from fuxi_torchrec.ops.token_mixing import dispatch as token_mixing
from fuxi_torchrec.ops.token_mixing import exponential_scan
from fuxi_torchrec.run.folder import RunFolder


def metrics(path: str, checkpoint: str, implementation: str) -> Dict[str, float]:
    """Evaluates a run's checkpoint with one implementation of token mixing."""
    run = RunFolder.open(path)
    config = run.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, token_mixing=implementation))
    with open_model(run, config, checkpoint) as saved:
        return evaluate(saved.model, saved.dataset, config, evaluation_splits(config.data)[-1], saved.world)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--chunk", type=int, default=32, help="events between which maps are exact (128 otherwise)")
    options = parser.parse_args()
    token_mixing.LINEAR_FROM, exponential_scan.CHUNK = 0, options.chunk
    for implementation in ("exact", "linear"):
        found = metrics(options.run, options.checkpoint, implementation)
        shown = {name: found[name] for name in ("users", "ndcg@10", "hr@10", "mrr", "cross_entropy")}
        print(json.dumps({"token_mixing": implementation, **shown}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
