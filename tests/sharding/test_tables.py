"""What table.sharding and table.optimizer resolve to, what is refused, and plans of clusters that are not there."""

import json
import time

import pytest
import torch

from fuxi_torchrec.cli.main import main
from fuxi_torchrec.config import Config
from fuxi_torchrec.config.rules import check, check_table
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.model.table_init import init_rows
from fuxi_torchrec.sharding.planner import Machine
from fuxi_torchrec.sharding.report import report
from fuxi_torchrec.sharding.table_choice import choose_table, dense_part
from tests.helpers.command_line import SMOKE

pytestmark = pytest.mark.thorough


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
    assert choose_table(config, 3_706, 12 * gib, 100.0).sharding == "replicated"
    assert choose_table(config, 10_000_000, 12 * gib, 100.0) == choose_table(config, 10_000_000, 80 * gib, 100.0)
    assert choose_table(config, 10_000_000, 12 * gib, 100.0).optimizer == "rowwise_adagrad"
    config.table.optimizer = "adamw"
    assert choose_table(config, 10_000_000, 12 * gib, 100.0).sharding == "replicated"
    config.table.optimizer, config.table.learning_rate = "adagrad", 1e-2
    assert choose_table(config, 3_706, 12 * gib, 100.0).rate_ratio == pytest.approx(10)
    config.table.optimizer, config.model.embedding_dim = None, 50
    with pytest.raises(UserError, match="model.embedding_dim: .*multiple of 4"):
        choose_table(config, 10_000_000, 12 * gib, 100.0)


def test_auto_shards_a_table_that_fits_but_would_cost_more_than_a_tenth_of_every_step():
    """864,691 items of 32 numbers are 0.4 GB with their gradient and moments, and small batches have little else to do."""
    config, memory = Config(), 1 << 40
    config.model.embedding_dim = config.model.value_dim = 32
    config.data.batch_size, config.loss.negatives = 64, "shared"
    assert choose_table(config, 864_691, memory, 50.0).is_sharded
    parts = [dense_part(config, items, 50.0) for items in (1_000, 10_000, 100_000, 1_000_000)]
    assert parts == sorted(parts) and parts[0] < 0.1 < parts[2]
    config.data.batch_size = 8192  # a step in which the pass is little again
    assert dense_part(config, 100_000, 50.0) < 0.1
    config.data.batch_size, config.model.embedding_dim = 64, 50
    kept = choose_table(config, 864_691, memory, 50.0)  # fbgemm shards no such width
    assert not kept.is_sharded and "passes over the whole table" in kept.note and "row_wise" in kept.note
    config.table.sharding = "replicated"
    assert choose_table(config, 864_691, memory, 50.0).note == ""


def test_initial_rows_do_not_depend_on_the_cut():
    whole = init_rows(torch.empty(10_000, 16), seed=3, width=16)
    part = init_rows(torch.empty(5_000, 4), seed=3, width=16, first_row=3_000, first_column=8)
    assert torch.equal(part, whole[3_000:8_000, 8:12])
    assert whole.abs().max() <= 0.04 and whole.std() == pytest.approx(0.0176, abs=2e-4)
    assert not torch.equal(whole[:4096], whole[4096:8192])
