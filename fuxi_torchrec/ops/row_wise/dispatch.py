"""Norms, gates and dropout of the blocks, each one autograd node with a closed-form backward.

On a CPU these are bound by memory. Where the kernels of `ops.native` can be had, each is one pass; here is what PyTorch
does otherwise: rows are worked off in chunks that stay in the cache, and few tensors are kept. torch.compile sees plain
formulas, which it fuses by itself. Maths in float32 at least.

Shapes: T tokens, W width.
"""

import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise import native as native_rows
from fuxi_torchrec.ops.row_wise.native import L2Normalize
from fuxi_torchrec.ops.row_wise.random_bits import kept_elements

CHUNK_ELEMENTS = 2**18
"""Elements of a chunk of rows on a CPU; elsewhere there is one chunk."""


def _in_c(*tensors: Tensor) -> bool:
    return native.is_chosen("row_wise") and native.usable(*tensors)


def wide(x: Tensor) -> Tensor:
    """Converts half precision to float32; other types stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _row_chunks(x_TW: Tensor) -> List[slice]:
    T, W = x_TW.shape
    rows = max(1, CHUNK_ELEMENTS // max(1, W)) if x_TW.device.type == "cpu" else max(1, T)
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


class DropoutMask:
    """A dropout mask: which elements of a tensor stay, each with probability 1 - p, and then times `factor` = 1 / (1
    - p).

    Its seed is drawn from torch's generator. On a CPU an element's random bits are a function of the seed and its place,
    the same as the C kernels', so that a run goes on alike by either. What is kept is a byte an element.
    """

    def __init__(self, like: Tensor, p: float) -> None:
        assert 0 < p < 1
        self.dtype = like.dtype
        self.kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
        if like.device.type != "cpu":
            self.kept.bernoulli_(1 - p)
            self.factor = 1 / (1 - p)
            return
        mask, flat_TW = native_rows.draw_mask(p), self.kept.flatten(1)
        for rows in _row_chunks(flat_TW):
            flat_TW[rows] = kept_elements(mask, rows.start, rows.stop - rows.start, flat_TW.shape[1])
        self.factor = mask.factor

    def __getitem__(self, rows: slice) -> Tensor:
        """Zeros and ones for some rows, in the type of the masked tensor."""
        return self.kept[rows].to(self.dtype)


def _mask(like: Tensor, p: float) -> Tuple[Optional[DropoutMask], float]:
    mask = DropoutMask(like, p) if p else None
    return mask, 1.0 if mask is None else mask.factor


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.mask = DropoutMask(x, p)
        return _masked(x, ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return _masked(grad, ctx.mask), None


def _masked(x: Tensor, mask: DropoutMask) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in _row_chunks(x.flatten(1)):
        torch.mul(x[rows], mask[rows].mul_(mask.factor), out=out[rows])
    return out


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeroes elements with probability p and scales the others by 1 / (1 - p), in training only; [T, ...]."""
    if not training or p == 0:
        return x
    if torch.compiler.is_compiling():
        return F.dropout(wide(x), p)
    if _in_c(x):
        return native_rows.Dropout.apply(x.flatten(1), p).view(x.shape)
    return _Dropout.apply(wide(x), p)


class _RMSNorm(torch.autograd.Function):
    """out = x * rsqrt(mean(x²) + eps) (* mask * factor)."""

    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, p: float, eps: float) -> Tensor:
        ctx.mask, ctx.factor = _mask(x_TW, p)
        inverse_T1 = _inverse_rms(x_TW, eps)
        out_TW = torch.empty_like(x_TW)
        for rows in _row_chunks(x_TW):
            out = torch.mul(x_TW[rows], inverse_T1[rows] * ctx.factor, out=out_TW[rows])
            if ctx.mask is not None:
                out.mul_(ctx.mask[rows])
        ctx.save_for_backward(x_TW, inverse_T1)
        return out_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> Tuple[Tensor, None, None]:
        x_TW, inverse_T1 = ctx.saved_tensors
        out_TW = torch.empty_like(x_TW)
        for rows in _row_chunks(x_TW):
            grad = grad_TW[rows] if ctx.mask is None else ctx.mask[rows].mul_(grad_TW[rows])
            _rms_norm_backward(out_TW[rows], grad, x_TW[rows], inverse_T1[rows], ctx.factor)
        return out_TW, None, None


