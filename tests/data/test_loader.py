"""The loader: every training event once an epoch, any number of ranks, exact resume, nothing else in memory."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from data_pipelines.events import prepare_events
from fuxi_torchrec.config import DataConfig, LossConfig
from fuxi_torchrec.data.batch import EVENTS, NEGATIVES
from fuxi_torchrec.data.batch_sampler import even_order
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import EPOCH_ORDER, StreamCursor, TrainingStream, cursor_after, evaluation_batches
from fuxi_torchrec.data.negative_sampler import NegativeSampler, SharedNegatives
from fuxi_torchrec.data.prefetch import prefetch
from fuxi_torchrec.data.splits import windows
from tests.conftest import write_events


def stream(folder, rank=0, world_size=1, negatives="per_token", **config):
    dataset = SequenceDataset(folder)
    config = DataConfig(**{"batch_size": 8, "shuffle_buffer": 30, **config})
    loss = LossConfig(negatives=negatives, num_negatives=5)
    sampler = NegativeSampler(loss, dataset.identity.num_items, seed=3, rank=rank)
    return TrainingStream(dataset, config, sampler, 3, rank, world_size)


@pytest.fixture(scope="module")
def uneven_dataset(tmp_path_factory):
    """4,000 users of 2 … 40 events."""
    folder = tmp_path_factory.mktemp("uneven")
    write_events(folder / "log.csv", 4000, seed=1)
    prepare_events([str(folder / "log.csv")], "user", "item", "time", str(folder / "data"))
    return str(folder / "data")


def contents(batch):
    tensors = (batch.ids.values(), batch.ids.lengths(), batch.timestamps_E, batch.negatives.index_TK)
    return [tensor.tolist() for tensor in tensors] + [batch.user_ids_B.tolist()]


def trainable(folder):
    """Users that have a training cursor."""
    dataset = SequenceDataset(folder)
    groups = (windows(dataset.read(group), DataConfig(), "train") for group in dataset.row_groups)
    return {user for found in groups for user in found.user_ids_U.tolist()}


# Of the settings of data that EPOCH_ORDER does not name, so that they may change inside an epoch.
CHANGES = {"batch_size": 5, "tokens_per_batch": 60, "prefetch": 1}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(DataConfig) if field.name != "path"])
@pytest.mark.parametrize("shuffle_buffer", [30, 1000])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_that_goes_on_otherwise_sees_every_user_once_or_is_refused(
    small_dataset, world_size, shuffle_buffer, key
):
    if key not in CHANGES:
        assert ("data", key) in EPOCH_ORDER
        return
    seen = Counter()
    for rank in range(world_size):
        cursor = StreamCursor()
        begun = stream(small_dataset, rank, world_size, shuffle_buffer=shuffle_buffer).epoch(cursor)
        for batch in itertools.islice(begun, 4):
            seen.update(batch.user_ids_B.tolist())
            cursor = batch.cursor
        changed = {"shuffle_buffer": shuffle_buffer, key: CHANGES[key]}
        for batch in stream(small_dataset, rank, world_size, **changed).epoch(cursor):
            seen.update(batch.user_ids_B.tolist())
    assert set(seen.values()) == {1} and set(seen) == trainable(small_dataset)


@pytest.mark.parametrize("world_size", [1, 3, 50])
def test_every_trainable_user_is_seen_once_an_epoch_at_any_world_size(small_dataset, world_size):
    seen = Counter()
    for rank in range(world_size):
        for batch in stream(small_dataset, rank, world_size).epoch(StreamCursor()):
            seen.update(batch.user_ids_B.tolist())
    assert set(seen) == trainable(small_dataset) and set(seen.values()) == {1}


def test_epochs_differ_and_repeat_exactly(small_dataset):
    first = [contents(batch) for batch in stream(small_dataset).epoch(StreamCursor())]
    again = [contents(batch) for batch in stream(small_dataset).epoch(StreamCursor())]
    second = [contents(batch) for batch in stream(small_dataset).epoch(StreamCursor(epoch=1))]
    assert first == again
    assert first != second


def test_a_position_resumes_the_stream_exactly(small_dataset):
    whole = list(stream(small_dataset).epoch(StreamCursor()))
    for index in (0, 1, len(whole) // 2, len(whole) - 2):
        rest = stream(small_dataset).epoch(whole[index].cursor)
        assert [contents(b) for b in rest] == [contents(b) for b in whole[index + 1 :]]


@pytest.mark.parametrize("shuffle_buffer", [30, 65536])
@pytest.mark.parametrize("worlds", [[2, 1], [2, 4], [4, 3, 5, 1]])
def test_an_epoch_that_moves_between_world_sizes_sees_every_user_once(small_dataset, worlds, shuffle_buffer):
    """Each world but the last stops in the midst of its work; ranks with buffers of their own at different places."""
    expected = Counter()
    for group in SequenceDataset(small_dataset).row_groups:
        expected.update(windows(SequenceDataset(small_dataset).read(group), DataConfig(), "train").user_ids_U.tolist())
    seen, state = Counter(), None
    for number, world_size in enumerate(worlds):
        after = []
        for rank in range(world_size):
            this = stream(small_dataset, rank, world_size, shuffle_buffer=shuffle_buffer)
            cursor, this.earlier_cursors = cursor_after(state, rank, world_size) if state else (StreamCursor(), [])
            batches = this.epoch(cursor)
            done = 2 + rank if shuffle_buffer == 30 else 2
            for batch in batches if number == len(worlds) - 1 else itertools.islice(batches, done):
                seen.update(batch.user_ids_B.tolist())
                cursor = batch.cursor
            after.append(cursor.to_dict())
        state = {"positions": after, "deals": [[p.to_dict() for p in world] for world in this.earlier_cursors]}
    assert seen == expected and set(seen.values()) == {1}


def tokens(folder, world_size, **config):
    """Positions [steps, ranks] of an epoch; 0 where a rank has no batch left."""
    ranks = []
    for rank in range(world_size):
        ranks.append([b.num_tokens for b in stream(folder, rank, world_size, **config).epoch(StreamCursor())])
    return np.array(list(itertools.zip_longest(*ranks, fillvalue=0)))


@pytest.mark.parametrize("tokens_per_batch", [None, 400])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_get_the_same_work_in_every_step(uneven_dataset, world_size, tokens_per_batch):
    """Within a shuffle buffer, where users are dealt one by one."""
    config = {"shuffle_buffer": 65536, "batch_size": 32, "tokens_per_batch": tokens_per_batch}
    steps = tokens(uneven_dataset, world_size, **config)
    assert (steps.max(1) / steps.mean(1))[:-1].max() < 1.03
    assert steps.max(1).sum() / steps.mean(1).sum() < 1.01


def test_ranks_that_read_their_own_row_groups_get_nearly_the_same_work(uneven_dataset):
    for world_size in (2, 4, 8):
        steps = tokens(uneven_dataset, world_size, shuffle_buffer=1000, batch_size=32)
        assert (steps > 0).all()
        assert steps.max(1).sum() / steps.mean(1).sum() < 1.04  # drawn at random: 1.06, 1.12, 1.17


def test_any_run_of_an_even_order_has_about_the_mean_length():
    lengths = np.random.default_rng(0).geometric(0.02, 5000).clip(max=200)
    order = even_order(lengths, np.random.default_rng(1))
    assert sorted(order) == list(range(5000))
    for size, bound in ((128, 0.02), (100, 0.05)):
        sums = lengths[order][: 5000 // size * size].reshape(-1, size).sum(1)
        assert abs(sums / sums.mean() - 1).max() < bound
    assert not np.array_equal(order, even_order(lengths, np.random.default_rng(2)))


def test_global_batches_are_the_same_at_any_world_size(small_dataset):
    def batches(world_size):
        config = {"shuffle_buffer": 65536, "batch_size": 32 // world_size}
        ranks = [stream(small_dataset, rank, world_size, **config).epoch(StreamCursor()) for rank in range(world_size)]
        return [sorted(itertools.chain.from_iterable(b.user_ids_B.tolist() for b in step)) for step in zip(*ranks)]

    assert batches(1) == batches(2) == batches(4)


@pytest.mark.parametrize("world_size", [3, 7, 40])
def test_users_are_dealt_evenly_whatever_the_number_of_row_groups(small_dataset, world_size):
    users = []
    for rank in range(world_size):
        users.append(sum(len(batch.user_ids_B) for batch in stream(small_dataset, rank, world_size).epoch(StreamCursor())))
    assert max(users) - min(users) <= 2  # one of them is not trainable


def test_a_batch_holds_inputs_and_targets_one_behind(small_dataset):
    batch = next(stream(small_dataset).epoch(StreamCursor()))
    events = batch.ids[EVENTS]
    assert events.values().dtype == torch.int64 and batch.timestamps_E.dtype == torch.int64
    inputs = [n - 1 for n in events.lengths().tolist()]
    assert batch.host_lengths == inputs == batch.offsets_B1.diff().tolist()
    starts = np.cumsum([0, *events.lengths().tolist()])[:-1]
    expected = list(itertools.chain.from_iterable(range(s, s + n) for s, n in zip(starts, inputs)))
    assert batch.input_index_T.tolist() == expected
    # Drawn ids come back from the unique ones; the index of the positive points at the positive.
    unique = batch.ids[NEGATIVES].values()
    assert unique.unique().numel() == unique.numel()
    assert batch.negatives.index_TK.shape == (batch.num_tokens, 5)
    positives = events.values()[batch.input_index_T + 1]
    positive_index_T = batch.negatives.positive_index_T
    has = positive_index_T >= 0
    assert torch.equal(unique[positive_index_T[has]], positives[has])
    assert not torch.isin(positives[~has], unique).any()


def test_a_token_budget_bounds_batches_and_loses_nobody(small_dataset):
    batches = list(stream(small_dataset, batch_size=1000, tokens_per_batch=60).epoch(StreamCursor()))
    assert all(b.num_tokens <= 60 or len(b.user_ids_B) == 1 for b in batches)
    whole = list(stream(small_dataset).epoch(StreamCursor()))
    users = lambda some: Counter(itertools.chain.from_iterable(b.user_ids_B.tolist() for b in some))  # noqa: E731
    assert users(batches) == users(whole)


def test_a_rank_without_data_makes_an_empty_batch(small_dataset):
    batch = stream(small_dataset).empty_batch(StreamCursor(step=7))
    assert batch.num_tokens == 0 and batch.ids[EVENTS].values().numel() == 0
    assert batch.cursor.step == 8 and batch.negatives is not None


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_drops_nobody(small_dataset, world_size):
    dataset = SequenceDataset(small_dataset)
    seen = Counter()
    for rank in range(world_size):
        for batch in evaluation_batches(dataset, DataConfig(), "test", 7, rank, world_size):
            assert batch.negatives is None
            seen.update(batch.user_ids_B.tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == dataset.identity.num_users - dataset.identity.report["single_event_users"]


def test_shared_pool_is_one_draw_for_the_step(small_dataset):
    batch = next(stream(small_dataset, negatives="shared").epoch(StreamCursor()))
    assert batch.ids[NEGATIVES].values().numel() == 5
    assert isinstance(batch.negatives, SharedNegatives)


def test_both_ways_to_find_unique_ids_agree(small_dataset, monkeypatch):
    marked = contents(next(stream(small_dataset).epoch(StreamCursor())))
    monkeypatch.setattr("fuxi_torchrec.data.negative_sampler.MARKED_ITEMS", 0)
    assert contents(next(stream(small_dataset).epoch(StreamCursor()))) == marked


def test_prefetch_passes_items_and_errors_on():
    def items():
        yield from range(5)
        raise ValueError("here")

    fetched = prefetch(items(), 2)
    assert list(itertools.islice(fetched, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="here"):
        next(fetched)
