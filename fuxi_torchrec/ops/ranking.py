"""Exact full ranking against a catalogue, block by block.

Every score comes from a matrix product of one fixed shape, [QUERY_BLOCK, D] x [D, ITEM_BLOCK], padded with zeros, the
target's own score too: so a rank does not depend on how queries were batched or where a table was cut, and equal
embeddings tie exactly.

Shape suffixes: Q queries, V catalogue, D embedding, S seen pairs, q queries of a block (padded), n items of a block.
"""

from typing import Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops.sampled_softmax import l2_normalize

QUERY_BLOCK = 512
ITEM_BLOCK = 4096
# Blocks of scores kept between the pass that finds the targets' scores and the pass that counts; beyond, recomputed.
KEPT_BLOCKS = 16

TableParts = Sequence[Tuple[int, Tensor]]  # (first row, rows [·, D])


class Seen(NamedTuple):
    """(query, item) pairs that are left out of a query's ranking; duplicates are harmless."""

    query_S: Tensor  # int64
    item_S: Tensor  # int64

    def of_block(self, start: int, stop: int) -> "Seen":
        inside = (self.query_S >= start) & (self.query_S < stop)
        return Seen(self.query_S[inside] - start, self.item_S[inside])

    def hide(self, scores_qn: Tensor, first_item: int) -> None:
        """Puts −inf where a pair falls into this block of items."""
        inside = (self.item_S >= first_item) & (self.item_S < first_item + scores_qn.shape[1])
        scores_qn[self.query_S[inside], self.item_S[inside] - first_item] = -torch.inf


class Ranking(NamedTuple):
    """rank_Q float64: 1 + items that score higher + half of those that tie. log_prob_Q float64: the target's log
    probability under a softmax over the whole catalogue (nothing hidden) at the given temperature."""

    rank_Q: Tensor
    log_prob_Q: Tensor


class NonFiniteScore(ArithmeticError):
    """A score was NaN or infinite. `query` is the index of the first such query."""

    def __init__(self, query: int):
        super().__init__(f"non-finite score for query {query}")
        self.query = query


def rank_targets(
    queries_QD: Tensor, table: TableParts, target_Q: Tensor, seen: Seen, temperature: float, normalize_eps: float = 0.0
) -> Ranking:
    """Ranks each query's target among all items but the seen ones; the target itself is never left out.

    Args:
        queries_QD: float32.
        table: the catalogue's rows, in parts.
        target_Q: int64 item ids.
        seen: pairs to leave out.
        temperature: τ of the softmax whose log probability is reported.
        normalize_eps: if not 0, rows are divided by max(‖row‖₂, eps).

    Raises:
        NonFiniteScore: a score is NaN or infinite; it is never turned into a rank.
    """
    seen = _without_targets(seen, target_Q)
    ranks, log_probs = [], []
    for start in range(0, len(queries_QD), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(queries_QD))
        block_qD = _padded(queries_QD[start:stop], QUERY_BLOCK)
        target_q = _padded(target_Q[start:stop], QUERY_BLOCK)
        scored = _ScoredBlocks(block_qD, table, normalize_eps)
        score_q, log_total_q = _target_scores(scored, target_q, temperature, start, stop - start)
        rank_q = _count(scored, score_q, seen.of_block(start, stop))
        ranks.append(rank_q[: stop - start])
        log_probs.append((score_q.double() / temperature - log_total_q)[: stop - start])
    empty = queries_QD.new_zeros(0, dtype=torch.float64)
    return Ranking(torch.cat([empty, *ranks]), torch.cat([empty, *log_probs]))


