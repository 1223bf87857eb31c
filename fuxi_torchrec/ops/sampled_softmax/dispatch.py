"""Sampled softmax losses (docs/models.md, "Output and loss") without a [tokens, negatives, D] tensor.

Shape suffixes: T tokens (supervised positions of a jagged batch), D embedding, K negatives a token, U unique candidate
ids, P pool of shared negatives, C tokens of a chunk, N entries of a chunk's [C, K] block laid flat.

Both losses are sums over tokens, computed forward and backward in one pass over chunks of tokens: the logits of a chunk
are made in float32, turned into the three gradients, and dropped. What is kept for backward is as large as the inputs.
"""

from types import ModuleType
from typing import Literal, Optional, get_args

import torch
from torch import Tensor

from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.sampled_softmax.chunked import _PerToken, _Shared, _whole_vectors
from fuxi_torchrec.ops.sampled_softmax.common import CHUNK_LOGITS, MASKED_LOGIT, CandidateMask
from fuxi_torchrec.ops.sampled_softmax.native import PerToken

Implementation = Literal["auto", "chunked", "native", "triton"]
"""How a loss is computed: chunk by chunk in torch, by the C kernels of `native.py` (per_token on a CPU), or by the CUDA
kernels of `triton.py`. "auto" takes the last for CUDA tensors, which no GPU has timed yet, and C wherever it can."""








