"""From a batch's negatives to the candidates of its loss: across ranks, weighed by logQ, with the history masked.

Shape suffixes: T positions, P candidates (of this rank, or of all of them), N in-batch items, E events, D embedding,
R ranks.
"""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fuxi_torchrec.data.batch import EVENTS, NEGATIVES, SequenceBatch
from fuxi_torchrec.data.negative_sampler import SharedNegatives
from fuxi_torchrec.distributed.all_gather import gather_rows, gather_values
from fuxi_torchrec.ops.sampled_softmax.common import MASKED_LOGIT


@dataclass
class Candidates:
    """The candidates that every token of this rank is compared with.

    embeddings_PD: L2-normalised; gradients flow back to the ranks that looked them up.
    ids_P: int64.
    bias_P: float32, added to the logits; None for nothing.
    """

    embeddings_PD: Tensor
    ids_P: Tensor
    bias_P: Optional[Tensor]


class RankShare(NamedTuple):
    """One rank's batch, as far as logQ and the exchange need to know it."""

    pool: int  # candidates drawn
    in_batch: int  # in-batch items offered
    positions: int
    kept: float  # part of its distinct positives that it offers


def shared_candidates(
    pool_PD: Tensor, positives_TD: Tensor, batch: SequenceBatch, negatives: SharedNegatives, cross_rank: bool
) -> Candidates:
    """Collects the pool and the in-batch items of this rank, or with cross_rank of all ranks, in their order.

    A collective with cross_rank: every rank has to call it, those without data too. In-batch items that several ranks
    offer count once, so that ranks see what one process would see in their batches' union.

    Args:
        pool_PD: L2-normalised embeddings of the batch's pool; [0, D] where there is none.
        positives_TD: L2-normalised embeddings of the positions' positives.
        negatives: the batch's; logits are weighed by logQ where it has expected draws.
    """
    ids_P, embeddings_PD = batch.ids[NEGATIVES].values(), pool_PD
    share, in_batch = RankShare(ids_P.numel(), 0, batch.num_tokens, 1.0), negatives.in_batch
    if in_batch is not None:
        positive_ids_T = batch.ids[EVENTS].values()[batch.input_index_T + 1]
        ids_P = torch.cat([ids_P, positive_ids_T[in_batch.index_N]])
        embeddings_PD = torch.cat([pool_PD, positives_TD.index_select(0, in_batch.index_N)])
        share = share._replace(in_batch=in_batch.index_N.numel(), kept=in_batch.kept)
    shares, draws_P, here, bias_P = [share], negatives.expected_draws_P, 0, None
    item_share_P = None if in_batch is None else in_batch.item_share_P
    if cross_rank and dist.is_initialized() and dist.get_world_size() > 1:
        here = dist.get_rank()
        shares = _all_shares(share, in_batch is not None, ids_P.device)
        counts = [s.pool + s.in_batch for s in shares]
        embeddings_PD, ids_P = gather_rows(embeddings_PD, counts), gather_values(ids_P, counts)
        draws_P = gather_values(draws_P, counts) if draws_P is not None else None
        item_share_P = gather_values(item_share_P, counts) if item_share_P is not None else None
    if draws_P is not None:
        bias_P = -expected_count(draws_P, item_share_P, shares, here).log()
    if in_batch is not None and len(shares) > 1:
        bias_P = torch.zeros_like(ids_P, dtype=torch.float32) if bias_P is None else bias_P
        bias_P = bias_P.masked_fill(_repeated_in_batch(ids_P, shares), MASKED_LOGIT)
    return Candidates(embeddings_PD, ids_P, bias_P)


