"""The bounds of a config's numbers: declared beside each key (schema), checked in one place (rules)."""

import math
import operator
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional, Tuple

LARGEST_INT32, LARGEST_INT64 = 2**31 - 1, 2**63 - 1
LARGEST_COUNT = 2**53
"""Floats and JSON hold whole numbers exactly up to here."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes: finite ones, within the bounds that are given."""

    at_least: Optional[float] = None
    above: Optional[float] = None
    at_most: Optional[float] = None
    below: Optional[float] = None

    def complaint(self, value: float) -> Optional[str]:
        """Tells what a value must be and is not, as in "must be at least 1"; None for a value within the bounds."""
        if not -math.inf < value < math.inf:
            return "must be a finite number"
        return next((f"must be {words} {bound}" for words, holds, bound in self._bounds() if not holds(value, bound)), None)

    def __str__(self) -> str:
        """The bounds, but for those that only keep a number within the machine's types."""
        return ", ".join(f"{words} {bound}" for words, _, bound in self._bounds() if abs(bound) < LARGEST_INT32)

    def _bounds(self) -> Iterator[Tuple[str, Callable[[float, float], bool], float]]:
        bounds = (
            ("at least", operator.ge, self.at_least),
            ("greater than", operator.gt, self.above),
            ("at most", operator.le, self.at_most),
            ("less than", operator.lt, self.below),
        )
        return ((words, holds, bound) for words, holds, bound in bounds if bound is not None)


def within(default: Any, bounds: Range) -> Any:
    """Declares a key of type int or float, or a list of them, with its default and its bounds."""
    return field(default=default, metadata={"bounds": bounds})
