"""The floor under a table of models: rankings that learn nothing but counts, by the models' own protocol.

    python -m benchmarks.reproduce.baselines data/ml-1m [--split leave_two_out]

popularity: events of each item. markov: how often the item came right after the user's newest one, popularity deciding
between equals. item-knn: the sum of cosines between the item and those of the history (sets of users), of each history
item's NEIGHBOURS nearest items. All count the events that the models train on, and rank as fuxi_torchrec.evaluation does.
Prints a Markdown table. Needs scipy.

Shape suffixes: B users of a batch, V catalogue, E events.
"""

import argparse
import sys
from typing import Callable, Dict, Iterator, Tuple

import numpy as np
import torch
from scipy import sparse

from fuxi_torchrec.config import Config, DataConfig, evaluation_splits
from fuxi_torchrec.data.batch import EVENTS
from fuxi_torchrec.data.dataset import SequenceDataset, ranges
from fuxi_torchrec.data.loader import evaluation_batches
from fuxi_torchrec.data.splits import windows
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.metrics import metric_sums
from fuxi_torchrec.evaluation.popularity import popularity

NEIGHBOURS = 100
# Items whose similarities to all others exist at a time.
ROWS = 1024
BATCH = 256
SHOWN = ("ndcg@10", "ndcg@50", "hr@10", "hr@50", "mrr")

Scores = Callable[[np.ndarray, sparse.csr_array], np.ndarray]
"""(newest items [B], histories [B, V] of 0 and 1) -> scores float64 [B, V]."""


def baselines(dataset: SequenceDataset, config: Config, split: str) -> Dict[str, Dict[str, float]]:
    """{baseline: metrics of `split` by name, "users" among them}. Raises UserError for a split without users."""
    follows_VV, bought_UV = _counts(dataset, config.data)
    scores: Dict[str, Scores] = {"markov": _markov(follows_VV, bought_UV), "item-knn": _item_knn(bought_UV)}
    found = {"popularity": popularity(dataset, config, split, World(0, 1, torch.device("cpu")))}
    return {**found, **{name: _evaluate(function, dataset, config, split) for name, function in scores.items()}}


def _counts(dataset: SequenceDataset, data: DataConfig) -> Tuple[sparse.csr_array, sparse.csr_array]:
    """Over the training events: how often item j came right after item i [V, V], and events of user and item [U, V]."""
    V, befores, afters, users, items = dataset.identity.num_items, [], [], [], []
    first_user = 0
    for group in dataset.row_groups:
        rows = dataset.read(group)
        kept = windows(rows, data, "train")
        items_E = rows.item_ids_E[ranges(kept.start_U, kept.stop_U)]
        user_E = np.repeat(np.arange(len(kept.start_U)), kept.stop_U - kept.start_U) + first_user
        same_user = user_E[1:] == user_E[:-1]
        befores.append(items_E[:-1][same_user])
        afters.append(items_E[1:][same_user])
        users.append(user_E)
        items.append(items_E)
        first_user += len(kept.start_U)
    follows_VV = _counted(np.concatenate(befores), np.concatenate(afters), (V, V))
    return follows_VV, _counted(np.concatenate(users), np.concatenate(items), (first_user, V))


def _counted(row: np.ndarray, column: np.ndarray, shape: Tuple[int, int]) -> sparse.csr_array:
    return sparse.coo_array((np.ones(len(row)), (row, column)), shape).tocsr()


def _markov(follows_VV: sparse.csr_array, bought_UV: sparse.csr_array) -> Scores:
    popular_V = np.asarray(bought_UV.sum(0)).ravel()
    between_equals_V = popular_V / (popular_V.sum() + 1)  # below 1, the least difference of counts

    def scores(newest_B: np.ndarray, history_BV: sparse.csr_array) -> np.ndarray:
        return follows_VV[newest_B].toarray() + between_equals_V

    return scores


