"""Power laws as sums of exponentials: (1 + x)^(-b) ≈ Σ_k weight_k(b) e^(-λ_k x) for 0 <= x < LONGEST_GAP.

From x^(-b) = 1/Γ(b) ∫ e^(-x e^u) e^(b u) du (Beylkin and Monzón, "On approximation of functions by exponential sums",
2005), by the trapezoid rule in u. The rates λ_k do not depend on b, so that everything with a time in it is made once
for all blocks; the weights are smooth in b and come with their derivative.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Tuple

import torch
from torch import Tensor

LONGEST_GAP = 4e9
"""Seconds (126 years); the sum is as good as its tolerance up to here, and flattens out beyond."""
B_RANGE = (0.05, 3.0)
"""Exponents b for which the tolerance holds."""
DEFAULT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ExponentialSum:
    """A sum of exponentials, Σ_k weight_k(b) e^(-λ_k x). The first rate is 0: it stands for all that are slower than
    the grid's."""

    step: float
    first: float
    nodes: int

    @property
    def terms(self) -> int:
        """Number of terms, K."""
        return self.nodes + 1

    def rates_K(self, device: torch.device) -> Tensor:
        """Returns the rates λ_k, float64 [K], per second."""
        return torch.cat([torch.zeros(1, dtype=torch.float64, device=device), self._nodes(device).exp()])

    def weights_K(self, b: Tensor) -> Tuple[Tensor, Tensor]:
        """Computes weight_k(b) and its derivative by b, float64 [K] each; b has one element."""
        h, b = self.step, b.detach().double().reshape(())
        u = self._nodes(b.device)
        weight = h * torch.exp(b * u - torch.lgamma(b) - u.exp())
        slope = weight * (u - torch.digamma(b))
        # The grid goes on without end to the left of its first node u_0, where e^(-x e^u) is nearly 1 - x e^u. Its sum
        # over there is constant - (1 - e^(-x e^u_0)) * linear, that is, a constant and more weight for u_0.
        head = h * torch.exp(b * u[0] - torch.lgamma(b))
        head_slope = head * (u[0] - torch.digamma(b))
        all_left, all_left_slope = _geometric(b, h)
        linear, linear_slope = _geometric(b + 1, h)
        constant = head * (all_left - linear)
        constant_slope = head_slope * (all_left - linear) + head * (all_left_slope - linear_slope)
        shift = torch.exp(-u[0].exp())
        weight[0] += shift * head * linear
        slope[0] += shift * (head_slope * linear + head * linear_slope)
        return torch.cat([constant[None], weight]), torch.cat([constant_slope[None], slope])

    def _nodes(self, device: torch.device) -> Tensor:
        return self.first + self.step * torch.arange(self.nodes, dtype=torch.float64, device=device)


def _geometric(b: Tensor, h: float) -> Tuple[Tensor, Tensor]:
    """Σ_{m >= 1} e^(-b h m) and its derivative by b."""
    total = 1 / torch.expm1(b * h)
    return total, -h * total * (1 + total)


@lru_cache
def power_law_sum(tolerance: float) -> ExponentialSum:
    """Finds the shortest sum whose relative error is at most `tolerance` for every b of B_RANGE and every gap."""
    assert 1e-12 <= tolerance <= 1e-2
    # Three errors, each worst at one end of B_RANGE: of the step, at the largest b, 2 |Γ(b + 2πi/h)| / Γ(b); of what
    # lies left of the grid, below 0.1 e^(-2 left) after the linear correction; of what lies right of it.
    left = math.log(0.1 / tolerance) / 2
    right = math.log(1 / tolerance)
    right = math.log(right + (B_RANGE[1] - 1) * math.log(right))
    low, high = 0.1, 1.5
    for _ in range(50):
        step = (low + high) / 2
        low, high = (low, step) if _step_error(step) > 0.8 * tolerance else (step, high)
    first = -math.log(LONGEST_GAP) - left
    return ExponentialSum(low, first, math.ceil((right - first) / low) + 1)


def _step_error(step: float) -> float:
    """2 |Γ(3 + iy)| / Γ(3) with y = 2π/step, from |Γ(1 + iy)|² = πy / sinh(πy)."""
    y = 2 * math.pi / step
    modulus = math.sqrt(2 * math.pi * y) * math.exp(-math.pi * y / 2)  # sinh(πy) is e^(πy) / 2 for every step here
    return modulus * math.sqrt((1 + y * y) * (4 + y * y))