def _inverse_rms(x_TW: Tensor, eps: float) -> Tensor:
    norm_T1 = torch.linalg.vector_norm(x_TW, dim=-1, keepdim=True)
    return norm_T1.square_().div_(x_TW.shape[1]).add_(eps).rsqrt_()


def _rms_norm_backward(out: Tensor, grad: Tensor, x: Tensor, inverse: Tensor, factor: float) -> None:
    """out = factor * inverse * (grad - x * inverse² * mean(grad * x))."""
    mean = (grad * x).sum(-1, keepdim=True).div_(x.shape[1])
    torch.mul(grad, inverse * factor, out=out)
    out.addcmul_(x, mean.mul_(inverse.pow(3)), value=-factor)


def rms_norm(x_TW: Tensor, dropout_p: float = 0.0, training: bool = False, eps: float = 1e-6) -> Tensor:
    """Normalises by RMSNorm without a weight over the last axis, then drops out; [T, W]."""
    p, x_TW = dropout_p if training else 0.0, wide(x_TW)
    if torch.compiler.is_compiling():
        return F.dropout(F.rms_norm(x_TW, x_TW.shape[-1:], eps=eps), p)
    if _in_c(x_TW):
        return native_rows.RMSNorm.apply(None, x_TW, p, eps)
    return _RMSNorm.apply(x_TW, p, eps)


class _GatedRMSNorm(torch.autograd.Function):
    """out = gate * x * rsqrt(mean(x²) + eps) (* mask * factor)."""

    @staticmethod
    def forward(ctx: Any, gate_TW: Tensor, x_TW: Tensor, p: float, eps: float) -> Tensor:
        ctx.mask, ctx.factor = _mask(x_TW, p)
        inverse_T1 = _inverse_rms(x_TW, eps)
        out_TW = torch.empty_like(x_TW)
        for rows in _row_chunks(x_TW):
            out = torch.mul(x_TW[rows], inverse_T1[rows] * ctx.factor, out=out_TW[rows]).mul_(gate_TW[rows])
            if ctx.mask is not None:
                out.mul_(ctx.mask[rows])
        ctx.save_for_backward(gate_TW, x_TW, inverse_T1)
        return out_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> Tuple[Tensor, Tensor, None, None]:
        gate_TW, x_TW, inverse_T1 = ctx.saved_tensors
        grad_gate_TW, grad_x_TW = torch.empty_like(x_TW), torch.empty_like(x_TW)
        for rows in _row_chunks(x_TW):
            grad = grad_TW[rows] if ctx.mask is None else ctx.mask[rows].mul_(grad_TW[rows])
            inverse = inverse_T1[rows]
            torch.mul(x_TW[rows], inverse * ctx.factor, out=grad_gate_TW[rows]).mul_(grad)
            _rms_norm_backward(grad_x_TW[rows], grad * gate_TW[rows], x_TW[rows], inverse, ctx.factor)
        return grad_gate_TW, grad_x_TW, None, None


