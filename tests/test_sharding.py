"""Sharded tables, by real processes: the same losses and the same ranks however the table and the batch are cut."""

import json
import os
import time

import checkpoint_jobs
import pytest
import sharding_jobs as jobs
import torch
from sharding_jobs import tiny
from workers import worker_processes

from fuxi_torchrec.cli import main
from fuxi_torchrec.config import Config
from fuxi_torchrec.config_check import check, check_table
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.tables import choose_table, init_rows

STEPS = 50
SMOKE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "smoke", "fuxi-beta.yaml")


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


def test_exchanging_ids_ahead_changes_no_loss_and_resumes_exactly(run, small_dataset, tmp_path):
    """Uneven ranks, evaluations in the middle of an epoch, and a run cut off at step 7."""

    def config(pipeline, **trainer):
        config = tiny(small_dataset, "row_wise", train_pipeline=pipeline, max_epochs=2, log_every_steps=1, **trainer)
        config.data.batch_size, config.evaluation.every_steps = 10, 3
        return config

    base = run(jobs.trained, 2, config("base"), str(tmp_path / "base"))[0]
    assert run(jobs.trained, 2, config("sparse_dist"), str(tmp_path / "ahead"))[0] == base
    run(jobs.trained, 2, config("sparse_dist", max_steps=7), str(tmp_path / "cut"))
    assert run(jobs.trained, 2, config("sparse_dist"), str(tmp_path / "cut"), True)[0] == base


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
    items, width = 3001, 8
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


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(sharding="row_wise", optimizer="adamw"), "table.optimizer: adamw trains only replicated.*rowwise_adagrad"),
        (dict(sharding="replicated", optimizer="rowwise_adagrad"), "table.optimizer: .*take adamw, or table.sharding"),
        (dict(sharding="row_wise", optimizer="adam"), "table.optimizer: .*no fused adam on a CPU; take rowwise_adagrad"),
        (dict(sharding="replicated", learning_rate=0.1), "table.learning_rate: .*optimizer.learning_rate"),
        (dict(sharding="row_wise", hbm_gb=0.0), "table.hbm_gb: 0.0 must be greater than 0"),
    ],
)
def test_what_cannot_train_is_refused_with_its_key_and_the_alternatives(keys, words):
    config = Config()
    config.trainer.device, config.model.embedding_dim = "cpu", 8
    for key, value in keys.items():
        setattr(config.table, key, value)
    with pytest.raises(UserError, match=words):
        check(config)
        check_table(config, "cpu")


def test_a_cluster_is_planned_without_it(tmp_path, capsys):
    """A billion items x 256 on 64 hosts of 8 GPUs: even, within memory, and the numbers of plain arithmetic."""
    words = f"plan {SMOKE} --world-size 512 --local-world-size 8 --items 1000000000 --output {tmp_path}/plan.json"
    words += " --model.embedding_dim 256 --loss.negatives shared --loss.num_negatives 1024 --events-per-user 101"
    words += " --data.batch_size 128 --data.max_sequence_length 200"
    started = time.perf_counter()
    assert main([*words.split(), "--hbm", "80GB"]) == 0
    assert time.perf_counter() - started < 60
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["sharding"] == "row_wise" and len(plan["shards"]) == 512
    assert sum(plan["table_bytes"]) == 10**9 * 256 * 4 and sum(plan["optimizer_bytes"]) == 10**9 * 4
    assert plan["largest_over_mean"]["table_bytes"] < 1.01
    ids = 128 * 101 + 1024  # each: 8 bytes of id, 256 floats there and back, in and out at 511 of 512 ranks
    assert plan["traffic_bytes"][0] == pytest.approx(2 * ids * 511 / 512 * (8 + 2 * 256 * 4), rel=1e-3)
    assert main([*words.split(), "--hbm", "1GB"]) == 1
    assert "does not fit: table.sharding: auto finds no plan" in capsys.readouterr().out


def test_auto_replicates_a_small_table_and_what_adamw_shall_train():
    config = Config()
    config.model.embedding_dim = 64
    gib = 1 << 30
    assert choose_table(config, 3_706, 12 * gib).sharding == "replicated"
    assert choose_table(config, 10_000_000, 12 * gib) == choose_table(config, 10_000_000, 80 * gib)
    assert choose_table(config, 10_000_000, 12 * gib).optimizer == "rowwise_adagrad"
    config.table.optimizer = "adamw"
    assert choose_table(config, 10_000_000, 12 * gib).sharding == "replicated"
    config.table.optimizer, config.table.learning_rate = "adagrad", 1e-2
    assert choose_table(config, 3_706, 12 * gib).rate_ratio == pytest.approx(10)
    config.table.optimizer, config.model.embedding_dim = None, 50
    with pytest.raises(UserError, match="model.embedding_dim: .*multiple of 4"):
        choose_table(config, 10_000_000, 12 * gib)


def test_initial_rows_do_not_depend_on_the_cut():
    whole = init_rows(torch.empty(10_000, 16), seed=3, width=16)
    part = init_rows(torch.empty(5_000, 4), seed=3, width=16, first_row=3_000, first_column=8)
    assert torch.equal(part, whole[3_000:8_000, 8:12])
    assert whole.abs().max() <= 0.04 and whole.std() == pytest.approx(0.0176, abs=2e-4)
    assert not torch.equal(whole[:4096], whole[4096:8192])
