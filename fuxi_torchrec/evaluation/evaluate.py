"""Full-ranking evaluation of a split, and the popularity baseline beside it.

Shape suffixes: B users of a batch, D embedding, S seen pairs, V catalogue.
"""

from itertools import takewhile
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from fuxi_torchrec.config import Config, LossConfig
from fuxi_torchrec.data.batch import EVENTS, SequenceBatch, collate
from fuxi_torchrec.data.dataset import SequenceDataset, UserRows
from fuxi_torchrec.data.loader import evaluation_batches
from fuxi_torchrec.data.prefetch import prefetch, prefetch_depth
from fuxi_torchrec.data.splits import Windows
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import AGAINST_DIVERGENCE, UserError
from fuxi_torchrec.evaluation import full_ranking
from fuxi_torchrec.evaluation.metrics import metric_sums
from fuxi_torchrec.ops.ranking import NonFiniteScore, Ranking, Seen
from fuxi_torchrec.sharding.model_parallel import is_sharded

# Batches whose queries are ranked together: memory is theirs, not the split's.
BATCHES_A_RANKING = 64


class Stopped(Exception):
    """Raised on every rank where an evaluation was broken off."""


class Queries(NamedTuple):
    """A rank's queries to the catalogue: one for each user, in the data set's order."""

    query_BD: Tensor  # float32
    target_B: Tensor  # int64
    seen: Seen
    user_ids_B: Tensor
    target_log_prob_B: Tensor  # float64; empty where the data set has none


