"""Full ranking and top-k against the model's item table, wherever its parts lie.

A replicated table is ranked by each rank for its own users. Of a sharded one every rank scores every rank's queries
against the rows it holds: blocks of queries go round, one owner after the other, and only sums of counts come back. A
rank never holds more than its part, a block of queries and a few blocks of scores.

Shape suffixes: Q queries, q queries of a block, D embedding, S seen pairs, V catalogue.
"""

from typing import Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.ops import ranking as ops
from fuxi_torchrec.ops.ranking import NonFiniteScore, QueryBlock, Ranking, Seen, TableParts
from fuxi_torchrec.sharding.model_parallel import is_sharded, local_parts, table_shards

# Rows that one rank gets from all others at once while columns become rows.
EXCHANGED_ROWS = 1 << 16


def rank_targets(
    model: DistributedModelParallel,
    world: World,
    queries_QD: Tensor,
    target_Q: Tensor,
    seen: Seen,
    temperature: float,
    normalize_eps: float,
) -> Ranking:
    """Ranks this rank's targets among the whole catalogue, as ops.ranking.rank_targets does; with a sharded table
    every rank calls it, those without queries too.

    Raises NonFiniteScore; with a sharded table on all ranks at once, its `query` −1 where the query is another rank's.
    """
    table = row_parts(model, world)
    if not is_sharded(model):
        return ops.rank_targets(queries_QD, table, target_Q, seen, temperature, normalize_eps)
    mine = []
    for owner, start, block in _all_blocks(list(ops.query_blocks(queries_QD, target_Q, seen)), queries_QD, world):
        try:
            ranking = ops.rank_block(block, table, temperature, normalize_eps, others=world)
        except NonFiniteScore as error:
            raise NonFiniteScore(start + error.query if owner == world.rank else -1) from None
        if owner == world.rank:
            mine.append(ranking)
    return ops.joined(mine, queries_QD.device)


def top_items(
    model: DistributedModelParallel, world: World, queries_QD: Tensor, seen: Seen, k: int, normalize_eps: float
) -> Tuple[Tensor, Tensor]:
    """Finds the best items as ops.ranking.top_items does; every rank asks the same queries and gets the same answer."""
    scores_Qk, items_Qk = ops.top_items(queries_QD, row_parts(model, world), seen, k, normalize_eps)
    if not is_sharded(model) or world.size == 1:
        return scores_Qk, items_Qk
    short = k - scores_Qk.shape[1]  # a rank may hold fewer rows than k
    scores_Qk = torch.nn.functional.pad(scores_Qk, (0, short), value=-torch.inf)
    items_Qk = torch.nn.functional.pad(items_Qk, (0, short))
    return ops.merge_top(_gathered(scores_Qk, world), _gathered(items_Qk, world), k)


def row_parts(model: DistributedModelParallel, world: World) -> TableParts:
    """Returns this rank's whole rows of the table, as (first row, rows [·, D]): all of them where it is replicated.
    Rows of a table cut by columns are put together first, which takes the memory of this rank's part once more."""
    if not is_sharded(model):
        return [(0, values) for _, _, values in local_parts(model)]
    shards, (num_rows, width) = table_shards(model)
    if all(columns == width for _, _, _, columns in shards):
        return [(row, values) for row, _, values in local_parts(model)]
    return _rows_from_columns(model, world, num_rows, width)


def _all_blocks(
    own: List[Tuple[int, QueryBlock]], queries_QD: Tensor, world: World
) -> Iterator[Tuple[int, int, QueryBlock]]:
    """(owner, its first query, block) of all ranks' blocks, on every rank, in one order."""
    if world.size == 1:
        yield from ((0, start, block) for start, block in own)
        return
    rounds = int(world.max(torch.tensor([len(own)], device=world.device)))
    for number in range(rounds):
        for owner in range(world.size):
            start, block = own[number] if owner == world.rank and number < len(own) else (0, None)
            block = _sent_round(block, owner, queries_QD.shape[1], world)
            if block.count:
                yield owner, start, block


def _sent_round(block: Optional[QueryBlock], owner: int, width: int, world: World) -> QueryBlock:
    header = torch.tensor([block.count, len(block.seen.item_S)] if block else [0, 0], device=world.device)
    dist.broadcast(header, owner)
    count, pairs = header.tolist()
    if block is None:
        block = _empty_block(width, pairs, count, world.device)
    if count:
        numbers = torch.cat([block.target_q, block.seen.query_S, block.seen.item_S])
        dist.broadcast(numbers, owner)
        query_qD = block.query_qD.contiguous()
        dist.broadcast(query_qD, owner)
        target_q, query_S, item_S = numbers.split([ops.QUERY_BLOCK, pairs, pairs])
        block = QueryBlock(query_qD, target_q, Seen(query_S, item_S), count)
    return block


def _empty_block(width: int, pairs: int, count: int, device: torch.device) -> QueryBlock:
    numbers = torch.zeros(ops.QUERY_BLOCK, dtype=torch.int64, device=device)
    pairs_S = torch.zeros(pairs, dtype=torch.int64, device=device)
    return QueryBlock(torch.zeros(ops.QUERY_BLOCK, width, device=device), numbers, Seen(pairs_S, pairs_S), count)


def _gathered(values: Tensor, world: World) -> List[Tensor]:
    parts = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(parts, values.contiguous())
    return parts


def _rows_from_columns(model: DistributedModelParallel, world: World, num_rows: int, width: int) -> TableParts:
    """Deals rows evenly to the ranks and gives each its rows at full width, some at a time."""
    shards, _ = table_shards(model)
    each = -(-num_rows // world.size)
    first, last = (min(rank * each, num_rows) for rank in (world.rank, world.rank + 1))
    rows_VD = torch.empty(last - first, width, device=world.device)
    for begin in range(0, each, EXCHANGED_ROWS):
        # Every rank's rows of this turn, as (start, stop) of the table.
        spans = [
            (min(rank * each + begin, num_rows), min(rank * each + min(begin + EXCHANGED_ROWS, each), num_rows))
            for rank in range(world.size)
        ]
        sent = [[part[start:stop].reshape(-1) for _, _, part in local_parts(model)] for start, stop in spans]
        start, stop = spans[world.rank]
        widths = [[columns for owner, _, _, columns in shards if owner == rank] for rank in range(world.size)]
        received = torch.empty((stop - start) * width, device=world.device)
        outgoing = torch.cat([piece for pieces in sent for piece in pieces] or [received.new_empty(0)])
        dist.all_to_all_single(
            received,
            outgoing,
            [(stop - start) * sum(w) for w in widths],
            [sum(piece.numel() for piece in pieces) for pieces in sent],
        )
        pieces = received.split([(stop - start) * columns for w in widths for columns in w])
        offsets = [column for rank in range(world.size) for owner, column, _, _ in shards if owner == rank]
        for column, columns, piece in zip(offsets, [columns for w in widths for columns in w], pieces):
            rows_VD[start - first : stop - first, column : column + columns] = piece.view(-1, columns)
    return [(first, rows_VD)]
