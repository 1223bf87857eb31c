"""Sampled softmax, plainly: the logits of all tokens at once."""

from typing import Optional

import torch
from torch import Tensor

from fuxi_torchrec.ops.sampled_softmax.common import MASKED_LOGIT


def sampled_softmax_reference(
    outputs_TD: Tensor,
    positives_TD: Tensor,
    negatives_TKD: Tensor,
    is_masked_TK: Tensor,
    temperature: float,
    bias_TK: Optional[Tensor] = None,
) -> Tensor:
    """Computes the loss in the plain spelling, for tests: sum over tokens of −log( e^{s⁺} / (e^{s⁺} + Σ e^{s⁻ +
    bias}) ).

    Args:
        outputs_TD, positives_TD: L2-normalised outputs and embeddings of their positives.
        negatives_TKD: every token's negatives, gathered.
        is_masked_TK: bool, True where the negative is the token's positive (or history); masked to −5e4.
        temperature: τ, the divisor of every product.
        bias_TK: what is added to the negatives' logits after that; None for nothing.
    """
    positive_T1 = (outputs_TD * positives_TD).sum(-1, keepdim=True) / temperature
    negative_TK = torch.einsum("td,tkd->tk", outputs_TD, negatives_TKD) / temperature
    if bias_TK is not None:
        negative_TK = negative_TK + bias_TK
    negative_TK = negative_TK.masked_fill(is_masked_TK, MASKED_LOGIT)
    return -torch.log_softmax(torch.cat([positive_T1, negative_TK], 1), 1)[:, 0].sum()
