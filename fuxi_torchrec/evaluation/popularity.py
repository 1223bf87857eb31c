"""The popularity baseline: every user is recommended what most people had."""

from typing import Dict

import numpy as np
import torch
from torch import Tensor

from fuxi_torchrec.config import Config
from fuxi_torchrec.data.dataset import SequenceDataset, ranges
from fuxi_torchrec.data.splits import windows
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.evaluation.evaluate import _batches, _means, _queries
from fuxi_torchrec.evaluation.metrics import metric_sums
from fuxi_torchrec.ops.ranking import rank_targets


def popularity(dataset: SequenceDataset, config: Config, split: str) -> Dict[str, float]:
    """The same metrics for ranking by training frequency; its cross_entropy uses add-one smoothed frequencies."""
    counts_V = training_counts(dataset, config)
    alone = World(0, 1, torch.device("cpu"))
    sums: Dict[str, Tensor] = {}
    log_prob_V = torch.log((counts_V + 1) / (counts_V + 1).sum())
    for batch in _batches(dataset, config, split, alone):
        asked = _queries(batch, torch.ones(len(batch.user_ids_B), 1), 0)
        ranking = rank_targets(asked.query_BD, [(0, counts_V[:, None].float())], asked.target_B, asked.seen, 1.0)
        for name, value in metric_sums(ranking.rank_Q, log_prob_V[asked.target_B]).items():
            sums[name] = sums.get(name, 0) + value
    return _means(sums, alone, split)


def training_counts(dataset: SequenceDataset, config: Config) -> Tensor:
    """Events of each item in the training split, float64 [V]; one pass over the data."""
    counts_V = np.zeros(dataset.identity.num_items, dtype=np.int64)
    for group in dataset.row_groups:
        rows = dataset.read(group)
        users = windows(rows, config.data, "train")
        events = ranges(users.start_U, users.stop_U)
        counts_V += np.bincount(rows.item_ids_E[events], minlength=len(counts_V))
    return torch.from_numpy(counts_V).double()
