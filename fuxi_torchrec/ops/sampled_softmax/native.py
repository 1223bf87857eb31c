"""The per-token sampled softmax by the C kernels of `ops.native` (softmax.c); `ops.sampled_softmax` says what it computes
and picks it. Shapes as there; W columns, D rounded up to the kernels' 16 by zero columns, which change no product."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuxi_torchrec.ops.native import library as native

_LANES = 16


class PerToken(torch.autograd.Function):
    """The per-token loss. All gradients are made in forward, chunk by chunk of tokens; the loss is a scalar, so
    backward only scales them."""

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
        chunk: int,
        needs_grad: bool,
    ) -> Tensor:
        inputs = [_whole_vectors(x) for x in (outputs_TD, positives_TD, candidates_UD)]
        grads = [torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.zeros_like(inputs[2])]
        loss_T = inputs[0].new_empty(len(index_TK))
        bias_U = None if bias_U is None else bias_U.float().contiguous()
        index_TK, positive_index_T = index_TK.int().contiguous(), positive_index_T.int().contiguous()
        for start in range(0, len(index_TK), chunk):
            rows = slice(start, start + chunk)
            tokens = (inputs[0][rows], inputs[1][rows], inputs[2], index_TK[rows], positive_index_T[rows], bias_U)
            outs = (loss_T[rows], grads[0][rows], grads[1][rows], grads[2]) if needs_grad else (loss_T[rows],)
            _chunk(*tokens, 1 / tau, masked, *outs)
        width = outputs_TD.shape[1]
        ctx.save_for_backward(*(grad[:, :width] for grad in grads) if needs_grad else ())
        return loss_T.sum(dtype=torch.float64).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Tuple[Optional[Tensor], ...]:
        return tuple(grad_loss * saved for saved in ctx.saved_tensors) + (None,) * 7


def _chunk(
    outputs_CW: Tensor,
    positives_CW: Tensor,
    candidates_UW: Tensor,
    index_CK: Tensor,
    positive_index_C: Tensor,
    bias_U: Optional[Tensor],
    inverse_tau: float,
    masked: float,
    loss_C: Tensor,
    grad_outputs_CW: Optional[Tensor] = None,
    grad_positives_CW: Optional[Tensor] = None,
    grad_candidates_UW: Optional[Tensor] = None,
) -> None:
    weights_CK = outputs_CW.new_empty(index_CK.shape)
    needs_grad = grad_candidates_UW is not None
    sizes = (*index_CK.shape, outputs_CW.shape[1])
    inputs = (outputs_CW, positives_CW, candidates_UW, index_CK, positive_index_C, bias_U, loss_C, weights_CK)
    native.call(
        "sampled_softmax_tokens", *inputs, grad_outputs_CW, grad_positives_CW, *sizes, inverse_tau, masked, needs_grad
    )
    if needs_grad:
        outputs = (outputs_CW, index_CK, weights_CK, grad_candidates_UW)
        native.call("sampled_softmax_candidates", *outputs, *sizes, len(candidates_UW), inverse_tau)


def _whole_vectors(x_RD: Tensor) -> Tensor:
    missing = -x_RD.shape[1] % _LANES
    return F.pad(x_RD, (0, missing)) if missing else x_RD.contiguous()
