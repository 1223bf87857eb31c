"""`prepare synthetic`: the stored log p is the law of the issue, to the last digits; same parameters, same data."""

import math
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.generator import Generator
from data_pipelines.movielens import prepare_movielens
from data_pipelines.movielens_like import make_titles, write_movielens_archive
from data_pipelines.synthetic import prepare_synthetic
from fuxi_torchrec.errors import UserError
from tests.helpers.pipeline_cases import items_of, tree, users_of


def law_of(folder, identity):
    """(cluster of each item, Zipf over all items, Zipf within its cluster), from what is on disk alone."""
    rows = items_of(folder)
    clusters, ranks = ([row[name] for row in rows] for name in ("cluster", "popularity_rank"))
    exponent, count = identity.generator["zipf_exponent"], identity.generator["clusters"]
    total = sum((rank + 1) ** -exponent for rank in range(len(rows)))
    zipf = [(rank + 1) ** -exponent / total for rank in ranks]
    within = [0.0] * len(rows)
    for cluster in range(count):
        own = sorted((rank, item) for item, rank in enumerate(ranks) if clusters[item] == cluster)
        total = sum((k + 1) ** -exponent for k in range(len(own)))
        for k, (_, item) in enumerate(own):
            within[item] = (k + 1) ** -exponent / total
    return clusters, zipf, within


def slow_law(items, times, now, clusters, zipf, within, generator):
    """p of every item after a history, spelled out."""
    if not items:
        return list(zipf)
    visible = list(zip(items, times))[-generator["max_sequence_length"] :]
    share = [0.0] * generator["clusters"]
    for item, time in visible:
        share[clusters[item]] += (now - time + 1) ** -generator["decay"]
    total = sum(share)
    epsilon = generator["epsilon"]
    p = [
        (1 - epsilon) * share[clusters[v]] / total * within[v] + epsilon * zipf[v] for v in range(len(zipf))
    ]  # fmt: skip
    if generator["unique_items"]:
        seen = {item for item, _ in visible}
        p = [0.0 if v in seen else p[v] for v in range(len(p))]
        left = sum(p)
        p = [value / left for value in p]
    return p


CASES = {
    "plain": dict(items=37, events_per_user=12),
    "short memory": dict(items=37, events_per_user=12, max_sequence_length=5, decay=0.6),
    "unique": dict(items=37, events_per_user=12, max_sequence_length=9, unique_items=True, zipf_exponent=0.8),
    "unique, next to nothing left": dict(
        items=21, events_per_user=40, max_sequence_length=20, unique_items=True, epsilon=0.02, lengths="fixed"
    ),  # fmt: skip
}


@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_the_law_and_the_law_sums_to_one(tmp_path, case):
    identity = prepare_synthetic(str(tmp_path / "out"), 30, **{"clusters": 7, "seed": 3, **CASES[case]})
    law = law_of(tmp_path / "out", identity)
    checked = 0
    for row in users_of(tmp_path / "out"):
        items, times = row["item_ids"], row["timestamps"]
        for k, item in enumerate(items):
            p = slow_law(items[:k], times[:k], times[k], *law, identity.generator)
            assert sum(p) == pytest.approx(1, abs=1e-12)
            assert row["log_probs"][k] == pytest.approx(math.log(p[item]), abs=1e-9)
            checked += 1
    assert checked == identity.num_events > 300


def test_what_is_drawn_follows_the_stored_law(tmp_path):
    """The mean of -log p is the law's own mean entropy: the draws are neither sharper nor flatter than they say."""
    parameters = dict(items=30, events_per_user=20, clusters=5, max_sequence_length=10, unique_items=True)
    identity = prepare_synthetic(str(tmp_path / "out"), 300, lengths="fixed", **parameters)
    law = law_of(tmp_path / "out", identity)
    surprise = []
    for row in users_of(tmp_path / "out"):
        for k in range(20):
            p = slow_law(row["item_ids"][:k], row["timestamps"][:k], row["timestamps"][k], *law, identity.generator)
            entropy = -sum(value * math.log(value) for value in p if value > 0)
            surprise.append(-row["log_probs"][k] - entropy)
    error = np.std(surprise) / math.sqrt(len(surprise))
    assert abs(np.mean(surprise)) < 4 * error < 0.1


def test_unique_items_repeats_nothing_that_is_visible(tmp_path):
    prepare_synthetic(str(tmp_path / "out"), 100, 50, 40, unique_items=True, max_sequence_length=20, clusters=4)
    for row in users_of(tmp_path / "out"):
        for k in range(len(row["item_ids"])):
            visible = row["item_ids"][max(0, k - 20) : k + 1]
            assert len(set(visible)) == len(visible)


