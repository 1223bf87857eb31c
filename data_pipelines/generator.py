"""A generator of event sequences whose law is known, so that a model's cross-entropy has an exact floor.

    p(x_{i+1} | visible history, t_{i+1}) = (1 - epsilon) Σ_c π_c · Zipf_c + epsilon · Zipf

π_c is the normalised sum of (t_{i+1} - t_j + 1)^(-decay) over the visible events j of cluster c; visible are the last
max_sequence_length events before x_{i+1}. Zipf_c is a Zipf law over cluster c's items, Zipf one over all items. The
first event of a user has no history and comes from Zipf. There is no hidden state: whoever sees the visible events,
their times and t_{i+1} can compute p. With unique_items, p is renormalised on the items not in the visible history.

Shapes: B users of a block, L positions, V items, C clusters.
"""

import math
from dataclasses import asdict, dataclass
from typing import Optional, Tuple

import numpy as np

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject

# A block is the unit of random numbers: its size follows from the parameters, never from memory or threads.
BLOCK_EVENTS = 1 << 18
MAX_BLOCK_USERS = 1024
# Where less than this is left of p after the visible items are taken out, drawing again and again takes too long.
MIN_REMAINING = 0.05


@dataclass(frozen=True)
class Generator:
    """The law of synthetic events, every parameter of it; `to_dict` goes into dataset.json.

    items V; events_per_user: mean length; clusters C; epsilon: share of events that ignore the history; decay: b of the
    power law of time; zipf_exponent; max_sequence_length: visible events; unique_items: no item twice among the visible
    ones and the next; lengths: "lognormal" (with length_sigma), "uniform" (2 … 2·mean-2) or "fixed", at least 2;
    gaps between events are lognormal seconds, gap_median and gap_sigma (of the natural log), in 1 … gap_max.
    """

    items: int
    events_per_user: int
    clusters: int = 32
    epsilon: float = 0.2
    decay: float = 1.0
    zipf_exponent: float = 1.0
    max_sequence_length: int = 200
    unique_items: bool = False
    lengths: str = "lognormal"
    length_sigma: float = 0.6
    gap_median: float = 3600.0
    gap_sigma: float = 3.5
    gap_max: float = 180 * 86400.0
    start_time: int = 1_000_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            (self.items >= 1, "items", "at least 1"),
            (self.events_per_user >= 2, "events-per-user", "at least 2"),
            (1 <= self.clusters <= self.items, "clusters", "1 … items"),
            (0 <= self.epsilon <= 1, "epsilon", "0 … 1"),
            (math.isfinite(self.decay) and self.decay >= 0, "decay", "0 or more"),
            (math.isfinite(self.zipf_exponent) and self.zipf_exponent >= 0, "zipf-exponent", "0 or more"),
            (self.max_sequence_length >= 1, "max-sequence-length", "at least 1"),
            (self.lengths in ("lognormal", "uniform", "fixed"), "lengths", "lognormal, uniform or fixed"),
            (self.length_sigma >= 0, "length-sigma", "0 or more"),
            (self.gap_median >= 1 and self.gap_sigma >= 0 and self.gap_max >= 1, "gap-median", "1 second or more"),
            (self.seed >= 0, "seed", "0 or more"),
        ]
        for holds, flag, wanted in rules:
            if not holds:
                raise UserError(f"--{flag}: must be {wanted}")
        if self.unique_items and (self.items <= self.max_sequence_length or self.epsilon == 0):
            raise UserError("--unique-items: needs more items than --max-sequence-length, and --epsilon above 0")

    def to_dict(self) -> JsonObject:
        """Returns the parameters as plain values."""
        return {"kind": "clustered_power_law", "time_unit_seconds": 1.0, **asdict(self)}

    @property
    def block_users(self) -> int:
        """Users that are generated together, from one random stream."""
        return max(16, min(MAX_BLOCK_USERS, BLOCK_EVENTS // self.events_per_user))


class Catalogue:
    """The items, their clusters and their Zipf laws. Random draws depend on the seed alone.

    Popularity is a random order of the items: rank_of_item int64 [V], 0 the most popular. cluster = rank mod C, so that
    every cluster has its share of popular items; an item's rank within its cluster is rank // C.
    """

    def __init__(self, law: Generator):
        self.clusters = law.clusters
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(law.seed, spawn_key=(0,))))
        self.item_of_rank = rng.permutation(law.items)
        self.rank_of_item = np.empty(law.items, np.int64)
        self.rank_of_item[self.item_of_rank] = np.arange(law.items)
        self.weights = (np.arange(law.items) + 1.0) ** -law.zipf_exponent  # unnormalised, by rank, within clusters too
        self._cdf = np.cumsum(self.weights)
        self.total = self._cdf[-1]
        # Cluster c has the ranks c, c + C, …: V // C of them, one more for the first V mod C clusters.
        self.small = law.items // law.clusters
        self.larger = law.items % law.clusters

    def cluster_total(self, clusters: np.ndarray) -> np.ndarray:
        """Sums up a cluster's unnormalised weights."""
        sizes = self.small + (clusters < self.larger)
        return self._cdf[sizes - 1]

    def zipf(self, ranks: np.ndarray) -> np.ndarray:
        """Computes the items' probabilities by the catalogue's Zipf law, by rank."""
        return self.weights[ranks] / self.total

    def zipf_in_cluster(self, ranks: np.ndarray) -> np.ndarray:
        """Computes the items' probabilities by their clusters' own laws, by rank."""
        return self.weights[ranks // self.clusters] / self.cluster_total(ranks % self.clusters)

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Draws ranks from the Zipf law, by uniform numbers in [0, 1)."""
        return np.searchsorted(self._cdf[:-1], uniform * self.total, side="right")

    def draw_in_cluster(self, clusters: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Draws ranks from the clusters' own laws."""
        sizes = self.small + (clusters < self.larger)
        within = np.searchsorted(self._cdf, uniform * self._cdf[sizes - 1], side="right")
        return np.minimum(within, sizes - 1) * self.clusters + clusters


@dataclass
class Block:
    """Some users' events side by side: lengths int64 [B]; ranks, timestamps int64, log_probs float64, each [T]."""

    lengths: np.ndarray
    ranks: np.ndarray
    timestamps: np.ndarray
    log_probs: np.ndarray


def generate_block(law: Generator, catalogue: Catalogue, block: int, users: int) -> Block:
    """Generates the users block·block_users … of the data set, from the block's own random stream."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(law.seed, spawn_key=(1, block))))
    # Always a whole block of numbers, so that a data set with more users begins with the same users.
    lengths = draw_lengths(law, rng, law.block_users)
    order = np.argsort(-lengths, kind="stable")  # at each position the users still active are the first few rows
    sorted_lengths = lengths[order]
    times = _draw_times(law, rng, sorted_lengths)
    ranks, log_probs = _draw_events(law, catalogue, rng, sorted_lengths, times)
    back = np.argsort(order)[:users]
    used = np.arange(times.shape[1]) < lengths[:users, None]
    return Block(lengths[:users], ranks[back][used], times[back][used], log_probs[back][used])


def draw_lengths(law: Generator, rng: np.random.Generator, users: int) -> np.ndarray:
    """Draws the events of each user, int64 [B], at least 2, of mean events_per_user (up to the clipping of the tail)."""
    mean = law.events_per_user
    if law.lengths == "fixed":
        return np.full(users, mean)
    if law.lengths == "uniform":
        return rng.integers(2, 2 * mean - 2, size=users, endpoint=True)
    drawn = rng.lognormal(math.log(mean) - law.length_sigma**2 / 2, law.length_sigma, users)
    return np.clip(np.rint(drawn), 2, 20 * mean).astype(np.int64)


def _draw_times(law: Generator, rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
    """Seconds, int64 [B, L]: gaps from seconds to months within one user's sequence."""
    shape = (len(lengths), int(lengths[0]))
    gaps = np.minimum(rng.lognormal(math.log(law.gap_median), law.gap_sigma, shape), law.gap_max)
    steps = np.maximum(gaps, 1.0).astype(np.int64)
    steps[:, 0] = law.start_time + rng.integers(0, 365 * 86400, len(lengths))
    return np.cumsum(steps, axis=1)


def _draw_events(
    law: Generator, catalogue: Catalogue, rng: np.random.Generator, lengths: np.ndarray, times: np.ndarray
) -> Tuple[np.ndarray, np.ndarray]:
    """(ranks int64, log p float64), each [B, L]; rows are ordered by falling length."""
    ranks = np.zeros(times.shape, np.int64)
    log_probs = np.zeros(times.shape)
    clusters = np.zeros(times.shape, np.int32)
    seen = SeenMass(len(lengths), law, catalogue) if law.unique_items else None
    for i in range(times.shape[1]):
        n = int(np.searchsorted(-lengths, -i, side="left"))  # rows longer than i
        window = slice(max(0, i - law.max_sequence_length), i)
        if i == 0:
            ranks[:, 0] = catalogue.draw(rng.random(n))
            p = catalogue.zipf(ranks[:, 0])
        else:
            history = History(times[:n, window], clusters[:n, window], ranks[:n, window], times[:n, i], law)
            remaining = seen.remaining(history) if seen else None
            ranks[:n, i] = history.draw(catalogue, rng, remaining)
            p = history.probability(catalogue, ranks[:n, i])
            if remaining is not None:
                p = p / remaining
        log_probs[:n, i] = np.log(p)
        clusters[:n, i] = ranks[:n, i] % law.clusters
        if seen:
            seen.add(ranks[:n, i])
            if i >= law.max_sequence_length:
                seen.remove(ranks[:n, window.start])
    return ranks, log_probs


class History:
    """The visible events of n users at one position, and the law of the next event given them.

    times int64, clusters int32, ranks int64, each [n, W]; now int64 [n], the next event's times.
    """

    def __init__(
        self, times: np.ndarray, clusters: np.ndarray, ranks: np.ndarray, now: np.ndarray, law: Generator
    ) -> None:
        self.law, self.clusters, self.ranks = law, clusters, ranks
        self.weights = ((now[:, None] - times) + 1.0) ** -law.decay
        self.cumulative = np.cumsum(self.weights, axis=1)
        self.total = self.cumulative[:, -1]

    def draw(
        self, catalogue: Catalogue, rng: np.random.Generator, remaining: Optional[np.ndarray]
    ) -> np.ndarray:
        """Draws ranks [n]. remaining (float64 [n], or None): what is left of p after the visible items are taken out."""
        rows = np.arange(len(self.total))
        if remaining is None:
            return self._draw_once(catalogue, rng, rows)
        result = np.empty(len(rows), np.int64)
        for row in rows[remaining < MIN_REMAINING]:
            p = self.unseen_law(catalogue, row)
            result[row] = min(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"), len(p) - 1)
        rows = rows[remaining >= MIN_REMAINING]
        while len(rows):  # rejection samples the renormalised law exactly
            drawn = self._draw_once(catalogue, rng, rows)
            rejected = (self.ranks[rows] == drawn[:, None]).any(axis=1)
            result[rows[~rejected]] = drawn[~rejected]
            rows = rows[rejected]
        return result

    def _draw_once(self, catalogue: Catalogue, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        fresh, which, where = rng.random((3, len(rows)))
        target = which * self.total[rows]
        cumulative = self.cumulative if len(rows) == len(self.cumulative) else self.cumulative[rows]
        event = (cumulative <= target[:, None]).sum(axis=1)  # a visible event, drawn by its weight …
        event = np.minimum(event, self.clusters.shape[1] - 1)
        drawn = catalogue.draw_in_cluster(self.clusters[rows, event], where)  # … lends its cluster
        alone = fresh < self.law.epsilon
        drawn[alone] = catalogue.draw(where[alone])
        return drawn

    def probability(self, catalogue: Catalogue, ranks: np.ndarray) -> np.ndarray:
        """Computes p of one item per user, [n], before any renormalisation."""
        own = self.clusters == (ranks % self.law.clusters)[:, None]
        share = np.einsum("nw,nw->n", self.weights, own) / self.total
        epsilon = self.law.epsilon
        return (1 - epsilon) * share * catalogue.zipf_in_cluster(ranks) + epsilon * catalogue.zipf(ranks)

    def unseen_law(self, catalogue: Catalogue, row: int) -> np.ndarray:
        """Computes one user's unnormalised law over all items, by rank [V], 0 for visible items. Slow: for the rare
        case."""
        share = np.bincount(self.clusters[row], self.weights[row], minlength=self.law.clusters) / self.total[row]
        ranks = np.arange(self.law.items)
        epsilon = self.law.epsilon
        p = (1 - epsilon) * share[ranks % self.law.clusters] * catalogue.zipf_in_cluster(ranks)
        p += epsilon * catalogue.zipf(ranks)
        p[self.ranks[row]] = 0.0
        return p


class SeenMass:
    """Mass that the visible items hold of each law, kept up to date event by event; for unique_items.

    by_cluster float64 [B, C]: sum of Zipf_c over the visible items of cluster c; overall [B]: of Zipf.
    """

    def __init__(self, users: int, law: Generator, catalogue: Catalogue):
        self.law, self.catalogue = law, catalogue
        self.by_cluster = np.zeros((users, law.clusters))
        self.overall = np.zeros(users)

    def add(self, ranks: np.ndarray, sign: float = 1.0) -> None:
        """Adds the newest visible items, ranks [n]."""
        rows = np.arange(len(ranks))
        self.by_cluster[rows, ranks % self.law.clusters] += sign * self.catalogue.zipf_in_cluster(ranks)
        self.overall[rows] += sign * self.catalogue.zipf(ranks)

    def remove(self, ranks: np.ndarray) -> None:
        """Takes out the items that are visible no longer, ranks [n]."""
        self.add(ranks, -1.0)

    def remaining(self, history: History) -> np.ndarray:
        """Computes 1 - p(visible items), [n]; summed afresh where so little is left that the difference would lose
        digits."""
        n = len(history.total)
        seen = np.take_along_axis(self.by_cluster[:n], history.clusters, axis=1)
        seen_by_history = np.einsum("nw,nw->n", history.weights, seen) / history.total
        epsilon = self.law.epsilon
        left = 1.0 - (1 - epsilon) * seen_by_history - epsilon * self.overall[:n]
        for row in np.flatnonzero(left < MIN_REMAINING).tolist():
            left[row] = max(history.unseen_law(self.catalogue, row).sum(), 0.0)
        return left
