"""Full ranking: exact ranks with half ties, seen items out, the same at any cut of queries and table."""

import math

import pytest
import torch

from fuxi_torchrec.evaluation.metrics import metric_sums
from fuxi_torchrec.ops.ranking import ITEM_BLOCK, QUERY_BLOCK, NonFiniteScore, Seen, rank_targets, top_items
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize

NONE = Seen(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))


def problem(queries, items, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query_QD = l2_normalize(torch.randn(queries, width, generator=generator))
    table_VD = torch.randn(items, width, generator=generator)
    table_VD[items // 2] = table_VD[0]  # an exact tie
    target_Q = torch.randint(0, items, (queries,), generator=generator)
    seen = Seen(
        torch.randint(0, queries, (5 * queries,), generator=generator),
        torch.randint(0, items, (5 * queries,), generator=generator),
    )
    return query_QD, table_VD, target_Q, seen


def slow_ranks(query_QD, table_VD, target_Q, seen):
    # Products summed one by one: equal rows tie exactly here too.
    scores = (query_QD.double()[:, None] * l2_normalize(table_VD).double()).sum(-1)
    ranks = []
    for q, target in enumerate(target_Q.tolist()):
        hidden = set(seen.item_S[seen.query_S == q].tolist()) - {target}
        rest = [scores[q, v].item() for v in range(len(table_VD)) if v not in hidden and v != target]
        own = scores[q, target].item()
        ranks.append(1 + sum(s > own for s in rest) + 0.5 * sum(s == own for s in rest))
    return torch.tensor(ranks, dtype=torch.float64), torch.log_softmax(scores / 0.05, 1)[range(len(target_Q)), target_Q]


def test_ranks_equal_a_slow_count():
    query_QD, table_VD, target_Q, seen = problem(40, 90)
    target_Q[:2] = torch.tensor([0, 45])  # the tied pair
    got = rank_targets(query_QD, [(0, table_VD)], target_Q, seen, 0.05, normalize_eps=1e-6)
    ranks, log_probs = slow_ranks(query_QD, table_VD, target_Q, seen)
    assert torch.equal(got.rank_Q, ranks)
    torch.testing.assert_close(got.log_prob_Q, log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [[5000], [1, 4999], [2048, 2952], [4096, 904]])
@pytest.mark.parametrize("batch", [QUERY_BLOCK + 100, 7])
def test_ranks_do_not_depend_on_batches_or_cuts(cut, batch):
    query_QD, table_VD, target_Q, seen = problem(QUERY_BLOCK + 100, ITEM_BLOCK + 904)
    whole = rank_targets(query_QD, [(0, table_VD)], target_Q, seen, 0.05, normalize_eps=1e-6)
    starts = [sum(cut[:i]) for i in range(len(cut))]
    parts = [(start, table_VD[start : start + rows]) for start, rows in zip(starts, cut)]
    ranks = []
    for start in range(0, 60 if batch == 7 else len(query_QD), batch):
        stop = min(start + batch, len(query_QD))
        own = seen.of_block(start, stop)
        ranks.append(rank_targets(query_QD[start:stop], parts, target_Q[start:stop], own, 0.05, 1e-6).rank_Q)
    ranks = torch.cat(ranks)
    assert torch.equal(ranks, whole.rank_Q[: len(ranks)])


def test_many_blocks_are_recomputed_and_few_are_kept_with_the_same_ranks(monkeypatch):
    query_QD, table_VD, target_Q, seen = problem(30, 9000)
    kept = rank_targets(query_QD, [(0, table_VD)], target_Q, seen, 0.05, normalize_eps=1e-6)
    monkeypatch.setattr("fuxi_torchrec.ops.ranking.KEPT_BLOCKS", 0)
    recomputed = rank_targets(query_QD, [(0, table_VD)], target_Q, seen, 0.05, normalize_eps=1e-6)
    assert torch.equal(kept.rank_Q, recomputed.rank_Q)


def test_a_target_in_the_history_is_still_ranked():
    query_QD, table_VD, target_Q, _ = problem(4, 20)
    seen = Seen(torch.arange(4), target_Q)
    got = rank_targets(query_QD, [(0, table_VD)], target_Q, seen, 0.05, 1e-6)
    assert torch.equal(got.rank_Q, rank_targets(query_QD, [(0, table_VD)], target_Q, NONE, 0.05, 1e-6).rank_Q)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_score_is_an_error_that_names_the_query(poison):
    query_QD, table_VD, target_Q, _ = problem(QUERY_BLOCK + 5, 20)
    query_QD[QUERY_BLOCK + 2, 0] = poison
    with pytest.raises(NonFiniteScore) as caught:
        rank_targets(query_QD, [(0, table_VD)], target_Q, NONE, 0.05, 1e-6)
    assert caught.value.query == QUERY_BLOCK + 2


def test_top_items_leave_seen_ones_out_and_say_where_the_catalogue_ends():
    query_QD, table_VD, _, seen = problem(6, 5000)
    scores, items = top_items(query_QD, [(0, table_VD[:3000]), (3000, table_VD[3000:])], seen, 10, 1e-6)
    full = query_QD @ l2_normalize(table_VD).T
    full[seen.query_S, seen.item_S] = -math.inf
    expected = full.topk(10, 1)
    torch.testing.assert_close(scores, expected.values)
    assert all(len(set(row.tolist())) == 10 for row in items)
    few, _ = top_items(query_QD[:1], [(0, table_VD[:3])], Seen(torch.tensor([0]), torch.tensor([1])), 3, 1e-6)
    assert torch.isneginf(few[0]).tolist() == [False, False, True]


def test_metrics_are_those_of_the_protocol():
    sums = metric_sums(torch.tensor([1.0, 2.5, 10.0, 11.0]).double(), torch.tensor([-1.0, -2.0, -3.0, -4.0]).double())
    assert sums["users"] == 4 and sums["hr@1"] == 1 and sums["hr@10"] == 3 and sums["hr@1000"] == 4
    expected = 1 + 1 / math.log2(3.5) + 1 / math.log2(11)
    assert sums["ndcg@10"].item() == pytest.approx(expected, rel=1e-12)
    assert sums["mrr"].item() == pytest.approx(1 + 1 / 2.5 + 0.1 + 1 / 11, rel=1e-12)
    assert sums["cross_entropy"] == 10