def evaluate(
    model: DistributedModelParallel,
    dataset: SequenceDataset,
    config: Config,
    split: str,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> Dict[str, float]:
    """Ranks every user's target of `split` against the whole catalogue minus the visible history.

    Returns metric means by name ("ndcg@10", "hr@10", "mrr", "cross_entropy", …), "users", and for synthetic data
    "cross_entropy_floor" and "cross_entropy_minus_floor" with its standard error, paired over the same events.
    Raises UserError where a score is not finite or the split has no user to evaluate, Stopped where `stop` becomes true
    on any rank.
    """
    sums: Dict[str, Tensor] = {}
    for queries in encoded_queries(model, dataset, config, split, world, stop):
        ranking = _ranking(model, config.loss, queries, world)
        here = metric_sums(*ranking)
        if dataset.has_log_probs:
            here.update(_floor_sums(ranking, queries.target_log_prob_B.to(ranking.rank_Q.device)))
        sums = {name: sums.get(name, 0) + value for name, value in here.items()}
    if world.sum(torch.tensor([float(stop())], device=world.device)) > 0:
        raise Stopped
    return mean_metrics(sums, world, split)


def _ranking(model: DistributedModelParallel, loss: LossConfig, queries: Queries, world: World) -> Ranking:
    asked = queries.query_BD, queries.target_B, queries.seen
    with torch.inference_mode():
        try:
            return full_ranking.rank_targets(model, world, *asked, loss.temperature, loss.l2_eps)
        except NonFiniteScore as error:
            user = _user_of(error, queries, model, world)
            what = f"evaluation: non-finite score for user {user}; the model has diverged"
            raise UserError(f"{what}; {AGAINST_DIVERGENCE}") from None


def encoded_queries(
    model: DistributedModelParallel,
    dataset: SequenceDataset,
    config: Config,
    split: str,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Queries]:
    """Encodes this rank's users of a split with dropout off, BATCHES_A_RANKING batches at a time, so that memory does
    not grow with the split; those before `stop` became true. Ranks that look a sharded table up together yield
    equally often, with no users at the end where others have some."""
    parts: List[Queries] = []
    users = 0
    was_training = model.training
    model.eval()
    try:
        depth = prefetch_depth(config.data, world.device.type)
        batches = prefetch(takewhile(lambda batch: not stop(), split_batches(dataset, config, split, world)), depth)
        for number, batch in enumerate(_in_step(batches, model, world), 1):
            if batch is not None:
                batch = batch.to(world.device)
                with torch.no_grad():  # fbgemm's fused tables know no inference mode
                    query_BD = model(batch)
                parts.append(queries_of(batch, query_BD, users))
                users += len(query_BD)
            if number % BATCHES_A_RANKING == 0:
                yield _joined(parts, config.model.embedding_dim, world.device)
                parts, users = [], 0
        yield _joined(parts, config.model.embedding_dim, world.device)
    finally:
        model.train(was_training)


def _in_step(
    batches: Iterator[SequenceBatch], model: DistributedModelParallel, world: World
) -> Iterator[Optional[SequenceBatch]]:
    """Ranks look a sharded table up together: one without a batch left takes part with an empty lookup, and yields None,
    until all are done. A replicated table asks for no such thing."""
    if world.size == 1 or not is_sharded(model):
        yield from batches
        return
    nothing = np.zeros(0, dtype=np.int64)
    empty = collate(UserRows(nothing, np.zeros(1, np.int64), nothing, nothing), Windows(nothing, nothing, nothing))
    while True:
        batch = next(batches, None)
        left = world.sum(torch.tensor([batch is not None], dtype=torch.int64, device=world.device))
        if left == 0:
            return
        if batch is not None:
            yield batch
        else:
            with torch.no_grad():
                for found in model.module.embeddings(empty.ids.to(world.device)).values():
                    found.values()  # waits for the exchange
            yield None


def _user_of(error: NonFiniteScore, queries: Queries, model: DistributedModelParallel, world: World) -> int:
    """Whose score it was, on every rank that meets the error: all do where the table is sharded."""
    least = torch.iinfo(torch.int64).min
    user = int(queries.user_ids_B[error.query]) if error.query >= 0 else least
    return int(world.max(torch.tensor([user], device=world.device))) if is_sharded(model) else user


def split_batches(dataset: SequenceDataset, config: Config, split: str, world: World) -> Iterator[SequenceBatch]:
    """Batches this rank's users of a split, in the data set's order."""
    size = config.evaluation.batch_size
    return evaluation_batches(dataset, config.data, split, size, world.rank, world.size)


def queries_of(batch: SequenceBatch, query_BD: Tensor, first_user: int) -> Queries:
    """Joins a batch's queries (float32 [B, D]) to their targets and what they have seen; `first_user` numbers the first."""
    events = batch.ids[EVENTS]
    item_ids_E, ends_B = events.values(), events.lengths().cumsum(0)
    user_T = torch.repeat_interleave(torch.as_tensor(batch.host_lengths)).to(item_ids_E.device) + first_user
    log_prob_B = batch.target_log_prob_B if batch.target_log_prob_B is not None else torch.empty(0).double()
    seen = Seen(user_T, item_ids_E[batch.input_index_T])
    return Queries(query_BD, item_ids_E[ends_B - 1], seen, batch.user_ids_B, log_prob_B)


def _joined(parts: List[Queries], width: int, device: torch.device) -> Queries:
    if not parts:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Queries(torch.empty(0, width, device=device), none, Seen(none, none), none.cpu(), torch.empty(0).double())
    return Queries(
        torch.cat([part.query_BD for part in parts]),
        torch.cat([part.target_B for part in parts]),
        Seen(torch.cat([part.seen.query_S for part in parts]), torch.cat([part.seen.item_S for part in parts])),
        torch.cat([part.user_ids_B for part in parts]),
        torch.cat([part.target_log_prob_B for part in parts]),
    )


def _floor_sums(ranking: Ranking, true_log_prob_B: Tensor) -> Dict[str, Tensor]:
    gap_B = true_log_prob_B - ranking.log_prob_Q
    return {
        "cross_entropy_floor": -true_log_prob_B.sum(),
        "cross_entropy_minus_floor": gap_B.sum(),
        "squared_gap": gap_B.square().sum(),
    }


def mean_metrics(sums: Dict[str, Tensor], world: World, split: str) -> Dict[str, float]:
    """Divides all ranks' `metric_sums` by the number of users. A collective; every rank has the same names.

    Raises UserError for a split without users.
    """
    values = world.sum(torch.stack([value.to(world.device) for value in sums.values()]))
    total = dict(zip(sums, values.tolist()))
    users = total.pop("users")
    if users == 0:
        raise UserError(f"split {split}: no user has a history and a target; is the data set or the cut-off right?")
    means = {name: value / users for name, value in total.items()}
    squared = means.pop("squared_gap", None)
    if squared is not None:
        variance = max(squared - means["cross_entropy_minus_floor"] ** 2, 0.0)
        means["cross_entropy_minus_floor_stderr"] = (variance / users) ** 0.5
    return {"users": int(users), **means}
