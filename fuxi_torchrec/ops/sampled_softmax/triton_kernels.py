"""Sampled softmax as Triton kernels for CUDA, tested through Triton's interpreter; no GPU has timed these kernels yet.

Needs triton; `triton.py` is the way in. Logits live in registers: the log-sum-exp is taken online, and the weighted
mean of the candidates, which the outputs' gradient needs, goes along with it (as in FlashAttention's forward, with the
candidates as keys and values). The candidates' gradient makes the logits again from the log-sum-exp that was kept.
Nothing is added atomically.

Shapes: T tokens, D embedding, P pool, K negatives a token, U unique candidates, N = T * K entries. All values are
float32, products are made without TF32. `scale` is 1 / temperature; scores are products with scaled outputs.
"""

import triton
import triton.language as tl

from fuxi_torchrec.ops.sampled_softmax import common

MASKED_LOGIT = tl.constexpr(common.MASKED_LOGIT)


@triton.jit
def load_rows(ptr, row, d, rows, D):
    """Rows of a [rows, D] matrix, zero outside of it."""
    inside = (row < rows)[:, None] & (d < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def hide(scores_TP, t, p, T, P, pool_ids_ptr, positive_ids_ptr, mask_ptr, MASKED: tl.constexpr):
    """The scores with −5e4 where the candidate is the token's positive or masked."""
    pool_ids = tl.load(pool_ids_ptr + p, mask=p < P, other=-1)
    positive_ids = tl.load(positive_ids_ptr + t, mask=t < T, other=-2)
    hidden = positive_ids[:, None] == pool_ids[None, :]
    if MASKED:
        inside = (t < T)[:, None] & (p < P)[None, :]
        at = t.to(tl.int64)[:, None] * P + p[None, :]
        hidden = hidden | (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    return tl.where(hidden, MASKED_LOGIT, scores_TP)


@triton.jit
def shared_forward(
    outputs_ptr, positives_ptr, pool_ptr, pool_ids_ptr, positive_ids_ptr, bias_ptr, mask_ptr,
    loss_ptr, lse_ptr, grad_outputs_ptr, grad_positives_ptr, scale, T, P, D,
    BIASED: tl.constexpr, MASKED: tl.constexpr, GRADIENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp and the gradients of outputs and positives, of one tile of tokens; grid (token tiles,)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    scaled_TD = load_rows(outputs_ptr, t, d, T, D) * scale
    positive_T = tl.sum(scaled_TD * load_rows(positives_ptr, t, d, T, D), 1)
    top_T, total_T = positive_T, tl.full((BLOCK_T,), 1.0, tl.float32)
    mean_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        pool_PD = load_rows(pool_ptr, p, d, P, D)
        scores_TP = tl.dot(scaled_TD, tl.trans(pool_PD), input_precision="ieee")
        if BIASED:
            scores_TP += tl.load(bias_ptr + p, mask=p < P, other=0.0)[None, :]
        scores_TP = hide(scores_TP, t, p, T, P, pool_ids_ptr, positive_ids_ptr, mask_ptr, MASKED)
        scores_TP = tl.where((p < P)[None, :], scores_TP, -float("inf"))
        higher_T = tl.maximum(top_T, tl.max(scores_TP, 1))
        decay_T = tl.exp(top_T - higher_T)
        numerator_TP = tl.exp(scores_TP - higher_T[:, None])
        total_T = total_T * decay_T + tl.sum(numerator_TP, 1)
        if GRADIENTS:
            mean_TD = tl.dot(numerator_TP, pool_PD, mean_TD * decay_T[:, None], input_precision="ieee")
        top_T = higher_T
    lse_T = tl.log(total_T) + top_T
    tl.store(loss_ptr + t, lse_T - positive_T, mask=t < T)
    tl.store(lse_ptr + t, lse_T, mask=t < T)
    if GRADIENTS:
        pull_T1 = (tl.exp(positive_T - lse_T) - 1.0)[:, None]
        mean_TD = mean_TD * tl.exp(top_T - lse_T)[:, None]
        inside = (t < T)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        positives_TD = tl.load(positives_ptr + at, mask=inside, other=0.0)
        tl.store(grad_outputs_ptr + at, (mean_TD + pull_T1 * positives_TD) * scale, mask=inside)
        tl.store(grad_positives_ptr + at, pull_T1 * scaled_TD, mask=inside)


@triton.jit
def shared_backward_pool(
    outputs_ptr, pool_ptr, pool_ids_ptr, positive_ids_ptr, bias_ptr, mask_ptr, lse_ptr, grad_ptr, scale, T, P, D, parts,
    BIASED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad[part] of [parts, P, D]: every parts-th tile of tokens' share of the gradient of one tile of the pool; grid
    (pool tiles, parts)."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    part = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    pool_PD = load_rows(pool_ptr, p, d, P, D)
    grad_PD = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for tile in range(part, tl.cdiv(T, BLOCK_T), parts):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        scaled_TD = load_rows(outputs_ptr, t, d, T, D) * scale
        scores_TP = tl.dot(scaled_TD, tl.trans(pool_PD), input_precision="ieee")
        if BIASED:
            scores_TP += tl.load(bias_ptr + p, mask=p < P, other=0.0)[None, :]
        scores_TP = hide(scores_TP, t, p, T, P, pool_ids_ptr, positive_ids_ptr, mask_ptr, MASKED)
        lse_T = tl.load(lse_ptr + t, mask=t < T, other=float("inf"))  # tokens that are none weigh nothing
        weight_TP = tl.exp(scores_TP - lse_T[:, None])
        grad_PD = tl.dot(tl.trans(weight_TP), scaled_TD, grad_PD, input_precision="ieee")
    at = (part.to(tl.int64) * P + p)[:, None] * D + d[None, :]
    tl.store(grad_ptr + at, grad_PD, mask=(p < P)[:, None] & (d < D)[None, :])


@triton.jit
def per_token_forward(
    outputs_ptr, positives_ptr, candidates_ptr, index_ptr, positive_index_ptr, bias_ptr,
    loss_ptr, lse_ptr, grad_outputs_ptr, grad_positives_ptr, scale, K, D,
    BIASED: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp and the gradients of output and positive, of one token; grid (T,). A negative's row is read
    once and stays in registers between its product and its share of the gradient."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    scaled_D = tl.load(outputs_ptr + t * D + d, mask=d < D, other=0.0) * scale
    positives_D = tl.load(positives_ptr + t * D + d, mask=d < D, other=0.0)
    positive = tl.sum(scaled_D * positives_D)
    own = tl.load(positive_index_ptr + t)
    top, total = positive, 1.0
    mean_D = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        u = tl.load(index_ptr + t * K + k, mask=k < K, other=0)
        at = u.to(tl.int64)[:, None] * D + d[None, :]
        rows_KD = tl.load(candidates_ptr + at, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        scores_K = tl.sum(rows_KD * scaled_D[None, :], 1)
        if BIASED:
            scores_K += tl.load(bias_ptr + u, mask=k < K, other=0.0)
        scores_K = tl.where(u == own, MASKED_LOGIT, scores_K)
        scores_K = tl.where(k < K, scores_K, -float("inf"))
        higher = tl.maximum(top, tl.max(scores_K))
        decay = tl.exp(top - higher)
        numerator_K = tl.exp(scores_K - higher)
        total = total * decay + tl.sum(numerator_K)
        if GRADIENTS:
            mean_D = mean_D * decay + tl.sum(numerator_K[:, None] * rows_KD, 0)
        top = higher
    lse = tl.log(total) + top
    tl.store(loss_ptr + t, lse - positive)
    tl.store(lse_ptr + t, lse)
    if GRADIENTS:
        pull = tl.exp(positive - lse) - 1.0
        mean_D = mean_D * tl.exp(top - lse)
        tl.store(grad_outputs_ptr + t * D + d, (mean_D + pull * positives_D) * scale, mask=d < D)
        tl.store(grad_positives_ptr + t * D + d, pull * scaled_D, mask=d < D)


@triton.jit
def per_token_backward_candidates(
    outputs_ptr, candidates_ptr, positive_index_ptr, bias_ptr, lse_ptr, order_ptr, starts_ptr,
    extra_owner_ptr, extra_end_ptr, extra_count_ptr, grad_ptr, extra_grad_ptr, scale, K, D, U, PIECE,
    BIASED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The candidates' gradient from entries in the order of their candidate. Program u < U adds up the first PIECE
    entries of candidate u; program U + x does one more piece of extra_owner[x] (U for none). Grid (U + extras,)."""
    pid = tl.program_id(0).to(tl.int64)
    is_extra = pid >= U
    u = tl.load(extra_owner_ptr + pid - U, mask=is_extra, other=0)
    u = tl.where(is_extra, u, pid)
    if u >= U:
        return
    before = tl.load(extra_end_ptr + u) - tl.load(extra_count_ptr + u)
    piece = tl.where(is_extra, 1 + pid - U - before, 0)
    begin = tl.load(starts_ptr + u) + piece * PIECE
    end = tl.minimum(begin + PIECE, tl.load(starts_ptr + u + 1))
    d = tl.arange(0, BLOCK_D)
    row_D = tl.load(candidates_ptr + u * D + d, mask=d < D, other=0.0)
    grad_D = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, (end - begin).to(tl.int32), BLOCK_N):
        n = begin + first + tl.arange(0, BLOCK_N)
        t = tl.load(order_ptr + n, mask=n < end, other=0) // K
        inside = (n < end)[:, None] & (d < D)[None, :]
        scaled_ND = tl.load(outputs_ptr + t[:, None] * D + d[None, :], mask=inside, other=0.0) * scale
        scores_N = tl.sum(scaled_ND * row_D[None, :], 1)
        if BIASED:
            scores_N += tl.load(bias_ptr + u)
        own_N = tl.load(positive_index_ptr + t, mask=n < end, other=-1)
        scores_N = tl.where(own_N == u, MASKED_LOGIT, scores_N)
        lse_N = tl.load(lse_ptr + t, mask=n < end, other=float("inf"))  # entries that are none weigh nothing
        grad_D += tl.sum(tl.exp(scores_N - lse_N)[:, None] * scaled_ND, 0)
    if is_extra:
        tl.store(extra_grad_ptr + (pid - U) * D + d, grad_D, mask=d < D)
    else:
        tl.store(grad_ptr + u * D + d, grad_D, mask=d < D)


@triton.jit
def add_extra_pieces(
    extra_owner_ptr, extra_end_ptr, extra_count_ptr, extra_grad_ptr, grad_ptr, D, U, BLOCK_D: tl.constexpr
):
    """Adds a candidate's further pieces to its gradient, in order, in the program of the first of them; grid (extras,)."""
    x = tl.program_id(0).to(tl.int64)
    u = tl.load(extra_owner_ptr + x)
    if u >= U:
        return
    end = tl.load(extra_end_ptr + u)
    count = tl.load(extra_count_ptr + u)
    if x != end - count:
        return
    d = tl.arange(0, BLOCK_D)
    grad_D = tl.load(grad_ptr + u * D + d, mask=d < D, other=0.0)
    for extra in range(0, count.to(tl.int32)):
        grad_D += tl.load(extra_grad_ptr + (x + extra) * D + d, mask=d < D, other=0.0)
    tl.store(grad_ptr + u * D + d, grad_D, mask=d < D)