def per_token_sampled_softmax(
    outputs_TD: Tensor,
    positives_TD: Tensor,
    candidates_UD: Tensor,
    negative_index_TK: Tensor,
    positive_index_T: Tensor,
    temperature: float,
    bias_U: Optional[Tensor] = None,
    chunk_logits: int = CHUNK_LOGITS,
    implementation: Implementation = "auto",
) -> Tensor:
    """Computes the sampled softmax with K negatives drawn for every token, looked up once per unique id.

    Args:
        outputs_TD: L2-normalised outputs.
        positives_TD: L2-normalised embeddings of the tokens' positives.
        candidates_UD: L2-normalised embeddings of the batch's unique negative ids.
        negative_index_TK: int64 or int32 rows of candidates_UD, duplicates allowed.
        positive_index_T: the row of candidates_UD that holds the token's own positive, −1 where none does; negatives
            that equal it are masked.
        temperature: τ.
        bias_U: float32 constants added to the candidates' logits (logQ); None for nothing.
        chunk_logits: most logits that exist at a time (at least one token's).
        implementation: see Implementation.

    Returns:
        The summed loss, float32 scalar, differentiable in outputs, positives and candidates.

    Raises:
        ValueError: shapes that don't go together.
        IndexError: a negative that is no row of candidates_UD, or a positive that is neither that nor −1 (looked for on
            a CPU alone, where looking is cheap).
    """
    _check_shapes(outputs_TD, positives_TD, candidates_UD, negative_index_TK, positive_index_T, bias_U)
    kernels = _triton_kernels("per_token", implementation, outputs_TD)
    if kernels is not None:
        _check_indices(negative_index_TK, positive_index_T, len(candidates_UD))
        return kernels.triton_per_token_softmax(
            outputs_TD, positives_TD, candidates_UD, negative_index_TK, positive_index_T, temperature, bias_U
        )
    inputs = tuple(x.float() for x in (outputs_TD, positives_TD, candidates_UD))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    chunk = max(1, chunk_logits // max(1, negative_index_TK.shape[1]))
    chosen = implementation == "native" or (implementation == "auto" and native.is_chosen("sampled_softmax"))
    if chosen and native.usable(*inputs):
        index = (negative_index_TK, positive_index_T)
        if negative_index_TK.dtype != torch.int32:
            _check_indices(*index, len(candidates_UD))
        try:  # the kernel looks at each index as it reads it
            return PerToken.apply(*inputs, *index, temperature, bias_U, MASKED_LOGIT, chunk, needs_grad)
        except IndexError:
            _check_indices(*index, len(candidates_UD))
            raise
    _check_indices(negative_index_TK, positive_index_T, len(candidates_UD))
    inputs = tuple(map(_whole_vectors, inputs))
    return _PerToken.apply(*inputs, negative_index_TK, positive_index_T, temperature, bias_U, chunk, needs_grad)


def shared_sampled_softmax(
    outputs_TD: Tensor,
    positives_TD: Tensor,
    pool_PD: Tensor,
    pool_ids_P: Tensor,
    positive_ids_T: Tensor,
    temperature: float,
    bias_P: Optional[Tensor] = None,
    mask: Optional[CandidateMask] = None,
    chunk_logits: int = CHUNK_LOGITS,
    implementation: Implementation = "auto",
) -> Tensor:
    """Computes the sampled softmax with one pool of negatives for all tokens: the logits of a chunk are one matrix
    product.

    Args:
        outputs_TD, positives_TD, pool_PD: L2-normalised outputs, positives' embeddings, and the pool's.
        pool_ids_P, positive_ids_T: item ids; a pool item that is the token's positive is masked.
        temperature: τ.
        bias_P: float32 constants added to the pool's logits (logQ; MASKED_LOGIT takes an entry out for all tokens).
        mask: further candidates to leave out, asked for one chunk of tokens at a time.
        chunk_logits: most logits that exist at a time (at least one token's).
        implementation: see Implementation; there is no C kernel for a shared pool, which is a matrix product.

    Returns:
        The summed loss, float32 scalar, differentiable in outputs, positives and pool.
    """
    kernels = _triton_kernels("shared", implementation, outputs_TD)
    if kernels is not None:
        return kernels.triton_shared_softmax(
            outputs_TD, positives_TD, pool_PD, pool_ids_P, positive_ids_T, temperature, bias_P, mask
        )
    inputs = (outputs_TD.float(), positives_TD.float(), pool_PD.float())
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    chunk = max(1, chunk_logits // max(1, len(pool_ids_P)))
    return _Shared.apply(*inputs, pool_ids_P, positive_ids_T, temperature, bias_P, mask, chunk, needs_grad)


def _check_shapes(
    outputs_TD: Tensor,
    positives_TD: Tensor,
    candidates_UD: Tensor,
    index_TK: Tensor,
    positive_index_T: Tensor,
    bias_U: Optional[Tensor],
) -> None:
    T, D = outputs_TD.shape
    fits = positives_TD.shape == (T, D) and candidates_UD.shape[1:] == (D,)
    fits = fits and index_TK.ndim == 2 and len(index_TK) == T and positive_index_T.shape == (T,)
    if not fits or (bias_U is not None and bias_U.shape != candidates_UD.shape[:1]):
        tensors = (outputs_TD, positives_TD, candidates_UD, index_TK, positive_index_T, bias_U)
        shapes = [None if x is None else tuple(x.shape) for x in tensors]
        raise ValueError(f"outputs, positives, candidates, negatives, positives' rows and bias of shapes {shapes}")


def _check_indices(negative_index_TK: Tensor, positive_index_T: Tensor, candidates: int) -> None:
    _check_rows("negatives", negative_index_TK, 0, candidates)
    _check_rows("positives", positive_index_T, -1, candidates)


def _check_rows(what: str, index: Tensor, least: int, rows: int) -> None:
    """Before the index becomes int32, which would take 2**32 + 5 for 5."""
    if rows > torch.iinfo(torch.int32).max:
        raise ValueError(f"{rows} candidates: rows are counted in int32")
    if torch.compiler.is_compiling() or type(index) is not Tensor or index.device.type != "cpu" or not index.numel():
        return
    smallest, largest = (int(x) for x in torch.aminmax(index))
    if smallest < least or largest >= rows:
        raise IndexError(f"{what} {smallest} … {largest} of {rows} candidates")


def _triton_kernels(loss: str, implementation: Implementation, outputs_TD: Tensor) -> Optional[ModuleType]:
    """The module with the CUDA kernels, where it is asked for or the choice for these tensors; else None."""
    assert implementation in get_args(Implementation), implementation
    if implementation in ("chunked", "native") or (implementation == "auto" and not outputs_TD.is_cuda):
        return None
    from fuxi_torchrec.ops.sampled_softmax import triton as triton_softmax

    return triton_softmax if implementation == "triton" or triton_softmax.can_run(loss, outputs_TD) else None
