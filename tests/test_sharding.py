"""Sharded tables, by real processes: the same losses and the same ranks however the table and the batch are cut."""

import json
import os
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import resharding_jobs as reshards
import sharding_jobs as jobs
import torch
from sharding_jobs import tiny
from workers import worker_processes

from fuxi_torchrec.cli import main
from fuxi_torchrec.config import Config, LossConfig
from fuxi_torchrec.config_check import check, check_table
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.plan_report import report
from fuxi_torchrec.planning import Machine
from fuxi_torchrec.run_folder import RunFolder
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


def test_four_processes_resume_exactly(run, small_dataset, tmp_path):
    """Of three ranks or more it matters in what order a gradient's parts are added up."""
    whole = run(jobs.trained, 4, tiny(small_dataset, "row_wise", max_steps=9, log_every_steps=1), str(tmp_path / "whole"))[0]
    run(jobs.trained, 4, tiny(small_dataset, "row_wise", max_steps=4, log_every_steps=1), str(tmp_path / "cut"))
    again = tiny(small_dataset, "row_wise", max_steps=9, log_every_steps=1)
    assert run(jobs.trained, 4, again, str(tmp_path / "cut"), True)[0] == whole


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


def test_a_score_that_is_not_finite_is_the_same_error_on_every_rank(run, small_dataset):
    messages = run(jobs.poisoned_metrics, 2, tiny(small_dataset, "row_wise"))
    assert messages[0] == messages[1]
    assert "non-finite score for user" in messages[0]


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


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(sharding="row_wise", optimizer="adamw"), "table.optimizer: adamw trains only replicated.*rowwise_adagrad"),
        (dict(sharding="replicated", optimizer="rowwise_adagrad"), "table.optimizer: .*take adamw, or table.sharding"),
        (dict(optimizer="adamw", learning_rate=0.1), "table.learning_rate: .*optimizer.learning_rate"),
        (dict(sharding="row_wise", embedding_dim=50), "model.embedding_dim: .*multiple of 4, not 50; .*=replicated"),
        (dict(optimizer="adagrad", embedding_dim=50), "model.embedding_dim: .*multiple of 4, not 50; .*=replicated"),
        (dict(sharding="row_wise", optimizer="adam"), "table.optimizer: .*no fused adam on a CPU; take rowwise_adagrad"),
        (dict(sharding="replicated", learning_rate=0.1), "table.learning_rate: .*optimizer.learning_rate"),
        (dict(sharding="row_wise", hbm_gb=0.0), "table.hbm_gb: 0.0 must be greater than 0"),
    ],
)
def test_what_cannot_train_is_refused_with_its_key_and_the_alternatives(keys, words):
    config, keys = Config(), dict(keys)
    config.trainer.device, config.model.embedding_dim = "cpu", keys.pop("embedding_dim", 8)
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


def test_auto_cuts_columns_only_where_that_changes_no_result():
    """A wide table on few ranks is what the planner likes to cut by columns."""

    def sharding(optimizer):
        config = Config()
        config.model.embedding_dim, config.table.optimizer = 256, optimizer
        return report(config, Machine("cpu", 0, 128 << 30, 2, 2), items=10**7, events=100.0).sharding

    assert sharding("rowwise_adagrad") == "row_wise" and sharding("adagrad") == "column_wise"


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
