"""The popularity baseline: every user is recommended what most people had.

Shape suffixes: B users of a batch, S seen pairs, V catalogue.
"""

from typing import Dict

import numpy as np
import torch
from torch import Tensor

from fuxi_torchrec.config import Config
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.item_counts import count_training_events
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.evaluation.evaluate import mean_metrics, queries_of, split_batches
from fuxi_torchrec.evaluation.metrics import metric_sums
from fuxi_torchrec.ops.ranking import Ranking, Seen


def popularity(dataset: SequenceDataset, config: Config, split: str, world: World) -> Dict[str, float]:
    """Ranks a split's targets by training frequency, among the events that the model sees. A collective: each rank ranks
    its users.

    Returns the metrics that `evaluate` does; cross_entropy uses add-one smoothed frequencies.
    """
    ranks = CountRanks(count_training_events(dataset, config.data, world, whole_histories=False))
    nothing = torch.empty(0, dtype=torch.float64)
    sums = metric_sums(nothing, nothing)
    for batch in split_batches(dataset, config, split, world):
        asked = queries_of(batch, torch.empty(len(batch.user_ids_B), 0), 0)
        for name, value in metric_sums(*ranks.of(asked.target_B, asked.seen)).items():
            sums[name] += value
    return mean_metrics(sums, world, split)


class CountRanks:
    """Ranks targets by the items' counts [V], as `rank_targets` would by scores: from how often each count occurs, so that a
    query costs its history, not the catalogue.

    Shape suffixes: C distinct counts.
    """

    def __init__(self, counts_V: np.ndarray):
        self.counts_V = counts_V
        self.count_C, self.items_C = np.unique(counts_V, return_counts=True)
        self.higher_C = len(counts_V) - np.cumsum(self.items_C)  # items with a higher count
        smoothed_C = torch.from_numpy(self.count_C).double() + 1
        self.log_prob_C = torch.log(smoothed_C / (smoothed_C * torch.from_numpy(self.items_C)).sum())

    def of(self, target_B: Tensor, seen: Seen) -> Ranking:
        """Ranks the targets [B] among all items but the seen ones; log_prob_Q is of the add-one smoothed counts."""
        item_B, V = target_B.numpy(), len(self.counts_V)
        query_S, item_S = np.divmod(np.unique(seen.query_S.numpy() * V + seen.item_S.numpy()), V)
        other = item_S != item_B[query_S]
        query_S, count_S = query_S[other], self.counts_V[item_S[other]]
        count_B = self.counts_V[item_B]
        of_count_B = np.searchsorted(self.count_C, count_B)
        higher_S, equal_S = count_S > count_B[query_S], count_S == count_B[query_S]
        higher_B = self.higher_C[of_count_B] - np.bincount(query_S[higher_S], minlength=len(item_B))
        equal_B = self.items_C[of_count_B] - np.bincount(query_S[equal_S], minlength=len(item_B))
        rank_B = 1 + higher_B + (equal_B - 1) / 2  # the target equals itself
        return Ranking(torch.from_numpy(rank_B), self.log_prob_C[of_count_B])