def expected_count(
    draws_P: Tensor, item_share_P: Optional[Tensor], shares: List[RankShare], here: int = 0
) -> Tensor:
    """Computes how often each candidate is expected among the candidates, over all samplers and ranks: the Q of logQ.

    Draws: their expected number on one rank, times the ranks. In-batch items, which count once: the probability that
    one of the batch's other positives is the item, 1 − Π_r (1 − kept_r · (1 − (1 − share)^T_r)), where T_r leaves out
    the position itself. It takes positives for independent draws from the items' shares of the training events.
    Counts of a mixture's parts add up, since every candidate stands for itself whichever part it came from (the balance
    heuristic of multiple importance sampling, Veach and Guibas 1995).

    Args:
        draws_P, item_share_P: see `negative_sampler.SharedNegatives` and `InBatchItems`.
        shares: every rank's; here: which is this one's.

    Returns:
        float32 [P], positive.
    """
    expected_P = draws_P.double() * len(shares)
    if item_share_P is not None:
        log_other_P = torch.log1p(-item_share_P.double())
        log_missing_P = torch.zeros_like(log_other_P)
        for rank, share in enumerate(shares):
            others = max(share.positions - (rank == here), 0)
            log_missing_P += torch.log1p(share.kept * torch.expm1(others * log_other_P))
        expected_P = expected_P - torch.expm1(log_missing_P)
    # A lone position's only in-batch item is its own positive, which is masked: any weight will do.
    return expected_P.clamp(min=torch.finfo(torch.float32).tiny).float()


def _all_shares(share: RankShare, sizes_differ: bool, device: torch.device) -> List[RankShare]:
    """Every rank's share. Pools are equally large everywhere; only in-batch items must ask, and wait for the device."""
    size = dist.get_world_size()
    if not sizes_differ:
        return [share] * size
    share_R4 = torch.empty(size * len(share), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(share_R4, torch.tensor(share, dtype=torch.float64, device=device))
    rows = share_R4.view(size, len(share)).tolist()
    return [RankShare(int(pool), int(in_batch), int(positions), kept) for pool, in_batch, positions, kept in rows]


def _repeated_in_batch(ids_P: Tensor, shares: List[RankShare]) -> Tensor:
    """bool [P], True for in-batch items that a rank before offers too."""
    parts = np.array([[s.pool, s.in_batch] for s in shares]).reshape(-1)
    of_batch_P = torch.from_numpy(np.repeat(np.tile([False, True], len(shares)), parts)).to(ids_P.device)
    row_N = of_batch_P.nonzero()[:, 0]
    sorted_N, order_N = torch.sort(ids_P[row_N], stable=True)
    repeated_P = torch.zeros_like(of_batch_P)
    repeated_P[row_N[order_N[1:]]] = sorted_N[1:] == sorted_N[:-1]
    return repeated_P


class HistoryMask:
    """Mask of the candidates that a token's user has already met. `mask(rows)` makes, for a slice of the tokens, bool
    [rows, P], True where the candidate is an event of the token's user in this batch. Makes [users of the slice, P]
    and [rows, P], never [T, P] or [T, P, history].

    Args:
        event_ids_E: int64 events of the batch's users, n + 1 a user.
        host_lengths: every user's n.
        candidate_ids_P: int64.
    """

    def __init__(self, event_ids_E: Tensor, host_lengths: List[int], candidate_ids_P: Tensor):
        device = event_ids_E.device
        self.distinct_C, self.column_P = torch.unique(candidate_ids_P, return_inverse=True)
        self.end_B = np.cumsum(np.asarray(host_lengths))  # positions, up to and with each user's
        self.user_T = torch.repeat_interleave(torch.as_tensor(host_lengths)).to(device, non_blocking=True)
        near_E = torch.searchsorted(self.distinct_C, event_ids_E).clamp(max=max(len(self.distinct_C) - 1, 0))
        # Events that are no candidate are written to a column behind the candidates.
        found_E = self.distinct_C[near_E] == event_ids_E if len(self.distinct_C) else near_E.bool()
        self.column_E = near_E.where(found_E, len(self.distinct_C))

    def __call__(self, rows: slice) -> Tensor:
        """Returns bool [rows, P] for a slice of the tokens."""
        stop = min(rows.stop, int(self.end_B[-1]))
        first, last = np.searchsorted(self.end_B, [rows.start, stop - 1], side="right").tolist()
        begin, end = (int(self.end_B[first - 1]) if first else 0), int(self.end_B[last])
        # A user's events are one more than its positions.
        event = torch.arange(begin + first, end + last + 1, device=self.user_T.device)
        counts = np.diff(np.concatenate([[begin], self.end_B[first : last + 1]])) + 1
        user = torch.repeat_interleave(torch.from_numpy(counts)).to(event.device, non_blocking=True)
        hit = torch.zeros(last - first + 1, len(self.distinct_C) + 1, dtype=torch.bool, device=event.device)
        hit[user, self.column_E[event]] = True
        return hit[:, self.column_P].index_select(0, self.user_T[rows] - first)
