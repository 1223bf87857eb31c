"""Drawing item ids from frequency^alpha, in constant time a draw. No torch: draws are made while batches are collated.

Shape suffixes: V items of the catalogue, L light and H heavy ones (below and above the mean weight).
"""

from functools import cached_property
from typing import Optional, Tuple, Type, Union

import numpy as np

CHUNK = 2**20
"""Items that a table is built for at a time, where that needs memory of their number."""


class AliasTable:
    """Walker's alias method: item v is kept with probability keep[v] or exchanged for alias[v], v being uniform.

    The table is built by two prefix sums in place of the usual work lists (Walker 1977; Vose 1991; the sweep is that of
    Hübschle-Schneider and Sanders, "Parallel Weighted Random Sampling", 2019, section 4), so that ten million items
    take five seconds and not a minute of Python: heavy items in turn fill up light ones, and a heavy item that falls
    below the mean weight is filled up by the next one.

    Args:
        weight_V: non-negative weights, at least one of them positive; they need not sum to one.

    Takes 12 bytes an item (8 more beyond 2^31 items), and three times as much while it is built.
    """

    def __init__(self, weight_V: np.ndarray):
        weight_V = np.asarray(weight_V, dtype=np.float64)
        V = len(weight_V)
        id_dtype = np.int32 if V <= np.iinfo(np.int32).max else np.int64
        self.alias_V = np.arange(V, dtype=id_dtype)
        self.keep_V = weight_V * (V / weight_V.sum())  # heavy items' excess over 1 goes to light ones, below
        is_light_V = self.keep_V < 1
        light_L, heavy_H = self.alias_V[is_light_V], self.alias_V[~is_light_V]
        if len(light_L) == 0:
            np.minimum(self.keep_V, 1.0, out=self.keep_V)
            return
        need_L1, excess_H = np.zeros(len(light_L) + 1), self.keep_V[heavy_H]
        np.subtract(1, self.keep_V[light_L], out=need_L1[1:])
        np.cumsum(need_L1, out=need_L1)  # up to each light item, and after the last
        np.cumsum(np.subtract(excess_H, 1, out=excess_H), out=excess_H)
        self.keep_V[heavy_H] = 1.0
        last = len(heavy_H) - 1  # rounding can leave the last one a little short of what is asked of it
        # A light item goes to the first heavy one whose excess was not used up by the light items before it.
        for start in range(0, len(light_L), CHUNK):
            stop = min(start + CHUNK, len(light_L))
            self.alias_V[light_L[start:stop]] = heavy_H[np.searchsorted(excess_H, need_L1[start:stop]).clip(max=last)]
        # A heavy item is used up by the first light one whose need goes beyond it, and leaves the rest to the next.
        ending_H = np.searchsorted(need_L1[1:], excess_H, side="right")
        used_up_H = (ending_H < len(light_L)) & (np.arange(len(heavy_H)) < last)
        ending_H, index_H = ending_H[used_up_H], np.flatnonzero(used_up_H)
        self.keep_V[heavy_H[index_H]] = (1 + excess_H[index_H] - need_L1[1 + ending_H]).clip(0, 1)
        self.alias_V[heavy_H[index_H]] = heavy_H[index_H + 1]

    def draw(self, generator: np.random.Generator, size: Union[int, Tuple[int, ...]]) -> np.ndarray:
        """Draws items independently, with replacement, in the table's id type."""
        drawn = generator.integers(0, len(self.keep_V), size, dtype=self.alias_V.dtype)
        kept = generator.random(size) < self.keep_V[drawn]
        return np.where(kept, drawn, self.alias_V[drawn])


class ItemDistribution:
    """q(v) ∝ (frequency(v) + 1)^alpha over the catalogue; uniform for alpha = 0.

    The one that is added keeps every item possible: an item that is never drawn is never pushed away, and logQ could
    not weigh it.

    Args:
        num_items: V.
        frequency_V: training events of each item (items.parquet); may be None for alpha = 0.
        alpha: 0 uniform, 1 proportional to frequency, 0.75 word2vec's choice.
    """

    def __init__(self, num_items: int, frequency_V: Optional[np.ndarray] = None, alpha: float = 0.0):
        assert alpha == 0 or (frequency_V is not None and len(frequency_V) == num_items)
        self.num_items, self.alpha, self.frequency_V = num_items, alpha, frequency_V

    @cached_property
    def _table(self) -> AliasTable:
        return AliasTable(self._weights())

    @cached_property
    def _total(self) -> float:
        return float(self._weights().sum())

    def _frequencies(self) -> np.ndarray:
        assert self.frequency_V is not None
        return self.frequency_V

    def _weights(self) -> np.ndarray:
        weight_V = self._frequencies() + 1.0
        weight_V **= self.alpha
        return weight_V

    def draw(self, generator: np.random.Generator, size: Union[int, Tuple[int, ...]], dtype: Type[np.integer]) -> np.ndarray:
        """Draws ids independently, with replacement, as `dtype` in the shape `size`."""
        if self.alpha == 0:
            return generator.integers(0, self.num_items, size, dtype=dtype)
        return self._table.draw(generator, size).astype(dtype, copy=False)

    def probability(self, ids: np.ndarray) -> np.ndarray:
        """Computes q of some items, float64, in their shape."""
        if self.alpha == 0:
            return np.full(ids.shape, 1 / self.num_items)
        return (self._frequencies()[ids] + 1.0) ** self.alpha / self._total