def gated_rms_norm(
    gate_TW: Tensor, x_TW: Tensor, dropout_p: float = 0.0, training: bool = False, eps: float = 1e-6
) -> Tensor:
    """Computes dropout(gate ⊙ RMSNorm(x)), no weight; [T, W].

    Raises:
        ValueError: a gate of another shape.
    """
    if gate_TW.shape != x_TW.shape:
        raise ValueError(f"a gate of shape {tuple(gate_TW.shape)} for values of shape {tuple(x_TW.shape)}")
    p, gate_TW, x_TW = dropout_p if training else 0.0, wide(gate_TW), wide(x_TW)
    if torch.compiler.is_compiling():
        return F.dropout(gate_TW * F.rms_norm(x_TW, x_TW.shape[-1:], eps=eps), p)
    if _in_c(gate_TW, x_TW):
        return native_rows.RMSNorm.apply(gate_TW, x_TW, p, eps)
    return _GatedRMSNorm.apply(gate_TW, x_TW, p, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor) -> Tensor:
        ctx.save_for_backward(x_TW)
        gate_TF, up_TF = x_TW.chunk(2, dim=1)
        out_TF = torch.empty_like(up_TF, memory_format=torch.contiguous_format)
        for rows in _row_chunks(x_TW):
            torch.mul(F.silu(gate_TF[rows]), up_TF[rows], out=out_TF[rows])
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        (x_TW,) = ctx.saved_tensors
        grad_TW = torch.empty_like(x_TW)
        hidden = grad_TF.shape[1]
        for rows in _row_chunks(x_TW):
            gate, up = x_TW[rows].chunk(2, dim=1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            torch.mul(grad_TF[rows], silu, out=grad_TW[rows, hidden:])
            slope = sigmoid.addcmul_(silu, 1 - sigmoid)
            torch.mul(grad_TF[rows], up, out=grad_TW[rows, :hidden]).mul_(slope)
        return grad_TW


def swiglu(x_TW: Tensor) -> Tensor:
    """Computes SiLU(first half) ⊙ second half of the last axis; [T, 2 F] to [T, F].

    Raises:
        ValueError: an odd number of columns.
    """
    if x_TW.shape[1] % 2:
        raise ValueError(f"{x_TW.shape[1]} columns are not two halves")
    if torch.compiler.is_compiling():
        gate_TF, up_TF = x_TW.chunk(2, dim=1)
        return F.silu(gate_TF) * up_TF
    return (native_rows.SwiGLU if _in_c(x_TW) else _SwiGLU).apply(x_TW)


class _SiLUSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, sizes: Sequence[int]) -> Tuple[Tensor, ...]:
        ctx.save_for_backward(x_TW)
        return F.silu(x_TW).split(sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None]:
        (x_TW,) = ctx.saved_tensors
        grad_TW = torch.empty_like(x_TW)
        for rows in _row_chunks(x_TW):
            x, out, start = x_TW[rows], grad_TW[rows], 0
            sigmoid = torch.sigmoid(x)
            slope = torch.addcmul(sigmoid, x * sigmoid, 1 - sigmoid)
            for grad in grads:
                columns = slice(start, start + grad.shape[1])
                torch.mul(slope[:, columns], grad[rows], out=out[:, columns])
                start = columns.stop
        return grad_TW, None


def silu_split(x_TW: Tensor, sizes: Sequence[int]) -> Tuple[Tensor, ...]:
    """Computes SiLU(x), cut along the last axis."""
    if torch.compiler.is_compiling():
        return F.silu(x_TW).split(sizes, dim=1)
    return (native_rows.SiLUSplit if _in_c(x_TW) else _SiLUSplit).apply(x_TW, sizes)


def add_positions(x_TW: Tensor, table_NW: Tensor, position_T: Tensor, dropout_p: float, training: bool) -> Tensor:
    """dropout(√W x + table[position]): the input step of every encoder; [T, W]. position_T: int64."""
    scale, p = math.sqrt(x_TW.shape[1]), dropout_p if training else 0.0
    if _in_c(x_TW, table_NW):
        return native_rows.InputStep.apply(x_TW, table_NW, position_T, scale, p)
    return dropout(torch.add(F.embedding(position_T, table_NW), x_TW, alpha=scale), dropout_p, training)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalises by LayerNorm without weight and bias over the last axis."""
    x = wide(x)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Computes x / max(‖x‖₂, eps) over the last dimension, in float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    if torch.compiler.is_compiling():
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)
    return (L2Normalize if x.ndim == 2 and _in_c(x) else _L2Normalize).apply(x, eps)


class _L2Normalize(torch.autograd.Function):
    """One node with a closed-form backward: a third of the passes over memory that autograd's own spelling makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.clamp(min=eps)
        unit = x / scale
        ctx.save_for_backward(unit, norm, scale)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        unit, norm, scale = ctx.saved_tensors
        # Below eps the divisor is a constant, and the row's own length passes the gradient on.
        along = (grad * unit).sum(-1, keepdim=True).mul_(norm >= scale)
        return torch.addcmul(grad, unit, along, value=-1).div_(scale), None
