"""The baselines' sparse matrices against the same definitions spelt out user by user."""

import math
from collections import Counter, defaultdict

import pytest

from benchmarks.reproduce import baselines as fast
from fuxi_torchrec.config import METRIC_CUTOFFS, Config, DataConfig
from fuxi_torchrec.data.dataset import SequenceDataset


def histories(dataset, longest, left_out):
    """Of every user the newest events, without the last `left_out`."""
    for group in dataset.row_groups:
        rows = dataset.read(group)
        for begin, end in zip(rows.offsets_U1[:-1], rows.offsets_U1[1:]):
            events = rows.item_ids_E[begin : end - left_out].tolist() if end - left_out > begin else []
            if len(events) >= 2:
                yield events[-longest - 1 :]


def slow(dataset, longest):
    """{baseline: {metric: value}} on each user's last event, from counts of the events before it."""
    popular, follows, having = Counter(), defaultdict(Counter), defaultdict(set)
    for user, events in enumerate(histories(dataset, longest, left_out=1)):
        popular.update(events)
        for before, after in zip(events, events[1:]):
            follows[before][after] += 1
        for item in events:
            having[item].add(user)
    catalogue = range(dataset.identity.num_items)

    def cosine(i, j):
        both = len(having[i] & having[j])
        return both / math.sqrt(max(len(having[i]), 1) * max(len(having[j]), 1)) if i != j else 0.0

    near = {}
    for i in catalogue:
        cosines = [cosine(i, j) for j in catalogue]
        least = sorted(cosines, reverse=True)[fast.NEIGHBOURS - 1] if len(catalogue) > fast.NEIGHBOURS else 0.0
        near[i] = [c if c >= least - 1e-12 else 0.0 for c in cosines]
    scores = {
        "popularity": lambda history, item: popular[item],
        "markov": lambda history, item: follows[history[-1]][item] + popular[item] / (sum(popular.values()) + 1),
        "item-knn": lambda history, item: round(sum(near[i][item] for i in set(history)), 9),
    }
    found = {}
    for name, score in scores.items():
        ranks = []
        for *history, target in histories(dataset, longest, left_out=0):
            others = [score(history, item) for item in catalogue if item not in history and item != target]
            own = score(history, target)
            ranks.append(1 + sum(other > own for other in others) + sum(other == own for other in others) / 2)
        found[name] = {"mrr": sum(1 / rank for rank in ranks) / len(ranks), "users": len(ranks)}
        for k in METRIC_CUTOFFS:
            gains = [1 / math.log2(rank + 1) for rank in ranks if rank <= k]
            found[name][f"hr@{k}"], found[name][f"ndcg@{k}"] = len(gains) / len(ranks), sum(gains) / len(ranks)
    return found


@pytest.mark.parametrize("neighbours", [5, 100])
def test_sparse_matrices_give_what_the_definitions_give(small_dataset, monkeypatch, neighbours):
    monkeypatch.setattr(fast, "NEIGHBOURS", neighbours)
    monkeypatch.setattr(fast, "ROWS", 17)
    dataset = SequenceDataset(small_dataset)
    config = Config(data=DataConfig(max_sequence_length=12))
    expected = slow(dataset, 12)
    actual = fast.baselines(dataset, config, "test")
    assert set(actual) == set(expected) == {"popularity", "markov", "item-knn"}
    for name, metrics in expected.items():
        for metric, value in metrics.items():
            assert actual[name][metric] == pytest.approx(value, abs=2e-3 if name == "item-knn" else 1e-9), (name, metric)


def test_a_folder_without_a_data_set_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["baselines", "nowhere"])
    assert fast.main() == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no data set here")
