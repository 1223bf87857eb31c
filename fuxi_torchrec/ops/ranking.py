"""Exact full ranking against a catalogue, block by block.

Every score comes from a matrix product of one fixed shape, [QUERY_BLOCK, D] x [D, ITEM_BLOCK], padded with zeros, the
target's own score too: so a rank does not depend on how queries were batched or where a table was cut (into parts
or over processes), and equal embeddings tie exactly.

Shape suffixes: Q queries, V catalogue, D embedding, S seen pairs, q queries of a block (padded), n items of a block.
"""

from typing import Iterator, List, NamedTuple, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize

QUERY_BLOCK = 512
ITEM_BLOCK = 4096
# Blocks of scores kept between the pass that finds the targets' scores and the pass that counts; beyond, recomputed.
KEPT_BLOCKS = 16

TableParts = Sequence[Tuple[int, Tensor]]  # (first row, rows [·, D])


class Seen(NamedTuple):
    """Pairs of (query, item) that are left out of a query's ranking; duplicates are harmless."""

    query_S: Tensor  # int64
    item_S: Tensor  # int64

    def of_block(self, start: int, stop: int) -> "Seen":
        """Picks the pairs of the queries [start, stop), which are counted from there."""
        inside = (self.query_S >= start) & (self.query_S < stop)
        return Seen(self.query_S[inside] - start, self.item_S[inside])

    def hide(self, scores_qn: Tensor, first_item: int) -> None:
        """Puts −inf where a pair falls into this block of items."""
        inside = (self.item_S >= first_item) & (self.item_S < first_item + scores_qn.shape[1])
        scores_qn[self.query_S[inside], self.item_S[inside] - first_item] = -torch.inf


class Ranking(NamedTuple):
    """Ranks of some queries' targets. rank_Q float64: 1 + items that score higher + half of those that tie.
    log_prob_Q float64: the target's log probability under a softmax over the whole catalogue (nothing hidden) at the
    given temperature."""

    rank_Q: Tensor
    log_prob_Q: Tensor


class QueryBlock(NamedTuple):
    """A block of up to QUERY_BLOCK queries, padded to as many: the unit that is scored, and sent where a table is
    sharded."""

    query_qD: Tensor  # float32
    target_q: Tensor  # int64
    seen: Seen
    count: int  # type: ignore[assignment]  # in place of the method that every tuple has


class Others(Protocol):
    """The holders of the table's other parts, who score the same block at the same time."""

    def sum(self, values: Tensor) -> Tensor:
        """Adds up the holders' values, in place."""

    def max(self, values: Tensor) -> Tensor:
        """Takes the maximum of the holders' values, in place."""


class Nobody:
    """The other holders where one process holds the whole table: none."""

    def sum(self, values: Tensor) -> Tensor:
        """Returns the values: there are no others."""
        return values

    max = sum


class NonFiniteScore(ArithmeticError):
    """Raised where a score was NaN or infinite. `query` is the index of the first such query."""

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
    parts = []
    for start, block in query_blocks(queries_QD, target_Q, seen):
        try:
            parts.append(rank_block(block, table, temperature, normalize_eps))
        except NonFiniteScore as error:
            raise NonFiniteScore(start + error.query) from None
    return joined(parts, queries_QD.device)


def query_blocks(queries_QD: Tensor, target_Q: Tensor, seen: Seen) -> Iterator[Tuple[int, QueryBlock]]:
    """Yields (first query, block) over all queries; targets are taken out of what is seen."""
    seen = _without_targets(seen, target_Q)
    for start in range(0, len(queries_QD), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(queries_QD))
        query_qD, target_q = _padded(queries_QD[start:stop], QUERY_BLOCK), _padded(target_Q[start:stop], QUERY_BLOCK)
        yield start, QueryBlock(query_qD, target_q, seen.of_block(start, stop), stop - start)


def rank_block(
    block: QueryBlock, table: TableParts, temperature: float, normalize_eps: float = 0.0, others: Others = Nobody()
) -> Ranking:
    """Ranks the targets of one block, [count] each. With `others` the table's parts lie on several processes, all of
    which call this with the same block, and all of which get the result or raise NonFiniteScore."""
    scored = _ScoredBlocks(block.query_qD, table, normalize_eps)
    own_q, log_total_q, broken_q = _target_scores(scored, block, temperature)
    broken_q = others.max(broken_q.int())
    if broken_q.any():
        raise NonFiniteScore(int(broken_q.argmax()))
    score_q = others.sum(own_q)  # 0 from everyone who doesn't hold the target
    higher_q, equal_q = others.sum(_count(scored, score_q, block.seen))
    rank_q = 1 + higher_q.double() + (equal_q - 1).double() / 2  # the target equals itself
    most_q = others.max(log_total_q.clone())
    log_total_q = most_q + others.sum(torch.exp(log_total_q - most_q)).log()
    log_prob_q = score_q.double() / temperature - log_total_q
    return Ranking(rank_q[: block.count], log_prob_q[: block.count])


