"""The scaling law L(N, D) = E + A / N^α + B / D^β (Hoffmann et al., arXiv 2203.15556, section 3.3), fitted to measured losses.

N: non-embedding parameters; D: tokens; L: cross-entropy, nats. The fit minimises Huber's loss of the residuals of log L, as
there (δ = 1e-3), from many starts: for each pair of exponents on a grid, E, A and B come from non-negative least squares.
"""

from dataclasses import dataclass
from itertools import product
from typing import List, Tuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, nnls

HUBER_DELTA = 1e-3
PARAMETERS = ("E", "A", "alpha", "B", "beta")
EXPONENTS = np.geomspace(0.05, 2.0, 10)
STARTS = 6  # of the grid's, those that fit best
LARGEST_EXPONENT = 3.0


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, N: ArrayLike, D: ArrayLike) -> np.ndarray:
        """Predicts the cross-entropy (nats) of N parameters trained on D tokens; the arrays broadcast."""
        return self.E + self.A * np.power(N, -self.alpha, dtype=float) + self.B * np.power(D, -self.beta, dtype=float)


@dataclass(frozen=True)
class Fit:
    """A fitted law: the best one, and those of resampled tables, whose spread is its uncertainty."""

    law: Law
    resampled: List[Law]
    residual: float  # root mean square of log L − log L̂

    def interval(self, values: np.ndarray, level: float = 0.9) -> Tuple[float, float]:
        """Returns the central interval of a quantity of the resampled laws, `values` in their order."""
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def parameter_interval(self, name: str, level: float = 0.9) -> Tuple[float, float]:
        """Returns the central interval of a parameter, one of PARAMETERS."""
        return self.interval(np.array([getattr(law, name) for law in self.resampled]), level)

    def loss_interval(self, N: float, D: float, level: float = 0.9) -> Tuple[float, float]:
        """Returns the central interval of the predicted loss at N parameters and D tokens."""
        return self.interval(np.array([law.loss(N, D) for law in self.resampled]), level)


def fit(N: np.ndarray, D: np.ndarray, L: np.ndarray, resamples: int = 300, seed: int = 0) -> Fit:
    """Fits the law to points (float64, one dimension) and resamples its residuals.

    Each resampled table is the fitted losses times the exponentials of residuals drawn with replacement, centred and scaled
    by sqrt(n / (n − 5)) for the degrees of freedom that the fit took. Every design point stays in every table: drawing
    whole points instead would leave out the only ones that tell a parameter. Needs more than five points for intervals:
    with five the residuals are nought.
    """
    problem = _Problem(N, D)
    best = problem.solve(np.log(L), problem.starts(L))
    law = problem.law(best)
    fitted = np.log(law.loss(N, D))
    residuals = np.log(L) - fitted
    freedom = max(len(L) - len(PARAMETERS), 1)
    spread = (residuals - residuals.mean()) * np.sqrt(len(L) / freedom)
    random = np.random.default_rng(seed)
    resampled = []
    for _ in range(resamples):
        drawn = fitted + random.choice(spread, len(L))
        starts = [best, problem.starts(np.exp(drawn))[0]]
        resampled.append(problem.law(problem.solve(drawn, starts)))
    return Fit(law, resampled, float(np.sqrt(np.mean(residuals**2))))


class _Problem:
    """The fit in coordinates of one scale: (E, a, α, b, β), with a = A / N0^α and b = B / D0^β the two excess losses at
    the points' geometric mean (N0, D0)."""

    def __init__(self, N: np.ndarray, D: np.ndarray):
        self.log_N, self.log_D = np.log(N), np.log(D)
        self.log_N0, self.log_D0 = self.log_N.mean(), self.log_D.mean()
        self.n, self.d = self.log_N - self.log_N0, self.log_D - self.log_D0

    def starts(self, L: np.ndarray) -> List[np.ndarray]:
        """The STARTS best of the grid of exponents, best first."""
        found = []
        for alpha, beta in product(EXPONENTS, EXPONENTS):
            terms = np.stack([np.ones_like(L), np.exp(-alpha * self.n), np.exp(-beta * self.d)], axis=1)
            (E, a, b), norm = nnls(terms / L[:, None], np.ones_like(L))
            found.append((norm, np.array([E, a, alpha, b, beta])))
        found.sort(key=lambda pair: pair[0])
        return [start for _, start in found[:STARTS]]

    def solve(self, log_L: np.ndarray, starts: List[np.ndarray]) -> np.ndarray:
        high = np.array([np.inf, np.inf, LARGEST_EXPONENT, np.inf, LARGEST_EXPONENT])
        solutions = []
        for start in starts:
            inside = np.clip(start, 1e-9, high - 1e-9)
            solutions.append(
                least_squares(
                    lambda p: np.log(self._loss(p)) - log_L,
                    inside,
                    lambda p: self._gradient(p) / self._loss(p)[:, None],
                    bounds=(np.zeros(5), high),
                    x_scale="jac",
                    loss="huber",
                    f_scale=HUBER_DELTA,
                    max_nfev=300,
                )
            )
        return min(solutions, key=lambda solution: solution.cost).x

    def law(self, p: np.ndarray) -> Law:
        E, a, alpha, b, beta = (float(value) for value in p)
        return Law(E, a * float(np.exp(alpha * self.log_N0)), alpha, b * float(np.exp(beta * self.log_D0)), beta)

    def _loss(self, p: np.ndarray) -> np.ndarray:
        E, a, alpha, b, beta = p
        return E + a * np.exp(-alpha * self.n) + b * np.exp(-beta * self.d) + 1e-12

    def _gradient(self, p: np.ndarray) -> np.ndarray:
        _, a, alpha, b, beta = p
        by_N, by_D = np.exp(-alpha * self.n), np.exp(-beta * self.d)
        return np.stack([np.ones_like(by_N), by_N, -self.n * a * by_N, by_D, -self.d * b * by_D], axis=1)


@dataclass(frozen=True)
class Cost:
    """Cost of a token: its FLOPs as a power of N, fitted to what was counted: not N itself, as the loss and the pairs
    of positions cost in proportion to the width."""

    log_factor: float
    exponent: float

    @classmethod
    def of(cls, N: np.ndarray, D: np.ndarray, flops: np.ndarray) -> "Cost":
        """Fits the power law to runs of N parameters, D tokens and `flops` FLOPs."""
        exponent, log_factor = np.polyfit(np.log(N), np.log(flops / D), 1)
        return cls(float(log_factor), float(exponent))

    def tokens(self, flops: np.ndarray, N: np.ndarray) -> np.ndarray:
        """Computes the tokens that `flops` pay for at size N."""
        return flops / np.exp(self.log_factor + self.exponent * np.log(N))


def frontier(
    law: Law, cost: Cost, flops: np.ndarray, N_range: Tuple[float, float]
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the compute-optimal (N, D, L) for each of `flops`, N within N_range."""
    N = np.geomspace(*N_range, 2000)
    D = cost.tokens(flops[:, None], N[None, :])
    losses = law.loss(N[None, :], D)
    best = losses.argmin(axis=1)
    rows = np.arange(len(flops))
    return N[best], D[rows, best], losses[rows, best]
