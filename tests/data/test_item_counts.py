"""What weighs negatives and logQ, and ranks by popularity, holds training events and no others."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fuxi_torchrec.config import DataConfig, LossConfig
from fuxi_torchrec.data import item_counts
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.item_counts import count_training_events
from fuxi_torchrec.data.negative_sampler import training_frequency
from fuxi_torchrec.distributed.world import World

ALONE = World(0, 1, torch.device("cpu"))
CUTOFFS = [1_000_300_000, 1_000_700_000]
SPLITS = {
    "leave_one_out": lambda events: events[:-1],
    "leave_two_out": lambda events: events[:-2],
    "temporal": lambda events: [event for event in events if event[1] < CUTOFFS[0]],
}


def data_config(split, length=200):
    return DataConfig(split=split, temporal_cutoffs=CUTOFFS if split == "temporal" else None, max_sequence_length=length)


def training_events(folder, split):
    """Each user's training events (item, time), spelled out."""
    users = pq.read_table(f"{folder}/train").to_pylist()
    return [SPLITS[split](list(zip(user["item_ids"], user["timestamps"]))) for user in users]


def counted(users, num_items):
    found = Counter(item for events in users for item, _ in events)
    return [found[item] for item in range(num_items)]


@pytest.mark.parametrize("split", SPLITS)
def test_counts_hold_the_splits_training_events_and_nothing_of_what_is_tested_on(small_dataset, split):
    dataset = SequenceDataset(small_dataset)
    counts_V = count_training_events(dataset, data_config(split), ALONE, whole_histories=True)
    assert counts_V.tolist() == counted(training_events(small_dataset, split), dataset.identity.num_items)
    assert 0 < counts_V.sum() < dataset.identity.num_events


@pytest.mark.parametrize("split", SPLITS)
def test_popularity_counts_what_the_model_sees(small_dataset, split):
    dataset = SequenceDataset(small_dataset)
    counts_V = count_training_events(dataset, data_config(split, length=5), ALONE, whole_histories=False)
    seen = [events[-6:] for events in training_events(small_dataset, split) if len(events) >= 2]
    assert counts_V.tolist() == counted(seen, dataset.identity.num_items)


def test_leave_one_out_is_what_the_stored_frequency_counts(small_dataset):
    dataset = SequenceDataset(small_dataset)
    counts_V = count_training_events(dataset, data_config("leave_one_out"), ALONE, whole_histories=True)
    assert counts_V.tolist() == dataset.frequencies().tolist() == dataset.items()["frequency"].to_pylist()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss", [LossConfig(sampling_alpha=0.5), LossConfig(negatives="in_batch", log_q=True)])
def test_negatives_and_logq_are_weighed_by_the_splits_own_training_events(small_dataset, split, loss):
    frequency_V = training_frequency(loss, data_config(split), SequenceDataset(small_dataset), ALONE)
    assert frequency_V.tolist() == counted(training_events(small_dataset, split), len(frequency_V))
    assert frequency_V.dtype == np.int32  # what every process holds


def test_nothing_is_read_or_counted_where_no_frequency_is_used(small_dataset, monkeypatch):
    dataset = SequenceDataset(small_dataset)
    monkeypatch.setattr(SequenceDataset, "read", None)
    monkeypatch.setattr(SequenceDataset, "frequencies", None)
    for loss in (LossConfig(negatives="mixed", cross_rank=True), LossConfig(negatives="shared", log_q=True)):
        assert training_frequency(loss, data_config("temporal"), dataset, ALONE) is None


def test_a_split_is_counted_once_for_each_cut_off_and_length(small_dataset, monkeypatch):
    dataset, passes, count = SequenceDataset(small_dataset), [], item_counts._count_own_users

    def noted(*arguments):
        passes.append(arguments)
        return count(*arguments)

    monkeypatch.setattr(item_counts, "_count_own_users", noted)
    other = DataConfig(split="temporal", temporal_cutoffs=CUTOFFS[1:])
    for config in (data_config("temporal"), other, data_config("leave_two_out")) * 2:
        count_training_events(dataset, config, ALONE, whole_histories=True)
    assert len(passes) == 3
    for length in (5, 20, 5):
        count_training_events(dataset, data_config("temporal", length), ALONE, whole_histories=False)
    assert len(passes) == 5


def test_counts_beyond_int32_stay_exact():
    counts_V = np.array([2**31 + 1, 0])
    assert item_counts.narrowed(counts_V).tolist() == [2**31 + 1, 0]
