"""Sampled softmax in PyTorch's operators, chunk by chunk: logits are made in float32 and never kept.

Shapes as in dispatch.py."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops.sampled_softmax.common import MASKED_LOGIT, CandidateMask

# Tokens a chunk. 2,048 rows of outputs stay in a core's cache while the table's gradient gathers them in id order:
# 29 ms against 123 ms for one chunk of 14,627 tokens x 128 of 3,706 candidates, D = 50, two cores.
CHUNK_TOKENS = 2048


def _chunk_loss(positive_C: Tensor, negative_CX: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """(summed loss of a chunk, softmax weight of the positives [C], numerators of the negatives' weights [C, X], the
    factor [C, 1] that turns those into weights). Overwrites negative_CX: a pass over it costs more than all of [C]."""
    top_C = torch.maximum(positive_C, negative_CX.amax(1))
    numerator_CX = negative_CX.sub_(top_C[:, None]).exp_()
    numerator_C = torch.exp(positive_C - top_C)
    total_C = numerator_CX.sum(1) + numerator_C
    loss = (total_C.log() + top_C - positive_C).sum(dtype=torch.float64)
    return loss, numerator_C / total_C, numerator_CX, total_C.reciprocal()[:, None]


def _save_scaled(ctx: Any, gradients: Optional[Tuple[Tensor, ...]], count: int) -> None:
    ctx.count = count
    ctx.save_for_backward(*(gradients or ()))


def _scaled_gradients(ctx: Any, grad_loss: Tensor) -> Tuple[Optional[Tensor], ...]:
    """The loss is a scalar, so the gradients made in forward only have to be scaled."""
    return tuple(grad_loss * saved for saved in ctx.saved_tensors) + (None,) * (ctx.count - 3)


class _PerToken(torch.autograd.Function):
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
        largest_chunk: int,
        needs_grad: bool,
    ) -> Tensor:
        tokens, negatives = index_TK.shape
        unique = candidates_UD.shape[0]
        # Every chunk sweeps the whole candidates' gradient once, so many candidates want larger chunks.
        chunk = min(largest_chunk, max(CHUNK_TOKENS, -(-8 * unique // max(negatives, 1))))
        grads = tuple(torch.zeros_like(x) for x in (outputs_TD, positives_TD, candidates_UD)) if needs_grad else None
        loss = outputs_TD.new_zeros((), dtype=torch.float64)
        scaled_TD = outputs_TD / tau  # the temperature is divided out here, not in [C, K]
        positive_T = (scaled_TD * positives_TD).sum(-1)
        positive_index_T = positive_index_T.int()
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            index_CK, scaled_CD = index_TK[rows].int(), scaled_TD[rows]
            scores_CK = _sampled_products(scaled_CD, candidates_UD, index_CK)
            if bias_U is not None:
                scores_CK += bias_U[index_CK]
            scores_CK.masked_fill_(index_CK == positive_index_T[rows, None], MASKED_LOGIT)
            chunk_loss, weight_C, numerator_CK, factor_C1 = _chunk_loss(positive_T[rows], scores_CK)
            loss += chunk_loss
            if grads is not None:
                pull_C1 = (weight_C - 1)[:, None]
                mean_CD = _weighted_rows(candidates_UD, index_CK, numerator_CK).mul_(factor_C1)
                torch.addcmul(mean_CD, pull_C1, positives_TD[rows], out=grads[0][rows]).div_(tau)
                torch.mul(pull_C1, scaled_CD, out=grads[1][rows])
                _add_transposed(grads[2], index_CK, numerator_CK, factor_C1 * scaled_CD)
        _save_scaled(ctx, grads, count=9)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Tuple[Optional[Tensor], ...]:
        return _scaled_gradients(ctx, grad_loss)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs_TD: Tensor,
        positives_TD: Tensor,
        pool_PD: Tensor,
        pool_ids_P: Tensor,
        positive_ids_T: Tensor,
        tau: float,
        bias_P: Optional[Tensor],
        mask: Optional[CandidateMask],
        chunk: int,
        needs_grad: bool,
    ) -> Tensor:
        grads = tuple(torch.zeros_like(x) for x in (outputs_TD, positives_TD, pool_PD)) if needs_grad else None
        loss = outputs_TD.new_zeros((), dtype=torch.float64)
        scaled_TD = outputs_TD / tau
        positive_T = (scaled_TD * positives_TD).sum(-1)
        for start in range(0, outputs_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            scaled_CD = scaled_TD[rows]
            scores_CP = scaled_CD @ pool_PD.t()
            if bias_P is not None:
                scores_CP += bias_P
            scores_CP.masked_fill_(pool_ids_P[None, :] == positive_ids_T[rows, None], MASKED_LOGIT)
            if mask is not None:
                scores_CP.masked_fill_(mask(rows), MASKED_LOGIT)
            chunk_loss, weight_C, numerator_CP, factor_C1 = _chunk_loss(positive_T[rows], scores_CP)
            loss += chunk_loss
            if grads is not None:
                pull_C1 = (weight_C - 1)[:, None]
                mean_CD = (numerator_CP @ pool_PD).mul_(factor_C1)
                torch.addcmul(mean_CD, pull_C1, positives_TD[rows], out=grads[0][rows]).div_(tau)
                torch.mul(pull_C1, scaled_CD, out=grads[1][rows])
                grads[2].addmm_(numerator_CP.t(), factor_C1 * scaled_CD)
        _save_scaled(ctx, grads, count=10)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Tuple[Optional[Tensor], ...]:
        return _scaled_gradients(ctx, grad_loss)


def _whole_vectors(x: Tensor) -> Tensor:
    """x with zero columns up to a multiple of 8, on a CPU: they change no product, and at D = 50 torch's sampled products
    take twice the time that they take at 56."""
    missing = -x.shape[1] % 8
    return torch.nn.functional.pad(x, (0, missing)) if missing and x.device.type == "cpu" else x


def _csr(crow: Tensor, column_N: Tensor, value_N: Tensor, shape: Tuple[int, int]) -> Tensor:
    # int32 indices: twice as fast as int64 in sampled_addmm on CPU.
    return torch.sparse_csr_tensor(crow.int(), column_N.int(), value_N, shape, check_invariants=False)


def _sampled_products(x_CD: Tensor, table_UD: Tensor, index_CK: Tensor) -> Tensor:
    """out[c, k] = x[c] · table[index[c, k]], [C, K]: exactly the wanted entries of x tableᵀ."""
    chunk, negatives = index_CK.shape
    if table_UD.shape[0] <= negatives:  # a pattern with more entries than the matrix has is refused by torch
        return (x_CD @ table_UD.t()).gather(1, index_CK.long())
    crow = torch.arange(chunk + 1, device=x_CD.device) * negatives
    pattern = _csr(crow, index_CK.reshape(-1), x_CD.new_zeros(chunk * negatives), (chunk, table_UD.shape[0]))
    return torch.sparse.sampled_addmm(pattern, x_CD, table_UD.t(), beta=0.0).values().view(chunk, negatives)


def _weighted_rows(table_UD: Tensor, index_CK: Tensor, weights_CK: Tensor) -> Tensor:
    """out[c] = Σ_k weights[c, k] · table[index[c, k]], [C, D]."""
    return torch.nn.functional.embedding_bag(index_CK, table_UD, mode="sum", per_sample_weights=weights_CK)


def _add_transposed(grad_UD: Tensor, index_CK: Tensor, weights_CK: Tensor, x_CD: Tensor) -> None:
    """grad[u] += Σ over (c, k) with index[c, k] = u of weights[c, k] · x[c], as a sparse-dense product in id order.

    Sorting a chunk's ids (a radix sort for 16-bit keys) and gathering rows is deterministic and several times faster
    on CPU than a scatter or MKL's transposed product.
    """
    unique, negatives = grad_UD.shape[0], index_CK.shape[1]
    key_dtype = torch.int16 if unique <= torch.iinfo(torch.int16).max else torch.int32
    key_N, order_N = torch.sort(index_CK.reshape(-1).to(key_dtype), stable=True)
    bounds = torch.arange(unique + 1, dtype=key_dtype, device=key_N.device)
    crow = torch.searchsorted(key_N, bounds, out_int32=True)
    row_N = order_N.int()
    if negatives & (negatives - 1) == 0:
        row_N >>= negatives.bit_length() - 1  # a division costs four times as much
    else:
        row_N = torch.div(row_N, negatives, rounding_mode="floor")
    value_N = weights_CK.reshape(-1).index_select(0, order_N)
    grad_UD.addmm_(_csr(crow, row_N, value_N, (unique, x_CD.shape[0])), x_CD)
