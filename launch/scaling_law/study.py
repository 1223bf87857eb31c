"""A sweep's results as one study: its runs as points of a loss over size and tokens."""

from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional, Tuple

import numpy as np

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from launch.scaling_law.fit import PARAMETERS, Cost, Fit, fit, frontier

LOSS, NDCG = "test/cross_entropy", "test/ndcg@10"
FLOOR, ABOVE_FLOOR = "test/cross_entropy_floor", "test/cross_entropy_minus_floor"
SIZE, TOKENS, FLOPS = "non_embedding_parameters", "tokens", "flops"
NEEDED = ("run", "status", "items", SIZE, "width", TOKENS, FLOPS, LOSS)
PLACES = ("folder", "handle")  # where the runs were made: no part of a report that others read
LEAST_VALUES = 3  # distinct N, and distinct D: a term has a coefficient and an exponent beside E


class Line(NamedTuple):
    """A line: value = intercept + slope · log10(FLOPs)."""

    intercept: float
    slope: float

    def at(self, flops: np.ndarray) -> np.ndarray:
        """Computes the line's values at these FLOPs."""
        return self.intercept + self.slope * np.log10(flops)


@dataclass
class Study:
    """The points of one catalogue, and their law. Arrays are float64, a value a run."""

    items: int
    encoder: str  # empty where the sweep does not vary it
    rows: List[JsonObject]
    fit: Fit = field(init=False)

    def __post_init__(self) -> None:
        self.label = f"{self.items:,} items" + (f", {self.encoder}" if self.encoder else "")
        self.slug = "".join(c if c.isalnum() else "-" for c in self.label).strip("-")
        self.N, self.D, self.flops = self._column(SIZE), self._column(TOKENS), self._column(FLOPS)
        self.ndcg = self._column(NDCG)
        floors = self._column(FLOOR)
        self.floor: Optional[float] = None if np.isnan(floors).any() else float(floors.mean())
        # Paired: what the events of one run's held-out set happen to cost more than another's is not the model's.
        self.L = self._column(LOSS) if self.floor is None else self.floor + self._column(ABOVE_FLOOR)

    def solve(self, resamples: int) -> None:
        """Fits the law and the cost of a token. Raises UserError for points that are too few to tell them."""
        if len(self.rows) < len(PARAMETERS):
            count = f"{len(self.rows)} finished runs are fewer than the law's {len(PARAMETERS)} parameters"
            raise UserError(f"{self.label}: {count}; run more sizes and tokens")
        for name, values in ((SIZE, self.N), (TOKENS, self.D)):
            distinct = len(np.unique(np.round(np.log(values), 2)))
            if distinct < LEAST_VALUES:
                few = f"{distinct} different values of {name} do not tell its exponent"
                raise UserError(f"{self.label}: {few}; run at least {LEAST_VALUES}")
        self.fit = fit(self.N, self.D, self.L, resamples)
        self.cost = Cost.of(self.N, self.D, self.flops)

    def frontier(self, flops: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes the compute-optimal (N, D, L), N from a tenth of the smallest to a thousand times the largest that
        was run."""
        return frontier(self.fit.law, self.cost, flops, (self.N.min() / 10, self.N.max() * 1000))

    def ndcg_line(self) -> Optional[Line]:
        """Fits a line through the runs that no cheaper run beats in NDCG@10; None where there are too few."""
        order = np.argsort(self.flops)
        best = [i for at, i in enumerate(order) if at == 0 or self.ndcg[i] > self.ndcg[order[:at]].max()]
        if len(best) < 2 or not np.isfinite(self.ndcg).all():
            return None
        slope, intercept = np.polyfit(np.log10(self.flops[best]), self.ndcg[best], 1)
        return Line(float(intercept), float(slope))

    def best_within(self, flops: float) -> int:
        """Finds the run of the lowest loss among those that cost at most so much; its place in `rows`."""
        return min((int(run) for run in np.flatnonzero(self.flops <= flops)), key=lambda run: self.L[run])

    def _column(self, name: str) -> np.ndarray:
        return np.array([float("nan") if row.get(name) is None else row[name] for row in self.rows], dtype=float)
