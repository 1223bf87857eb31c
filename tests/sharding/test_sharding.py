"""Sharded tables, by real processes: the same losses and the same ranks however the table and the batch are cut."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fuxi_torchrec.config import LossConfig
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.run.folder import RunFolder
from tests.helpers import checkpoint_jobs
from tests.helpers import resharding_jobs as reshards
from tests.helpers import sharding_jobs as jobs
from tests.helpers.sharding_jobs import tiny
from tests.helpers.workers import worker_processes

pytestmark = pytest.mark.thorough

STEPS = 50


@pytest.fixture(scope="module")
def run():
    with worker_processes(4) as run:
        yield run


@pytest.mark.parametrize("sharding", ["replicated", "row_wise"])
def test_one_two_and_four_processes_give_the_same_loss_curve(run, small_dataset, tmp_path, sharding):
    config = tiny(small_dataset, sharding)

    def curve(world_size, order=0):
        name = f"{world_size}-{order}"
        return torch.tensor(run(jobs.loss_curve, world_size, config, str(tmp_path / name), STEPS, order)[0])

    base = curve(1)
    spread = max((curve(1, order) - base).abs().max() for order in (1, 2, 3))
    assert base[-1] < base[0] - 1  # it learns
    for world_size in (2, 4):
        assert (curve(world_size) - base).abs().max() <= 3 * spread


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(negatives="shared", sampling_alpha=0.5, log_q=True),
        LossConfig(negatives="in_batch", log_q=True, mask_history=True),
        LossConfig(negatives="mixed", log_q=True),
    ],
    ids=lambda loss: loss.negatives,
)
def test_negatives_across_ranks_and_a_table_cut_by_rows_change_no_loss(run, small_dataset, tmp_path, loss):
    """The pools and in-batch items of all ranks are those of one process that has the whole batch."""

    def curve(world_size):
        config = tiny(small_dataset, "row_wise")
        config.loss = replace(loss, cross_rank=True, num_negatives=jobs.CutPool.PIECES // world_size)
        check(config)
        return run(jobs.loss_curve, world_size, config, str(tmp_path / str(world_size)), 12)[0]

    base = curve(1)
    assert base[-1] < base[0] - 0.5  # it learns
    for world_size in (2, 3):
        assert curve(world_size) == pytest.approx(base, rel=1e-5)  # float32 noise, a little larger at each step


def test_ranks_share_the_counting_and_the_popularity_row(run, small_dataset):
    """Ranks and counts are the same at any world size; means of them up to the order in which float64s are added."""
    config = tiny(small_dataset, "replicated")
    config.data.split = "leave_two_out"
    counts_V, row = run(jobs.counted, 1, config, "validation")[0]
    for world_size in (2, 4):
        for again_V, again in run(jobs.counted, world_size, config, "validation"):
            assert again_V == counts_V and again == pytest.approx(row, rel=1e-14)
            assert all(again[name] == row[name] for name in row if name.startswith("hr@") or name == "users")


@pytest.mark.parametrize("sharding", ["row_wise", "replicated"])
def test_exchanging_ids_ahead_changes_no_loss_and_resumes_exactly(run, small_dataset, tmp_path, sharding):
    """Uneven ranks, evaluations in the middle of an epoch, and a run cut off at step 7."""

    def config(pipeline, **trainer):
        config = tiny(small_dataset, sharding, train_pipeline=pipeline, max_epochs=2, log_every_steps=1, **trainer)
        config.data.batch_size, config.evaluation.every_steps = 10, 3
        return config

    base = run(jobs.trained, 2, config("base"), str(tmp_path / "base"))[0]
    assert run(jobs.trained, 2, config("sparse_dist"), str(tmp_path / "ahead"))[0] == base
    run(jobs.trained, 2, config("sparse_dist", max_steps=7), str(tmp_path / "cut"))
    assert run(jobs.trained, 2, config("sparse_dist"), str(tmp_path / "cut"), True)[0] == base


@pytest.mark.parametrize("sharding", ["row_wise", "replicated"])
def test_four_processes_resume_exactly(run, small_dataset, tmp_path, sharding):
    """Of three ranks or more it matters in what order a gradient's parts are added up. Losses alone are compared: a run that
    ends at step 4 is evaluated there, and may have its best checkpoint there."""

    def losses(folder, steps, resume=False):
        config = tiny(small_dataset, sharding, max_steps=steps, log_every_steps=1)
        found, _ = run(jobs.trained, 4, config, str(tmp_path / folder), resume)[0]
        return found

    whole = losses("whole", 9)
    losses("cut", 4)
    assert losses("cut", 9, resume=True) == whole


def test_the_next_batchs_ids_are_on_their_way_before_backward(run, small_dataset, tmp_path):
    config = tiny(small_dataset, "row_wise", train_pipeline="sparse_dist")
    assert run(jobs.exchanged_ahead, 2, config, str(tmp_path / "run")) == [1, 1]


def test_the_schedule_reaches_a_sharded_table_in_the_step_it_belongs_to(run, small_dataset, tmp_path):
    config = tiny(small_dataset, "row_wise")
    config.table.learning_rate, config.optimizer.learning_rate = 0.1, 0.01
    at_once = run(jobs.first_move, 1, config, str(tmp_path / "at-once"))[0]
    config.optimizer.warmup_steps = 1000
    warming = run(jobs.first_move, 1, config, str(tmp_path / "warming"))[0]
    assert 0.1 / 4 < at_once < 0.1 * 8**0.5 + 1e-3  # Adagrad's first step: the rate x gradient / its root mean square
    assert warming == pytest.approx(at_once / 1000, rel=1e-2)


def test_ranks_and_top_items_are_those_of_the_whole_table_however_it_is_cut(run, small_dataset):
    def asked(world_size, sharding):
        results = run(jobs.ranks_and_top, world_size, tiny(small_dataset, sharding), 9001, 1100)
        ranks, log_probs, tops, held = zip(*results)
        for top in tops[1:]:
            assert torch.equal(top[0], tops[0][0]) and torch.equal(top[1], tops[0][1])
        return torch.cat(ranks), torch.cat(log_probs), tops[0], held

    ranks, log_probs, top, _ = asked(1, "replicated")
    for world_size, sharding in ((1, "row_wise"), (2, "column_wise"), (3, "table_wise"), (4, "row_wise")):
        got_ranks, got_log_probs, got_top, held = asked(world_size, sharding)
        assert torch.equal(got_ranks, ranks)
        torch.testing.assert_close(got_log_probs, log_probs, rtol=1e-6, atol=1e-6)
        assert torch.equal(got_top[0], top[0]) and torch.equal(got_top[1], top[1])
        assert sum(held) == 9001 * 8  # each row is held once


def test_evaluation_counts_every_user_once_on_uneven_ranks(run, small_dataset):
    whole = run(jobs.metrics, 1, tiny(small_dataset, "replicated"), 128)[0]
    cut = run(jobs.metrics, 4, tiny(small_dataset, "row_wise"), 7)
    assert all(metrics == cut[0] for metrics in cut)
    assert whole["users"] == cut[0]["users"] == 149
    assert cut[0] == pytest.approx(whole, rel=1e-3)


def test_end_to_end_at_most_one_user_in_two_hundred_moves_by_one_rank(run, small_dataset):
    """Other batches of histories, other ranks, another sharding; 5,000 items, so that ranks lie close together."""
    whole = run(jobs.ranks_of_users, 1, tiny(small_dataset, "replicated"), 128, 5000)[0]
    parts = run(jobs.ranks_of_users, 4, tiny(small_dataset, "row_wise"), 7, 5000)
    cut = {user: rank for part in parts for user, rank in part.items()}
    assert len(cut) == sum(map(len, parts)) == 149 and cut.keys() == whole.keys()  # every user once
    moved = [abs(cut[user] - whole[user]) for user in whole]
    assert max(moved) <= 1 and sum(map(bool, moved)) <= 0.005 * len(whole)


def test_ranking_takes_blocks_of_memory_however_many_items_there_are(run, small_dataset):
    """Scores of 512 queries against a rank's half of a million items would be 1 GB."""
    taken = run(jobs.ranking_memory, 2, tiny(small_dataset, "row_wise"), 10**6, 512)
    assert max(taken) < 200e6


