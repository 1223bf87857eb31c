"""The per-token sampled softmax by the C kernel of `ops.native` (softmax.c); `ops.sampled_softmax` says what it computes and
picks it. Shapes as there."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuxi_torchrec.ops.native import library as native

CHUNK_TOKENS = 1024
"""Tokens of a chunk: their outputs stay in a core's cache while the candidates' gradient gathers them."""
PAIRS_OF_A_CANDIDATE = 8
"""A chunk has so many pairs for each candidate, on average: every chunk passes over the candidates' gradient once."""


class PerToken(torch.autograd.Function):
    """The per-token loss. All gradients are made in forward; the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs_TD: Tensor,
        positives_TD: Tensor,
        candidates_UD: Tensor,
        index_TK: Tensor,
        positive_index_T: Tensor,
        tau: float,
        bias_U: Optional[Tensor],
        masked: float,
        largest_chunk: int,
        needs_grad: bool,
    ) -> Tensor:
        (T, D), U, K = outputs_TD.shape, len(candidates_UD), index_TK.shape[1]
        # Zero columns change no product.
        candidates_UP = F.pad(candidates_UD, (0, -D % native.lanes())).contiguous()
        inputs = (outputs_TD.contiguous(), positives_TD.contiguous(), candidates_UP)
        indices = (index_TK.int().contiguous(), positive_index_T.long().contiguous())
        bias_U = None if bias_U is None else bias_U.float().contiguous()
        loss_T = outputs_TD.new_empty(T)
        grads = [torch.empty_like(x) for x in inputs[:2]] + [torch.zeros_like(candidates_UP)] if needs_grad else []
        chunk = min(largest_chunk, max(CHUNK_TOKENS, -(-PAIRS_OF_A_CANDIDATE * U // max(K, 1))))
        outs = (loss_T, *(grads or (None, None, None)))
        native.call("sampled_softmax", *inputs, *indices, bias_U, *outs, T, K, U, D, chunk, 1 / tau, masked)
        ctx.save_for_backward(*grads[:2], *(grad[:, :D] for grad in grads[2:]))
        return loss_T.sum(dtype=torch.float64).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Tuple[Optional[Tensor], ...]:
        return tuple(grad_loss * saved for saved in ctx.saved_tensors) + (None,) * 7