def joined(parts: Sequence[Ranking], device: torch.device) -> Ranking:
    """Joins the rankings of several blocks."""
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return Ranking(torch.cat([empty, *(p.rank_Q for p in parts)]), torch.cat([empty, *(p.log_prob_Q for p in parts)]))


def top_items(
    queries_QD: Tensor, table: TableParts, seen: Seen, k: int, normalize_eps: float = 0.0
) -> Tuple[Tensor, Tensor]:
    """Finds the k best items of each query, best first: scores [Q, k] float32 (−inf where fewer than k items are
    left) and int64 ids [Q, k]."""
    scores, ids = [], []
    for start in range(0, len(queries_QD), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(queries_QD))
        block_seen = seen.of_block(start, stop)
        best_qk = queries_QD.new_empty(QUERY_BLOCK, 0)
        item_qk = torch.empty(QUERY_BLOCK, 0, dtype=torch.int64, device=queries_QD.device)
        for first, scores_qn in _ScoredBlocks(_padded(queries_QD[start:stop], QUERY_BLOCK), table, normalize_eps):
            block_seen.hide(scores_qn, first)
            chunk_qk, column_qk = scores_qn.topk(min(k, scores_qn.shape[1]), dim=1)
            best_qk, item_qk = merge_top([best_qk, chunk_qk], [item_qk, column_qk + first], k)
        scores.append(best_qk[: stop - start])
        ids.append(item_qk[: stop - start])
    return torch.cat(scores), torch.cat(ids)


def merge_top(scores: Sequence[Tensor], items: Sequence[Tensor], k: int) -> Tuple[Tensor, Tensor]:
    """Merges several lists of scores [Q, ·] and their item ids to the k best, best first; of equals, those of the
    first list."""
    best_qk, order = torch.sort(torch.cat(list(scores), 1), dim=1, descending=True, stable=True)
    return best_qk[:, :k], torch.cat(list(items), 1).gather(1, order[:, :k])


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


def _target_scores(scored: _ScoredBlocks, block: QueryBlock, temperature: float) -> Tuple[Tensor, Tensor, Tensor]:
    """Each target's score (float32, 0 where its row isn't here), the log of the softmax's denominator (float64) over
    these rows, and which queries have a score that isn't finite."""
    score_q = block.query_qD.new_zeros(QUERY_BLOCK)
    log_total_q = torch.full((QUERY_BLOCK,), -torch.inf, dtype=torch.float64, device=score_q.device)
    broken_q = torch.zeros(QUERY_BLOCK, dtype=torch.bool, device=score_q.device)
    for first, scores_qn in scored:
        # A NaN or ±inf anywhere in a row makes the sum of the row's products with 0 NaN, at a third of isfinite's cost.
        broken_q[: block.count] |= (scores_qn[: block.count] * 0).sum(1) != 0
        inside_q = (block.target_q >= first) & (block.target_q < first + scores_qn.shape[1])
        own_q = scores_qn.gather(1, (block.target_q - first).clamp(0, scores_qn.shape[1] - 1)[:, None])[:, 0]
        score_q = torch.where(inside_q, own_q, score_q)
        log_total_q = torch.logaddexp(log_total_q, torch.logsumexp(scores_qn / temperature, 1).double())
    return score_q, log_total_q, broken_q


def _count(scored: _ScoredBlocks, score_q: Tensor, seen: Seen) -> Tensor:
    """int64 [2, q]: how many items score higher, and how many the same."""
    counts_2q = torch.zeros(2, QUERY_BLOCK, dtype=torch.int64, device=score_q.device)
    for first, scores_qn in scored:
        seen.hide(scores_qn, first)
        counts_2q[0] += (scores_qn > score_q[:, None]).sum(1)
        counts_2q[1] += (scores_qn == score_q[:, None]).sum(1)
    return counts_2q


def _without_targets(seen: Seen, target_Q: Tensor) -> Seen:
    other = seen.item_S != target_Q[seen.query_S]
    return Seen(seen.query_S[other], seen.item_S[other])


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
