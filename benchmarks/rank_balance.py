"""How even the ranks' work is: supervised tokens a rank has in each step of an epoch.

    python -m benchmarks.rank_balance DATA_DIR [--ranks 2 4 8] [--batch-size 128] [--tokens-per-batch N] [--epochs 5]

The ranks' streams are read in this one process; nothing is timed. A step takes as long as its slowest rank, so "pace" is
Σ over steps of the most tokens a rank has, over Σ of the mean: 1 is even, 1.2 means that a sixth of the ranks' time
is spent waiting, ranks that have no data left at an epoch's end included. "Full steps" is the mean of most / mean over the
steps in which every rank has its batch. `--shuffle-buffer` below the number of users shows what larger data sets get,
whose row groups are dealt to the ranks.
"""

import argparse
from typing import List

import numpy as np

from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import StreamCursor, TrainingStream


def positions_of_steps(folder: str, config: DataConfig, ranks: int, epoch: int) -> np.ndarray:
    """Supervised tokens [steps, ranks] of an epoch; 0 where a rank has no batch left."""
    dataset = SequenceDataset(folder)
    counts: List[List[int]] = []
    for rank in range(ranks):
        stream = TrainingStream(dataset, config, None, 0, rank, ranks)
        counts.append([batch.num_tokens for batch in stream.epoch(StreamCursor(epoch=epoch))])
    steps = max(map(len, counts))
    return np.array([some + [0] * (steps - len(some)) for some in counts]).T


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DATA_DIR")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-size", type=int, default=128, help="users of a rank's batch")
    parser.add_argument("--tokens-per-batch", type=int, help="of a rank's batch")
    parser.add_argument("--shuffle-buffer", type=int, default=DataConfig.shuffle_buffer)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    config = DataConfig(
        path=options.folder,
        batch_size=options.batch_size,
        tokens_per_batch=options.tokens_per_batch,
        shuffle_buffer=options.shuffle_buffer,
    )
    print("| ranks | steps an epoch | most / mean, full steps | worst step | pace |\n|---|---|---|---|---|")
    for ranks in options.ranks:
        epochs = [positions_of_steps(options.folder, config, ranks, epoch) for epoch in range(options.epochs)]
        counts = np.concatenate(epochs)
        # An epoch's last step, and those in which a rank has none, are not full.
        full = np.concatenate([some[:-1][(some[:-1] > 0).all(1)] for some in epochs])
        ratio = full.max(1) / full.mean(1)
        pace = counts.max(1).sum() / counts.mean(1).sum()
        steps = len(counts) / len(epochs)
        print(f"| {ranks} | {steps:.1f} | {ratio.mean():.3f} | {ratio.max():.3f} | {pace:.3f} |", flush=True)


if __name__ == "__main__":
    main()
