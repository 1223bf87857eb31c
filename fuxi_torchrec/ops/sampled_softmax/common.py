"""What every version of the sampled softmax shares."""

from typing import Callable

from torch import Tensor

MASKED_LOGIT = -5e4
# rows (a slice of the tokens) -> bool [rows, P], True for candidates to leave out.
CandidateMask = Callable[[slice], Tensor]
CHUNK_LOGITS = 1 << 22
"""Logits that exist at a time: tokens of a chunk times negatives."""
