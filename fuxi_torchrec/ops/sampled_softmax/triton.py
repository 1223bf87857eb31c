"""Sampled softmax on CUDA by fused Triton kernels, loss and gradients; no GPU has timed them yet (docs/triton.md).

No [T, P], [T, K] or [T, K, D] tensor of logits or rows is ever in memory. Results do not depend on the order of
threads: gradients of what tokens share are partial sums, added up in a fixed order. As in `sampled_softmax`, the
gradients are made together with the loss and only scaled in backward.

Two custom operators (`fuxi_torchrec::triton_shared_softmax`, `fuxi_torchrec::triton_per_token_softmax`) with fake
implementations carry it through torch.compile and torch.export; this module needs triton only when they run.

Shape suffixes: T tokens, D embedding, P pool, K negatives a token, U unique candidates, N = T * K entries.
"""

from functools import cache
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops.sampled_softmax.common import CHUNK_LOGITS, CandidateMask
from fuxi_torchrec.ops.triton_common import (
    IS_INSTALLED,
    Launcher,
    Tiles,
    check_can_run,
    is_interpreting,
    on_device_of,
    power_of_two,
    tuned,
)

WIDEST = {"shared": 256, "per_token": 2048}
"""Largest D of each loss: a tile holds whole rows."""
PROGRAMS = 512
"""Programs wanted of the pool's backward; it decides, with the shapes alone, the number of partial sums."""
PIECE = 512
"""Entries of one candidate that a program of the candidates' backward adds up; a popular candidate has several."""


def can_run(loss: str, outputs_TD: Tensor) -> bool:
    """Tells whether the kernels of a loss of WIDEST can run on this device and at this width."""
    return outputs_TD.is_cuda and outputs_TD.shape[1] <= WIDEST[loss] and IS_INSTALLED