def test_a_score_that_is_not_finite_is_the_same_error_on_every_rank(run, small_dataset):
    messages = run(jobs.poisoned_metrics, 2, tiny(small_dataset, "row_wise"))
    assert messages[0] == messages[1]
    assert "non-finite score for user" in messages[0]


SWITCHES = [
    (2, "row_wise", 2, "row_wise", True),
    (2, "row_wise", 1, "row_wise", True),
    (1, "table_wise", 4, "row_wise", True),
    (4, "row_wise", 2, "table_wise", True),
    (3, "row_wise", 2, "column_wise", False),  # a row's Adagrad sum would be another one
    (2, "column_wise", 4, "row_wise", False),
    (2, "row_wise", 1, "replicated", False),
]


@pytest.mark.parametrize("before, old, after, new, with_optimizer", SWITCHES)
def test_a_table_loads_to_the_bit_however_it_was_and_is_cut(
    run, small_dataset, tmp_path, before, old, after, new, with_optimizer
):
    items, width = 30_001, 8
    run(checkpoint_jobs.save, before, tiny(small_dataset, old), items, str(tmp_path))
    results = run(checkpoint_jobs.load, after, tiny(small_dataset, new), items, str(tmp_path), with_optimizer)
    table = torch.full((items, width), -1.0)
    sums = torch.full((items,), -1.0)
    for _, _, parts, states, _ in results:
        for row, column, part in parts:
            table[row : row + part.shape[0], column : column + part.shape[1]] = part
        for _, row, values in states:
            sums[row : row + len(values)] = values.reshape(len(values), -1)[:, 0]
    assert torch.equal(table, 1 + torch.arange(items)[:, None] + torch.arange(width) / 64)
    assert not with_optimizer or torch.equal(sums, 1 + torch.arange(items, dtype=torch.float32))
    # A rank reads its own part, in whole blocks, beside what all ranks need.
    if (old, new) == ("table_wise", "row_wise"):
        files = sum(path.stat().st_size for path in tmp_path.glob("step-*/*"))
        assert max(read for *_, read in results) < 0.6 * files


