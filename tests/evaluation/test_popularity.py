"""The popularity row: the protocol of every other ranking, at a cost that does not grow with the catalogue."""

import numpy as np
import pytest
import torch

from fuxi_torchrec.config import Config, DataConfig
from fuxi_torchrec.data.batch import EVENTS
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.item_counts import count_training_events
from fuxi_torchrec.data.loader import evaluation_batches
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.evaluation.metrics import metric_sums
from fuxi_torchrec.evaluation.popularity import CountRanks, popularity
from fuxi_torchrec.ops.ranking import Seen, rank_targets

ALONE = World(0, 1, torch.device("cpu"))


def scored(counts_V, target_B, seen):
    """The same ranks by scoring the whole catalogue."""
    queries_B1, table_V1 = torch.ones(len(target_B), 1), torch.tensor(counts_V)[:, None].float()
    return rank_targets(queries_B1, [(0, table_V1)], target_B, seen, 1.0).rank_Q


@pytest.mark.parametrize("seed", range(5))
def test_ranks_by_count_are_those_of_scoring_the_whole_catalogue(seed):
    """Ties, repeated events, seen targets, and histories of any length."""
    random, V, B, S = np.random.default_rng(seed), 300, 40, 900
    counts_V = random.zipf(1.4, V).clip(max=50) - 1
    target_B = torch.from_numpy(random.integers(0, V, B))
    seen = Seen(torch.from_numpy(random.integers(0, B, S)), torch.from_numpy(random.integers(0, V, S)))
    ranking = CountRanks(counts_V).of(target_B, seen)
    assert ranking.rank_Q.tolist() == scored(counts_V, target_B, seen).tolist()
    log_prob_V = torch.log_softmax(torch.from_numpy(np.log(counts_V + 1.0)), 0)
    torch.testing.assert_close(ranking.log_prob_Q, log_prob_V[target_B], rtol=1e-13, atol=0)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_row_is_to_the_last_digit_what_scoring_the_catalogue_gives(small_dataset, split):
    dataset, config = SequenceDataset(small_dataset), Config(data=DataConfig(split="leave_two_out", max_sequence_length=8))
    config.evaluation.batch_size = 7
    counts_V = count_training_events(dataset, config.data, ALONE, whole_histories=False)
    sums = {}
    for batch in evaluation_batches(dataset, config.data, split, 7):
        items_E, lengths_B = batch.ids[EVENTS].values(), torch.as_tensor(batch.host_lengths)
        seen = Seen(torch.repeat_interleave(lengths_B), items_E[batch.input_index_T])
        rank_B = scored(counts_V, items_E[batch.ids[EVENTS].lengths().cumsum(0) - 1], seen)
        for name, value in metric_sums(rank_B, torch.zeros_like(rank_B)).items():
            sums[name] = sums.get(name, 0) + value
    row = popularity(dataset, config, split, ALONE)
    assert row["users"] == sums["users"] > 100
    for name in set(row) - {"users", "cross_entropy"}:
        assert row[name] == sums[name].item() / row["users"]