def triton_shared_softmax(
    outputs_TD: Tensor,
    positives_TD: Tensor,
    pool_PD: Tensor,
    pool_ids_P: Tensor,
    positive_ids_T: Tensor,
    temperature: float,
    bias_P: Optional[Tensor] = None,
    mask: Optional[CandidateMask] = None,
) -> Tensor:
    """Computes `sampled_softmax.shared_sampled_softmax` by the kernels of this module; D at most WIDEST.

    A mask is asked for, and used, one chunk of tokens at a time; without one there is a single chunk.

    Raises:
        RuntimeError: triton is missing, or the tensors are not on a GPU (and the interpreter is off).
        ValueError: D is larger than the kernels hold.
    """
    _check_width("shared", outputs_TD)
    inputs = [x.float() for x in (outputs_TD, positives_TD, pool_PD)]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if mask is None or not len(outputs_TD):
        return _shared(*inputs, pool_ids_P, positive_ids_T, temperature, bias_P, None, needs_grad)[0]
    chunk = max(1, CHUNK_LOGITS // max(pool_PD.shape[0], 1))
    losses = []
    for start in range(0, outputs_TD.shape[0], chunk):
        rows = slice(start, start + chunk)
        chunk_inputs = inputs[0][rows], inputs[1][rows], inputs[2], pool_ids_P, positive_ids_T[rows]
        losses.append(_shared(*chunk_inputs, temperature, bias_P, mask(rows), needs_grad)[0])
    return torch.stack(losses).sum()


def triton_per_token_softmax(
    outputs_TD: Tensor,
    positives_TD: Tensor,
    candidates_UD: Tensor,
    negative_index_TK: Tensor,
    positive_index_T: Tensor,
    temperature: float,
    bias_U: Optional[Tensor] = None,
) -> Tensor:
    """Computes `sampled_softmax.per_token_sampled_softmax` by the kernels of this module; D at most WIDEST.

    Raises:
        RuntimeError: triton is missing, or the tensors are not on a GPU (and the interpreter is off).
        ValueError: D is larger than the kernels hold.
    """
    _check_width("per_token", outputs_TD)
    inputs = [x.float() for x in (outputs_TD, positives_TD, candidates_UD)]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _per_token(*inputs, negative_index_TK, positive_index_T, temperature, bias_U, needs_grad)[0]


def _check_width(loss: str, outputs_TD: Tensor) -> None:
    D = outputs_TD.shape[1]
    if D > WIDEST[loss]:
        raise ValueError(
            f"sampled softmax by triton: embeddings are {D} wide, the {loss} kernels take at most {WIDEST[loss]}; use "
            f"the chunked implementation"
        )


def tiles(kernel: str, width: int, interpreting: bool) -> List[Tiles]:
    """Lists the tile sizes that are tried for a kernel at BLOCK_D = width; few registers or none are spilled
    (docs/triton.md)."""
    if kernel.startswith("shared"):
        if interpreting:
            return [({"BLOCK_T": 16, "BLOCK_P": 16}, 1, 1)]
        if width <= 64:
            sizes = [(64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 4, 2)]
        elif width <= 128:
            sizes = [(64, 32, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2)]
        else:
            sizes = [(32, 16, 8, 2), (16, 32, 8, 2)]
        if kernel == "shared_backward_pool":  # there the pool's tile stays and the tokens' moves along
            return [({"BLOCK_P": s[0], "BLOCK_T": s[1]}, s[2], s[3]) for s in sizes]
        return [({"BLOCK_T": s[0], "BLOCK_P": s[1]}, s[2], s[3]) for s in sizes]
    if kernel == "add_extra_pieces":
        return [({}, 1, 1)]
    rows = "BLOCK_K" if kernel == "per_token_forward" else "BLOCK_N"
    if interpreting:
        return [({rows: 16}, 1, 1)]
    return [({rows: max(1, elements // width)}, warps, 2) for elements, warps in ((1024, 1), (2048, 2), (4096, 4))]


@cache
def _kernel(name: str, width: int) -> Launcher:
    from fuxi_torchrec.ops.sampled_softmax import triton_kernels as kernels

    key = ("D", "BIASED") if "per_token" in name else ("D", "MASKED") if "shared" in name else ("D",)
    return tuned(getattr(kernels, name), tiles(name, width, is_interpreting()), key)


def _no_gradients(outputs_TD: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    return outputs_TD.new_empty(0), outputs_TD.new_empty(0), outputs_TD.new_empty(0)


def _zeros_like(a: Tensor, b: Tensor, c: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(c)


@torch.library.custom_op("fuxi_torchrec::triton_shared_softmax", mutates_args=())
def _shared(
    outputs_TD: Tensor, positives_TD: Tensor, pool_PD: Tensor, pool_ids_P: Tensor, positive_ids_T: Tensor,
    temperature: float, bias_P: Optional[Tensor], mask_TP: Optional[Tensor], with_gradients: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, gradients of outputs, positives and pool, or empty tensors)."""
    check_can_run(outputs_TD, "sampled softmax by triton")
    outputs, positives, pool = (x.contiguous() for x in (outputs_TD, positives_TD, pool_PD))
    (T, D), P = outputs.shape, pool.shape[0]
    loss_T, lse_T = outputs.new_empty(T), outputs.new_empty(T)
    grads = _zeros_like(outputs, positives, pool) if with_gradients else _no_gradients(outputs)
    if T == 0:
        return outputs.new_zeros(()), *grads
    width, scale = power_of_two(D), 1 / temperature
    bias, mask = (None if x is None else x.contiguous() for x in (bias_P, mask_TP))
    mask = mask if mask is None else mask.view(torch.uint8)
    ids = pool_ids_P.contiguous(), positive_ids_T.contiguous()
    flags = {"BIASED": bias is not None, "MASKED": mask is not None, "BLOCK_D": width}
    with on_device_of(outputs):
        _kernel("shared_forward", width)[lambda tile: (-(-T // tile["BLOCK_T"]),)](
            outputs, positives, pool, *ids, bias, mask, loss_T, lse_T, grads[0], grads[1], scale, T, P, D,
            GRADIENTS=with_gradients, **flags,
        )  # fmt: skip
        if with_gradients and P:
            parts = max(1, min(-(-T // 64), PROGRAMS // -(-P // 64)))
            partial = outputs.new_empty(parts, P, D)
            _kernel("shared_backward_pool", width)[lambda tile: (-(-P // tile["BLOCK_P"]), parts)](
                outputs, pool, *ids, bias, mask, lse_T, partial, scale, T, P, D, parts, **flags
            )
            grads = (grads[0], grads[1], partial.sum(0))
    return loss_T.sum(dtype=torch.float64).float(), *grads


@torch.library.custom_op("fuxi_torchrec::triton_per_token_softmax", mutates_args=())
def _per_token(
    outputs_TD: Tensor, positives_TD: Tensor, candidates_UD: Tensor, index_TK: Tensor, positive_index_T: Tensor,
    temperature: float, bias_U: Optional[Tensor], with_gradients: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, gradients of outputs, positives and candidates, or empty tensors)."""
    check_can_run(outputs_TD, "sampled softmax by triton")
    outputs, positives, candidates = (x.contiguous() for x in (outputs_TD, positives_TD, candidates_UD))
    (T, D), K = outputs.shape, index_TK.shape[1]
    loss_T, lse_T = outputs.new_empty(T), outputs.new_empty(T)
    grads = _zeros_like(outputs, positives, candidates) if with_gradients else _no_gradients(outputs)
    if T == 0:
        return outputs.new_zeros(()), *grads
    index, own = index_TK.contiguous(), positive_index_T.contiguous()
    bias, width, scale = None if bias_U is None else bias_U.contiguous(), power_of_two(D), 1 / temperature
    with on_device_of(outputs):
        _kernel("per_token_forward", width)[(T,)](
            outputs, positives, candidates, index, own, bias, loss_T, lse_T, grads[0], grads[1], scale, K, D,
            BIASED=bias is not None, GRADIENTS=with_gradients, BLOCK_D=width,
        )  # fmt: skip
        if with_gradients:
            _candidates_gradient(grads[2], outputs, candidates, index, own, bias, lse_T, scale, width)
    return loss_T.sum(dtype=torch.float64).float(), *grads


def _candidates_gradient(
    grad_UD: Tensor,
    outputs_TD: Tensor,
    candidates_UD: Tensor,
    index_TK: Tensor,
    own_T: Tensor,
    bias_U: Optional[Tensor],
    lse_T: Tensor,
    scale: float,
    width: int,
) -> None:
    """Sorts the entries by candidate and adds up every candidate's, in pieces; no number leaves the device."""
    (U, D), N = candidates_UD.shape, index_TK.numel()
    sorted_N, order_N = torch.sort(index_TK.reshape(-1), stable=True)
    bounds = torch.arange(U + 1, device=sorted_N.device, dtype=sorted_N.dtype)
    starts_U1 = torch.searchsorted(sorted_N, bounds)
    # Pieces beyond a candidate's first; of all candidates together there are at most N // PIECE.
    extra_count_U = (starts_U1.diff() - 1).clamp(min=0) // PIECE
    extra_end_U = extra_count_U.cumsum(0)
    extras = N // PIECE
    owner_X = torch.searchsorted(extra_end_U, torch.arange(extras, device=sorted_N.device), right=True)
    extra_grad_XD = grad_UD.new_empty(extras, D)
    extra = owner_X, extra_end_U, extra_count_U
    _kernel("per_token_backward_candidates", width)[(U + extras,)](
        outputs_TD, candidates_UD, own_T, bias_U, lse_T, order_N, starts_U1, *extra, grad_UD, extra_grad_XD,
        scale, index_TK.shape[1], D, U, PIECE, BIASED=bias_U is not None, BLOCK_D=width,
    )  # fmt: skip
    if extras:
        _kernel("add_extra_pieces", width)[(extras,)](*extra, extra_grad_XD, grad_UD, D, U, BLOCK_D=width)


@_shared.register_fake
def _fake_shared(
    outputs_TD: Tensor, positives_TD: Tensor, pool_PD: Tensor, pool_ids_P: Tensor, positive_ids_T: Tensor,
    temperature: float, bias_P: Optional[Tensor], mask_TP: Optional[Tensor], with_gradients: bool,
) -> Tuple[Tensor, ...]:  # fmt: skip
    return _fake((outputs_TD, positives_TD, pool_PD), with_gradients)


@_per_token.register_fake
def _fake_per_token(
    outputs_TD: Tensor, positives_TD: Tensor, candidates_UD: Tensor, index_TK: Tensor, positive_index_T: Tensor,
    temperature: float, bias_U: Optional[Tensor], with_gradients: bool,
) -> Tuple[Tensor, ...]:  # fmt: skip
    return _fake((outputs_TD, positives_TD, candidates_UD), with_gradients)


def _fake(inputs: Sequence[Tensor], with_gradients: bool) -> Tuple[Tensor, ...]:
    grads = (x.new_empty(x.shape) for x in inputs) if with_gradients else _no_gradients(inputs[0])
    return inputs[0].new_empty(()), *grads


def _keep_gradients(ctx: Any, inputs: Sequence[object], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.count = len(inputs)
    ctx.save_for_backward(*output[1:])


def _scaled_gradients(ctx: Any, grad_loss: Optional[Tensor], *_: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The loss is a scalar, so the gradients made with it only have to be scaled."""
    if grad_loss is None:
        return (None,) * ctx.count
    return *(grad_loss * saved for saved in ctx.saved_tensors), *(None,) * (ctx.count - 3)


_shared.register_autograd(_scaled_gradients, setup_context=_keep_gradients)
_per_token.register_autograd(_scaled_gradients, setup_context=_keep_gradients)