def _item_knn(bought_UV: sparse.csr_array) -> Scores:
    near_VV = _nearest((bought_UV > 0).astype(np.float64))

    def scores(newest_B: np.ndarray, history_BV: sparse.csr_array) -> np.ndarray:
        return (history_BV @ near_VV).toarray()

    return scores


def _nearest(has_UV: sparse.csr_array) -> sparse.csr_array:
    """Row i: the cosines of item i's NEIGHBOURS nearest other items (more where some are as near), 0 elsewhere."""
    norm_V = np.sqrt(np.maximum(has_UV.sum(0), 1))
    columns_VU, V, parts = has_UV.T.tocsr(), has_UV.shape[1], []
    for start in range(0, V, ROWS):
        stop = min(start + ROWS, V)
        cosine_nV = (columns_VU[start:stop] @ has_UV).toarray() / (norm_V[start:stop, None] * norm_V)
        cosine_nV[np.arange(stop - start), np.arange(start, stop)] = 0
        if V > NEIGHBOURS:
            least_n1 = np.partition(cosine_nV, V - NEIGHBOURS, axis=1)[:, V - NEIGHBOURS, None]
            cosine_nV[cosine_nV < least_n1] = 0
        parts.append(sparse.csr_array(cosine_nV))
    return sparse.vstack(parts, format="csr")


def _evaluate(scores: Scores, dataset: SequenceDataset, config: Config, split: str) -> Dict[str, float]:
    sums: Dict[str, float] = {}
    for newest_B, history_BV, target_B in _requests(dataset, config, split):
        rank_B = torch.from_numpy(_ranks(scores(newest_B, history_BV), history_BV, target_B))
        for name, value in metric_sums(rank_B, torch.zeros_like(rank_B)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    if not sums:
        raise UserError(f"split {split}: no user has a history and a target; is the data set or the cut-off right?")
    users = sums.pop("users")
    del sums["cross_entropy"]  # these scores are no log probabilities
    return {"users": int(users), **{name: total / users for name, total in sums.items()}}


def _requests(
    dataset: SequenceDataset, config: Config, split: str
) -> Iterator[Tuple[np.ndarray, sparse.csr_array, np.ndarray]]:
    """Newest items [B], histories [B, V] of 0 and 1, and targets [B] of all users of a split."""
    for batch in evaluation_batches(dataset, config.data, split, BATCH):
        items_E = batch.ids[EVENTS].values().numpy()
        last_B = batch.ids[EVENTS].lengths().cumsum(0).numpy() - 1
        user_T = np.repeat(np.arange(len(last_B)), batch.host_lengths)
        history_BV = _counted(user_T, items_E[batch.input_index_T.numpy()], (len(last_B), dataset.identity.num_items))
        history_BV.data[:] = 1
        yield items_E[last_B - 1], history_BV, items_E[last_B]


def _ranks(scores_BV: np.ndarray, history_BV: sparse.csr_array, target_B: np.ndarray) -> np.ndarray:
    """1 + items that score higher + half of those that tie, the history left out, the target never; float64 [B]."""
    users_B = np.arange(len(target_B))
    own_B = scores_BV[users_B, target_B]
    scores_BV[history_BV.nonzero()] = -np.inf
    scores_BV[users_B, target_B] = own_B
    return 1 + (scores_BV > own_B[:, None]).sum(1) + ((scores_BV == own_B[:, None]).sum(1) - 1) / 2


def main() -> int:
    """Computes the baselines from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of a prepared data set")
    parser.add_argument("--split", default="leave_one_out", choices=("leave_one_out", "leave_two_out"))
    options = parser.parse_args()
    try:
        dataset, config = SequenceDataset(options.data), Config(data=DataConfig(split=options.split))
        for split in evaluation_splits(config.data):
            print(f"\n{split} of {options.split}\n\n| baseline | " + " | ".join(SHOWN) + " |\n" + "|---" * 6 + "|")
            for name, metrics in baselines(dataset, config, split).items():
                print(f"| {name} | " + " | ".join(f"{metrics[metric]:.4f}" for metric in SHOWN) + " |")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