def test_damage_that_one_rank_meets_makes_all_ranks_take_the_checkpoint_before(run, small_dataset, tmp_path):
    config, items = tiny(small_dataset, "row_wise"), 3001
    run(checkpoint_jobs.save, 2, config, items, str(tmp_path), 2)
    shard = tmp_path / "step-00000002" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for said, step, parts, states, _ in run(checkpoint_jobs.load, 2, config, items, str(tmp_path), True):
        assert len(said) == 1 and "__1_0.distcp has another checksum than when it was written" in said[0]
        assert step == 1
        for row, _, part in parts:
            assert torch.equal(part[:, 0], 1 + torch.arange(row, row + len(part), dtype=torch.float32))
        for _, row, values in states:
            assert torch.equal(values.flatten(), 1 + torch.arange(row, row + len(values), dtype=torch.float32))


def test_loading_a_table_takes_no_second_copy_of_it(run, small_dataset, tmp_path):
    results = run(checkpoint_jobs.memory_of_loading, 2, tiny(small_dataset, "row_wise"), 4_000_000, str(tmp_path))
    for more, table in results:
        assert table == 64_000_000 and more < 0.25 * table


CHAINS = {
    "rowwise_adagrad": [(2, "row_wise"), (2, "table_wise"), (2, "row_wise"), (1, "table_wise"), (2, "row_wise")]
    + [(1, "row_wise"), (4, "row_wise"), (2, "table_wise")],
    "adagrad": [(2, "column_wise"), (1, "row_wise"), (3, "column_wise"), (2, "table_wise")],
    "adamw": [(2, "replicated"), (1, "replicated"), (4, "replicated")],
}


