"""What `auto` and `fuxi-torchrec plan` count: the candidates of all ranks, and the bandwidths that TorchRec is given."""

import json

import pytest
from torchrec.distributed.planner.constants import CROSS_NODE_BANDWIDTH, INTRA_NODE_BANDWIDTH

from fuxi_torchrec.cli.main import main
from fuxi_torchrec.config import Config
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.sharding import planner
from fuxi_torchrec.sharding.memory_estimate import distinct
from fuxi_torchrec.sharding.planner import GIB, Machine
from fuxi_torchrec.sharding.report import report
from tests.helpers.command_line import SMOKE

ITEMS, EVENTS = 10_000_000, 101.0


def config_of(negatives, cross_rank, **loss):
    config = Config()
    config.model.embedding_dim, config.table.sharding = 64, "row_wise"
    config.loss.negatives, config.loss.num_negatives, config.loss.cross_rank = negatives, 1000, cross_rank
    for key, value in loss.items():
        setattr(config.loss, key, value)
    check(config)
    return config


def cluster(ranks, hbm=80 * GIB, **speeds):
    return Machine("cuda", hbm, 128 * GIB, ranks, min(ranks, 8), **speeds)


def test_candidates_of_all_ranks_are_counted_in_memory_and_traffic():
    alone = report(config_of("shared", cross_rank=False), cluster(64), ITEMS, EVENTS)
    assert alone.candidates == 1000 and alone.candidate_traffic_bytes == 0
    reports = {ranks: report(config_of("shared", cross_rank=True), cluster(ranks), ITEMS, EVENTS) for ranks in (8, 64)}
    for ranks, made in reports.items():
        assert made.candidates == 1000 * ranks
        # A candidate's embedding and id to and from every other rank, and its gradient back.
        assert made.candidate_traffic_bytes == 2 * (ranks - 1) * 1000 * (2 * 64 * 4 + 8)
        assert made.memory_bytes[0] - made.candidate_bytes == sum(
            (made.table_bytes[0], made.optimizer_bytes[0], made.lookup_bytes[0], made.dense_bytes, made.activation_bytes)
        )
    # Three matrices of the gathered candidates and their ids.
    assert reports[64].candidate_bytes - reports[8].candidate_bytes == 56 * 1000 * (3 * 64 * 4 + 8)


def test_in_batch_candidates_are_the_distinct_positives_or_the_most_that_are_kept():
    positives = 128 * 100
    made = report(config_of("mixed", cross_rank=True), cluster(8), ITEMS, EVENTS)
    assert made.candidates == pytest.approx(8 * (1000 + distinct(positives, ITEMS)))
    assert 0.999 * positives < distinct(positives, ITEMS) < positives and distinct(positives, 10) == pytest.approx(10)
    made = report(config_of("mixed", cross_rank=True, max_in_batch=500, log_q=True), cluster(8), ITEMS, EVENTS)
    assert made.candidates == 8 * 1500
    assert made.candidate_traffic_bytes == 2 * 7 * 1500 * (2 * 64 * 4 + 8 + 4 + 4)  # logQ: draws and shares


@pytest.mark.thorough
def test_candidates_that_fill_the_memory_make_a_plan_that_does_not_fit_and_auto_shard():
    wide = config_of("in_batch", cross_rank=True)
    assert report(wide, cluster(512, hbm=8 * GIB), ITEMS, EVENTS).fits
    wide.data.batch_size = 1024
    made = report(wide, cluster(512, hbm=8 * GIB), ITEMS, EVENTS)
    assert not made.fits and "kept for encoder, activations and loss" in made.reason
    wide.loss.cross_rank = False
    assert report(wide, cluster(512, hbm=8 * GIB), ITEMS, EVENTS).fits
    # A table of 1.5 % of the memory is small, unless candidates take half of that.
    config, machine = config_of("shared", cross_rank=True), cluster(512, hbm=8 * GIB)
    config.table.sharding, small = "auto", int(0.015 * 8 * GIB / (4 * 64 * 4))
    assert planner.choose(config, machine, small, EVENTS).sharding == "replicated"
    config.loss.num_negatives = 10_000
    assert planner.choose(config, machine, small, EVENTS).sharding == "auto"


def test_bandwidths_reach_torchrec_and_change_what_it_expects(tmp_path, capsys):
    topology = cluster(16).topology()
    assert (topology.intra_host_bw, topology.inter_host_bw) == (INTRA_NODE_BANDWIDTH, CROSS_NODE_BANDWIDTH)
    topology = cluster(16, intra_host_gb_s=450.0, inter_host_gb_s=25.0).topology()
    assert (topology.intra_host_bw, topology.inter_host_bw) == (450e9 / 1000, 25e9 / 1000)  # bytes a millisecond

    def planned(*options):
        words = f"plan {SMOKE} --world-size 16 --hbm 80GB --items {ITEMS} --table.sharding row_wise"
        assert main([*words.split(), "--output", str(tmp_path / "plan.json"), *options]) == 0
        return json.loads((tmp_path / "plan.json").read_text())

    slow, fast = (planned("--table.inter_host_gb_s", speed) for speed in ("1", "100"))
    assert slow["machine"]["inter_host_gb_s"] == 1.0 and slow["planner_ms"] > 10 * fast["planner_ms"] > 0
    assert f"exchange: {slow['planner_ms']:.1f} ms" in capsys.readouterr().out
    config = Config()
    config.table.intra_host_gb_s = 0.0
    with pytest.raises(UserError, match="table.intra_host_gb_s: 0.0 must be greater than 0"):
        check(config)
