"""The row-wise kernels of `ops.native` (rows.c) as autograd nodes; `dispatch.py` says what they compute and picks them.

Each makes one pass over memory forward and one backward. A dropout mask is a function of a seed, drawn from torch's
generator, and of the element's place, so it is made again in backward instead of kept. Shapes: T tokens, W width.
"""

from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuxi_torchrec.ops.native import library as native

_LEVELS = 2**32


class Mask(NamedTuple):
    """A dropout mask: elements whose 32 random bits are below threshold = p * 2**32 are dropped, the others times
    factor."""

    threshold: int
    factor: float
    seed: int


def draw_mask(p: float) -> Mask:
    """Draws the seed of a mask from torch's generator; p 0 draws nothing."""
    if p == 0:
        return Mask(0, 1.0, 0)
    threshold = min(_LEVELS - 1, round(p * _LEVELS))
    return Mask(threshold, _LEVELS / (_LEVELS - threshold), int(torch.randint(2**63 - 1, (1,), device="cpu").item()))


class Dropout(torch.autograd.Function):
    """dropout(x), [T, W] float32."""

    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, p: float) -> Tensor:
        ctx.mask = draw_mask(p)
        return _dropped(x_TW, ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> Tuple[Tensor, None]:
        return _dropped(grad_TW, ctx.mask), None


def _dropped(x_TW: Tensor, mask: Mask) -> Tensor:
    x_TW = x_TW.contiguous()
    out_TW = torch.empty_like(x_TW)
    native.call("dropout_rows", x_TW, out_TW, *x_TW.shape, *mask)
    return out_TW


class InputStep(torch.autograd.Function):
    """dropout(scale * x + table[position]), [T, W] float32."""

    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, table_NW: Tensor, position_T: Tensor, scale: float, p: float) -> Tensor:
        ctx.mask, ctx.scale, ctx.rows = draw_mask(p), scale, len(table_NW)
        ctx.save_for_backward(position_T)
        _check_positions(x_TW, table_NW, position_T)
        x_TW = x_TW.contiguous()
        out_TW = torch.empty_like(x_TW)
        arguments = (x_TW, table_NW.contiguous(), position_T.contiguous(), out_TW, *x_TW.shape, scale)
        native.call("input_rows", *arguments, *ctx.mask)
        return out_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> Tuple[Tensor, Tensor, None, None, None]:
        (position_T,) = ctx.saved_tensors
        grad_TW = _dropped(grad_TW, ctx.mask) if ctx.mask.threshold else grad_TW
        grad_table_NW = torch.ops.aten.embedding_dense_backward(grad_TW, position_T, ctx.rows, -1, False)
        return grad_TW * ctx.scale, grad_table_NW, None, None, None


class RMSNorm(torch.autograd.Function):
    """dropout(gate * x * rsqrt(mean(x²) + eps)), [T, W] float32; gate None is all ones."""

    @staticmethod
    def forward(ctx: Any, gate_TW: Optional[Tensor], x_TW: Tensor, p: float, eps: float) -> Tensor:
        ctx.mask = draw_mask(p)
        x_TW, gate_TW = x_TW.contiguous(), None if gate_TW is None else _contiguous_rows(gate_TW)
        out_TW, inverse_T = torch.empty_like(x_TW), x_TW.new_empty(len(x_TW))
        native.call(
            "rms_norm_rows", gate_TW, _distance(gate_TW), x_TW, out_TW, inverse_T, *x_TW.shape, eps, *ctx.mask
        )
        ctx.save_for_backward(gate_TW, x_TW, inverse_T)
        return out_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> Tuple[Optional[Tensor], Tensor, None, None]:
        gate_TW, x_TW, inverse_T = ctx.saved_tensors
        grad_x_TW = torch.empty_like(x_TW)
        grad_gate_TW = None if gate_TW is None else torch.empty_like(x_TW)
        inputs = (grad_TW.contiguous(), gate_TW, _distance(gate_TW), x_TW, inverse_T)
        native.call("rms_norm_rows_backward", *inputs, grad_gate_TW, grad_x_TW, *x_TW.shape, *ctx.mask)
        return grad_gate_TW, grad_x_TW, None, None


class SiLUSplit(torch.autograd.Function):
    """SiLU(x) cut along the last axis; the parts are views of one tensor."""

    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, sizes: Sequence[int]) -> Tuple[Tensor, ...]:
        x_TW = x_TW.contiguous()
        ctx.save_for_backward(x_TW)
        out_TW = torch.empty_like(x_TW)
        native.call("silu_rows", x_TW, out_TW, *x_TW.shape)
        return out_TW.split(sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None]:
        (x_TW,) = ctx.saved_tensors
        grad_x_TW, first = torch.empty_like(x_TW), 0
        for grad_TV in grads:
            grad_TV, width = _contiguous_rows(grad_TV), grad_TV.shape[1]
            place = (*x_TW.shape, first, width)
            native.call("silu_rows_backward", grad_TV, _distance(grad_TV), x_TW, grad_x_TW, *place)
            first += width
        return grad_x_TW, None


class SwiGLU(torch.autograd.Function):
    """SiLU(first half) * second half of the columns, [T, 2 F] to [T, F] float32."""

    @staticmethod
    def forward(ctx: Any, x_TW: Tensor) -> Tensor:
        x_TW = x_TW.contiguous()
        ctx.save_for_backward(x_TW)
        out_TF = x_TW.new_empty(len(x_TW), x_TW.shape[1] // 2)
        native.call("swiglu_rows", x_TW, out_TF, *out_TF.shape)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        (x_TW,) = ctx.saved_tensors
        grad_x_TW = torch.empty_like(x_TW)
        native.call("swiglu_rows_backward", grad_TF.contiguous(), x_TW, grad_x_TW, *grad_TF.shape)
        return grad_x_TW


class L2Normalize(torch.autograd.Function):
    """x / max(‖x‖₂, eps) of every row, [T, W] float32."""

    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, eps: float) -> Tensor:
        x_TW = x_TW.contiguous()
        unit_TW, norm_T = torch.empty_like(x_TW), x_TW.new_empty(len(x_TW))
        native.call("unit_rows", x_TW, unit_TW, norm_T, *x_TW.shape, eps)
        ctx.eps = eps
        ctx.save_for_backward(unit_TW, norm_T)
        return unit_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> Tuple[Tensor, None]:
        unit_TW, norm_T = ctx.saved_tensors
        grad_x_TW = torch.empty_like(unit_TW)
        native.call("unit_rows_backward", grad_TW.contiguous(), unit_TW, norm_T, grad_x_TW, *unit_TW.shape, ctx.eps)
        return grad_x_TW, None


def _check_positions(x_TW: Tensor, table_NW: Tensor, position_T: Tensor) -> None:
    if table_NW.ndim != 2 or table_NW.shape[1:] != x_TW.shape[1:] or position_T.shape != x_TW.shape[:1]:
        shapes = [tuple(x.shape) for x in (x_TW, table_NW, position_T)]
        raise ValueError(f"values, position table and positions of shapes {shapes} don't go together")
    if position_T.numel():
        smallest, largest = torch.aminmax(position_T)
        if smallest < 0 or largest >= len(table_NW):
            raise IndexError(f"positions {int(smallest)} … {int(largest)} of a table of {len(table_NW)}")


def _contiguous_rows(x_TW: Tensor) -> Tensor:
    """A view of some columns stays a view."""
    return x_TW if x_TW.stride(1) == 1 else x_TW.contiguous()


def _distance(x_TW: Optional[Tensor]) -> int:
    return 0 if x_TW is None else x_TW.stride(0)