@pytest.mark.parametrize("optimizer", CHAINS)
def test_a_run_goes_on_with_the_same_bits_in_other_shardings_and_worlds(run, small_dataset, tmp_path, optimizer):
    """Stretches of three steps. Weights and optimizer states are those of the stretch before, the evaluation is the same,
    no user is seen twice in an epoch, and losses are those of a run that was never cut as long as batches are."""

    def config(sharding, steps):
        config = tiny(small_dataset, sharding, optimizer, max_steps=steps, log_every_steps=1)
        config.data.shuffle_buffer = 30
        return config

    chain, output, before, seen = CHAINS[optimizer], str(tmp_path / "run"), None, Counter()
    for number, (world_size, sharding) in enumerate(chain):
        ranks = run(reshards.stretch, world_size, config(sharding, 3 * number + 3), output, number > 0)
        (begin, metrics), (end, last_metrics) = [
            (reshards.whole([held for held, _ in states]), states[0][1]) for states in list(zip(*ranks))[:2]
        ]
        if before:
            assert begin.keys() == before[0].keys()
            assert all(torch.equal(begin[name], before[0][name]) for name in begin)
            assert metrics == pytest.approx(before[1], rel=1e-6)
        before = (end, last_metrics)
        for _, _, some in ranks:
            seen.update(some)
    epochs = [{user for epoch, user in seen if epoch == number} for number in range(max(seen)[0])]
    assert set(seen.values()) == {1} and all(users == epochs[0] for users in epochs) and len(epochs[0]) > 140
    losses = [line["loss"] for line in RunFolder(output).metrics() if "loss" in line]
    assert len(losses) == 3 * len(chain) and losses[-1] < losses[0] - 1
    uncut = next((i for i, (world_size, _) in enumerate(chain) if world_size != chain[0][0]), len(chain)) * 3
    run(reshards.stretch, 2, config(chain[0][1], uncut), str(tmp_path / "uncut"), False)
    expected = [line["loss"] for line in RunFolder(str(tmp_path / "uncut")).metrics() if "loss" in line]
    assert losses[:uncut] == pytest.approx(expected, rel=1e-6)


def test_an_optimizer_state_that_does_not_fit_is_refused_by_its_key_and_the_model_alone_still_loads(
    run, small_dataset, tmp_path
):
    output = str(tmp_path / "run")
    ranks = run(reshards.stretch, 2, tiny(small_dataset, "column_wise", max_steps=2), output, False)
    saved = reshards.whole([end for _, (end, _), _ in ranks])
    for world_size, sharding, says in (
        (2, "replicated", "step-00000002: table.optimizer was rowwise_adagrad when this was saved and is adamw now"),
        (1, "column_wise", "step-00000002: the number of parts that columns are cut into was 2 .* and is 1 now"),
        (2, "row_wise", "step-00000002: the number of parts that columns are cut into was 2 .* and is 1 now"),
    ):
        config = tiny(small_dataset, sharding)
        for message in run(reshards.refused, world_size, config, output):
            assert re.search(says, message)
        model = reshards.whole(run(reshards.loaded, world_size, config, output))
        assert all(torch.equal(value, saved[name]) for name, value in model.items())


@pytest.mark.parametrize("sharding", ["replicated", "row_wise", "table_wise", "column_wise"])
def test_a_checkpoint_tells_how_its_table_was_cut_and_what_each_rank_held(run, small_dataset, tmp_path, sharding):
    config = tiny(small_dataset, sharding)
    held = run(jobs.held_and_saved, 2, config, str(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / f"step-{held[0][2]:08d}"
    plan = json.loads((folder / "sharding_plan.json").read_text())
    assert "sharding_plan.json" in json.loads((folder / "complete.json").read_text())["files"]
    table = plan["tables"]["item"]
    replicated = sharding == "replicated"
    assert plan["world_size"] == 2 and table["sharding"] == sharding and table["columns"] == 8
    assert table["ranks"] == ([0, 1] if sharding != "table_wise" else [table["shards"][0]["rank"]])
    assert table["compute_kernel"] == ("dense" if replicated else "fused")
    assert table["optimizer"] == ("adamw" if replicated else "rowwise_adagrad")
    cells = [shard["rows"] * shard["columns"] for shard in table["shards"]]
    assert sum(cells) == (1 + replicated) * table["rows"] * 8
    for rank, (table_bytes, state_bytes, _) in enumerate(held):
        own = [shard for shard in table["shards"] if shard["rank"] == rank]
        assert sum(shard["table_bytes"] for shard in own) == table_bytes
        assert sum(shard["optimizer_bytes"] for shard in own) == state_bytes
