"""How large everything is that is run."""

from dataclasses import dataclass
from typing import List, Tuple

from fuxi_torchrec.config import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """lengths: longest users, a batch each; the first is taken first, where time may run out. tokens: of a batch.
    checked: the same for the comparison with references, whose maps are whole. pool, negatives, items: of the losses.
    copied: bytes of the copy. product: rows of the square product. turns, seconds: a case is timed for about so many
    seconds, and so many turns (least, most). steps: of training that are looked at."""

    lengths: Tuple[int, ...]
    tokens: int
    width: int
    heads: int
    blocks: int
    checked_lengths: Tuple[int, ...]
    checked_tokens: int
    pool: int
    negatives: int
    items: int
    copied: int
    product: int
    turns: Tuple[int, int]
    seconds: float
    steps: int

    def model(self, encoder: str, token_mixing: str = "auto") -> ModelConfig:
        """Builds a model's config; no dropout, so that what is timed is the arithmetic."""
        return ModelConfig(
            encoder=encoder,
            embedding_dim=self.width,
            num_heads=self.heads,
            value_dim=self.width // self.heads,
            qk_dim=self.width // self.heads,
            num_blocks=self.blocks,
            ffn_multiply=1.0,
            input_dropout=0.0,
            dropout=0.0,
            token_mixing=token_mixing,
        )


FULL = Sizes(
    lengths=(2048, 512, 8192),
    tokens=32768,
    width=256,
    heads=4,
    blocks=4,
    checked_lengths=(512, 2048, 8192),
    checked_tokens=8192,
    pool=2048,
    negatives=128,
    items=3706,
    copied=2**30,
    product=8192,
    turns=(5, 50),
    seconds=1.0,
    steps=10,
)
"""The sizes of models that are worth a GPU."""
QUICK = Sizes(
    lengths=(20,),
    tokens=30,
    width=16,
    heads=2,
    blocks=1,
    checked_lengths=(20,),
    checked_tokens=24,
    pool=20,
    negatives=5,
    items=30,
    copied=2**20,
    product=64,
    turns=(1, 2),
    seconds=0.01,
    steps=3,
)
"""Just enough to go through every line; the times say nothing."""


def jagged_lengths(longest: int, tokens: int) -> List[int]:
    """Lists users' lengths, from half the longest to the whole of it, of `tokens` or little more together; the first one
    has the longest, and one more has a single event."""
    lengths = [longest, 1]
    while sum(lengths) < tokens:
        lengths.append(longest - len(lengths) * 37 % (longest // 2 + 1))
    return lengths