def test_the_same_parameters_give_the_same_bytes_whatever_the_cores(tmp_path, monkeypatch):
    prepare_synthetic(str(tmp_path / "one"), 3000, 100, 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    prepare_synthetic(str(tmp_path / "two"), 3000, 100, 5)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    other = prepare_synthetic(str(tmp_path / "other"), 3000, 100, 5, seed=1)
    assert tree(tmp_path / "other") != tree(tmp_path / "one")
    assert Generator(**{k: v for k, v in other.generator.items() if k not in ("kind", "time_unit_seconds")}).seed == 1


def test_more_users_begin_with_the_same_users(tmp_path):
    prepare_synthetic(str(tmp_path / "few"), 50, 100, 8)
    prepare_synthetic(str(tmp_path / "many"), 1500, 100, 8)
    assert users_of(tmp_path / "many")[:50] == users_of(tmp_path / "few")


@pytest.mark.parametrize("lengths", ["lognormal", "uniform", "fixed"])
def test_lengths_have_the_mean_that_was_asked_for(tmp_path, lengths):
    identity = prepare_synthetic(str(tmp_path / "out"), 4000, 100, 20, lengths=lengths)
    assert identity.num_events / 4000 == pytest.approx(20, rel=0.05)
    counts = [len(row["item_ids"]) for row in users_of(tmp_path / "out")]
    assert min(counts) >= 2
    assert (len(set(counts)) == 1) == (lengths == "fixed")


def test_gaps_reach_from_seconds_to_months(tmp_path):
    prepare_synthetic(str(tmp_path / "out"), 1000, 100, 50)
    gaps = np.concatenate([np.diff(row["timestamps"]) for row in users_of(tmp_path / "out")])
    assert gaps.min() >= 1
    assert (gaps < 60).mean() > 0.05
    assert (gaps > 30 * 86400).mean() > 0.01


def test_weighing_events_by_time_beats_weighing_them_by_position(tmp_path):
    """The best fixed weights by position (fitted to these very events) stay well above the floor."""
    identity = prepare_synthetic(str(tmp_path / "out"), 400, 500, 40, lengths="fixed")
    columns = pq.read_table(tmp_path / "out" / "items.parquet")
    clusters = columns["cluster"].to_numpy()
    law = [np.array(values) for values in law_of(tmp_path / "out", identity)]
    table = pq.read_table(tmp_path / "out" / "train" / "part-00000.parquet")
    items = np.array(table["item_ids"].to_pylist())
    floor = -np.array(table["log_probs"].to_pylist())[:, 30:].mean()
    epsilon = identity.generator["epsilon"]
    best = min(
        -np.mean(
            [
                np.log((1 - epsilon) * share * law[2][items[:, k]] + epsilon * law[1][items[:, k]])
                for k in range(30, 40)
                for weights in [np.arange(k, 0, -1.0) ** -power]
                for share in [((clusters[items[:, :k]] == clusters[items[:, k : k + 1]]) @ weights) / weights.sum()]
            ]
        )
        for power in np.linspace(0.0, 4.0, 21)
    )
    assert best - floor > 0.1


BAD_PARAMETERS = [
    (dict(users=0), "--users"),
    (dict(items=0), "--items"),
    (dict(events_per_user=1), "--events-per-user"),
    (dict(clusters=101), "--clusters"),
    (dict(epsilon=1.5), "--epsilon"),
    (dict(decay=float("nan")), "--decay"),
    (dict(unique_items=True, max_sequence_length=100), "--unique-items"),
    (dict(lengths="long"), "--lengths"),
]


@pytest.mark.parametrize("parameters, words", BAD_PARAMETERS)
def test_parameters_that_do_not_fit_are_refused(tmp_path, parameters, words):
    with pytest.raises(UserError, match=words):
        prepare_synthetic(str(tmp_path / "out"), **{**dict(users=5, items=100, events_per_user=5), **parameters})
    assert tree(tmp_path) == {}


def test_an_archive_in_movielens_format_goes_through_the_real_pipeline(tmp_path):
    path = str(tmp_path / "like.zip")
    write_movielens_archive(path, users=80, items=300, events_per_user=20, seed=2)
    identity = prepare_movielens(path, str(tmp_path / "out"), catalogue="all")
    assert (identity.num_users, identity.num_items, identity.name) == (80, 300, "like")
    assert identity.report["unsorted_events"] == identity.report["duplicate_events"] == 0
    rows = items_of(tmp_path / "out")
    assert len({row["title"] for row in rows}) == 300
    assert 300 < rows[-1]["source_id"] <= 321  # ids have gaps
    for row in users_of(tmp_path / "out"):
        assert len(set(row["item_ids"])) == len(row["item_ids"]) >= 2
        assert set(row["ratings"]) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_the_archive_is_the_same_bytes_for_the_same_seed_and_never_overwritten_unasked(tmp_path):
    options = dict(users=20, items=100, events_per_user=10)
    (tmp_path / "b").mkdir()
    one = write_movielens_archive(str(tmp_path / "a.zip"), **options)
    two = write_movielens_archive(str(tmp_path / "b" / "a.zip"), **options)
    assert open(one, "rb").read() == open(two, "rb").read()
    with pytest.raises(UserError, match="--overwrite"):
        write_movielens_archive(one, **options)
    with pytest.raises(UserError, match="--items"):
        write_movielens_archive(str(tmp_path / "c.zip"), users=20, items=100, events_per_user=20)
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "b"]


def test_invented_titles_never_repeat():
    titles = make_titles(25_000, np.random.default_rng(0))
    assert len(set(titles)) == 25_000
    assert all(title.encode("latin-1") and title.endswith(")") for title in titles)