def top_items(
    queries_QD: Tensor, table: TableParts, seen: Seen, k: int, normalize_eps: float = 0.0
) -> Tuple[Tensor, Tensor]:
    """The k best items of each query, best first: scores [Q, k] float32 (−inf where fewer than k items are left) and
    int64 ids [Q, k]."""
    scores, ids = [], []
    for start in range(0, len(queries_QD), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(queries_QD))
        block_seen = seen.of_block(start, stop)
        best_qk = queries_QD.new_empty(QUERY_BLOCK, 0)
        item_qk = torch.empty(QUERY_BLOCK, 0, dtype=torch.int64, device=queries_QD.device)
        for first, scores_qn in _ScoredBlocks(_padded(queries_QD[start:stop], QUERY_BLOCK), table, normalize_eps):
            block_seen.hide(scores_qn, first)
            chunk_qk, column_qk = scores_qn.topk(min(k, scores_qn.shape[1]), dim=1)
            merged = torch.cat([best_qk, chunk_qk], 1)
            items = torch.cat([item_qk, column_qk + first], 1)
            best_qk, order = torch.sort(merged, dim=1, descending=True, stable=True)
            best_qk, item_qk = best_qk[:, :k], items.gather(1, order[:, :k])
        scores.append(best_qk[: stop - start])
        ids.append(item_qk[: stop - start])
    return torch.cat(scores), torch.cat(ids)


class _ScoredBlocks:
    """Iterates (first item, scores [QUERY_BLOCK, items]) over the table; keeps few blocks, recomputes many."""

    def __init__(self, block_qD: Tensor, table: TableParts, normalize_eps: float):
        self.block_qD, self.table, self.normalize_eps = block_qD, table, normalize_eps
        self.kept: List[Tuple[int, Tensor]] = []
        self.keeps = sum(-(-len(rows) // ITEM_BLOCK) for _, rows in table) <= KEPT_BLOCKS

    def __iter__(self) -> Iterator[Tuple[int, Tensor]]:
        if self.kept:
            yield from self.kept
            return
        for first_row, rows_VD in self.table:
            for begin in range(0, len(rows_VD), ITEM_BLOCK):
                rows_nD = rows_VD[begin : begin + ITEM_BLOCK]
                items = len(rows_nD)
                if self.normalize_eps:
                    rows_nD = l2_normalize(rows_nD, self.normalize_eps)
                scores_qn = (self.block_qD @ _padded(rows_nD.float(), ITEM_BLOCK).t())[:, :items]
                if self.keeps:
                    self.kept.append((first_row + begin, scores_qn))
                yield first_row + begin, scores_qn


def _target_scores(
    scored: _ScoredBlocks, target_q: Tensor, temperature: float, start: int, count: int
) -> Tuple[Tensor, Tensor]:
    """Each target's score (float32) and the log of the softmax's denominator (float64)."""
    score_q = scored.block_qD.new_zeros(QUERY_BLOCK)
    log_total_q = torch.full((QUERY_BLOCK,), -torch.inf, dtype=torch.float64, device=score_q.device)
    for first, scores_qn in scored:
        # A NaN or ±inf anywhere in a row makes the sum of the row's products with 0 NaN, at a third of isfinite's cost.
        broken_q = (scores_qn[:count] * 0).sum(1) != 0
        if broken_q.any():
            raise NonFiniteScore(start + int(broken_q.int().argmax()))
        inside_q = (target_q >= first) & (target_q < first + scores_qn.shape[1])
        own_q = scores_qn.gather(1, (target_q - first).clamp(0, scores_qn.shape[1] - 1)[:, None])[:, 0]
        score_q = torch.where(inside_q, own_q, score_q)
        log_total_q = torch.logaddexp(log_total_q, torch.logsumexp(scores_qn / temperature, 1).double())
    return score_q, log_total_q


def _count(scored: _ScoredBlocks, score_q: Tensor, seen: Seen) -> Tensor:
    higher_q = torch.zeros(QUERY_BLOCK, dtype=torch.int64, device=score_q.device)
    equal_q = torch.zeros_like(higher_q)
    for first, scores_qn in scored:
        seen.hide(scores_qn, first)
        higher_q += (scores_qn > score_q[:, None]).sum(1)
        equal_q += (scores_qn == score_q[:, None]).sum(1)
    return 1 + higher_q.double() + (equal_q - 1).double() / 2  # the target equals itself


def _without_targets(seen: Seen, target_Q: Tensor) -> Seen:
    other = seen.item_S != target_Q[seen.query_S]
    return Seen(seen.query_S[other], seen.item_S[other])


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
