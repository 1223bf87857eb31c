"""Token mixing on CUDA by fused Triton kernels, forward and backward; no GPU has timed them yet (docs/triton.md).

No map is ever in memory: its entries are made in registers. Results do not depend on the order of threads: parameters'
gradients are partial sums of programs, added up by torch.

Two custom operators (`fuxi_torchrec::triton_mixing` and its backward) with fake implementations carry it through
torch.compile and torch.export; neither they nor this module need triton until they run.

Shapes: T tokens, B users, H heads, d value size per head, E = H * d, C channels, P parameters of all channels, flat.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS, TRITON
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from fuxi_torchrec.ops.token_mixing.time_maps import Channel
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 1024
"""Programs wanted of the maps' backward: a few for each of a large GPU's multiprocessors. It decides, with the batch's
shape alone, into how many partial sums a gradient is cut, so results are the same on every device."""


def can_mix(values_THd: Tensor, channels: Sequence[Channel]) -> bool:
    """Tells whether the kernels know these channels and this type, and can run on this device."""
    known = all(TRITON in CHANNELS[name].versions for name, _ in channels)
    return values_THd.is_cuda and known and values_THd.dtype in DTYPES and IS_INSTALLED


def triton_mix_tokens(
    values_THd: Tensor,
    layout: JaggedLayout,
    channels: Sequence[Channel],
    gaps: Optional[TimeGaps] = None,
) -> Tensor:
    """Mixes tokens as `token_mixing.mix_tokens` does, by the kernels of this module.

    Args:
        values_THd: float32, bfloat16 or float16; maps and sums are float32 whatever the type, products of float32 are
            made without TF32.
        channels: of those that the registry gives to TRITON, with their parameters.

    Raises:
        RuntimeError: triton is missing, or the tensors are not on a GPU (and the interpreter is off).
        ValueError: a channel or type that the kernels do not know.
    """
    if values_THd.dtype not in DTYPES:
        raise ValueError(f"token mixing by triton: {values_THd.dtype} is none of {DTYPES}; use another implementation")
    kinds = [name for name, _ in channels]
    unknown = [name for name in kinds if TRITON not in CHANNELS[name].versions]
    if unknown:
        raise ValueError(f"token mixing by triton: no kernel for the channels {unknown}; use another implementation")
    sizes = [sum(p.numel() for p in params) for _, params in channels]
    for name, size in zip(kinds, sizes):
        least = layout.max_length if name == "positional" else CHANNELS[name].num_scalars
        if size < least:
            raise ValueError(f"token mixing by triton: {name} has {size} parameters where {least} are needed")
    flat = [p.reshape(-1).float() for _, params in channels for p in params]
    params_P = torch.cat(flat) if flat else values_THd.new_empty(0, dtype=torch.float32)
    times = (None, None, 1.0) if gaps is None else (gaps.timestamps_T, gaps.next_timestamps_T, gaps.time_unit)
    if gaps is None and any(CHANNELS[name].time_map for name in kinds):
        raise ValueError("token mixing by triton: a temporal channel needs the time gaps")
    past_T, next_T, time_unit = times
    return _mix(
        values_THd, params_P, layout.offsets_B1, past_T, next_T, ",".join(kinds), sizes, layout.max_length, time_unit
    )


@dataclass(frozen=True)
class _Launch:
    """Up to two channels that one launch does: a positional and a temporal one. Channels are numbers within C, −1 for
    none; `weight` and `time` say where their parameters begin in P."""

    positional: int
    weight: int
    temporal: int
    time: int
    form: str


def _launches(kinds: Sequence[str], sizes: Sequence[int]) -> List[_Launch]:
    starts = [sum(sizes[:c]) for c in range(len(sizes))]
    lags = [c for c, name in enumerate(kinds) if name == "positional"]
    times = [c for c, name in enumerate(kinds) if CHANNELS[name].time_map]
    launches = []
    for k in range(max(len(lags), len(times))):
        lag, time = (channels[k] if k < len(channels) else -1 for channels in (lags, times))
        form = kinds[time] if time >= 0 else ""
        launches.append(_Launch(lag, starts[lag] if lag >= 0 else 0, time, starts[time] if time >= 0 else 0, form))
    return launches


def tiles(kernel: str, half: bool, width: int, interpreting: bool) -> List[Tiles]:
    """Lists the tile sizes that are tried for a kernel; none is wider than values of E = `width` need.

    Half precision runs on tensor cores and wants wide tiles, since a map's entries are made again for each tile of E;
    float32 products are unrolled multiply-adds, kept short. Of the sizes that fit, these are compiled with few registers
    spilled or none (sm80 and sm90; docs/triton.md); which is fastest, the first call finds out.
    """
    sizes: Sequence[Tuple[int, ...]]
    if kernel == "mix_backward_maps":
        if interpreting:
            sizes = [(16, 1, 1)]
        else:
            sizes = [(16, 8, 3), (32, 8, 3), (64, 8, 3)] if half else [(16, 8, 2), (32, 8, 2)]
        names: Tuple[str, ...] = ("BLOCK_E",)
    else:
        if interpreting:
            sizes = [(16, 16, 16, 1, 1)]
        elif half:
            sizes = [(64, 32, 64, 4, 3), (128, 32, 64, 8, 3), (64, 32, 128, 8, 3), (64, 64, 128, 8, 3)]
        else:
            sizes = [(64, 16, 32, 4, 2), (32, 16, 64, 4, 2), (64, 16, 64, 8, 2), (32, 16, 128, 8, 2)]
        # The tile that stays (rows of the output, or of v's gradient), the one that moves along, values.
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_E") if kernel == "mix_forward" else ("BLOCK_N", "BLOCK_M", "BLOCK_E")
    *_, narrowest, _, _ = sizes[0]
    fitting = [s for s in sizes if s[-3] <= max(width, narrowest)]
    return [(dict(zip(names, s)), s[-2], s[-1]) for s in fitting]


def map_block(interpreting: bool) -> int:
    """Chooses the side of a tile of the maps' backward."""
    return 16 if interpreting else 64


@cache
def _kernel(name: str, half: bool, width: int) -> Launcher:
    from fuxi_torchrec.ops.token_mixing import triton_kernels as kernels

    kernel = getattr(kernels, name)
    return tuned(kernel, tiles(name, half, width, is_interpreting()), ("E", "POSITIONAL", "TIME"))


def _kernel_for(name: str, values_THd: Tensor) -> Launcher:
    width = min(power_of_two(values_THd.shape[1] * values_THd.shape[2]), 256)
    return _kernel(name, values_THd.dtype != torch.float32, width)


def _as_rows(values_THd: Tensor) -> Tensor:
    """v with every token's H * d values side by side; a part of a wider matrix's columns is taken as it is."""
    _, H, d = values_THd.shape
    return values_THd if values_THd.stride()[1:] == (d, 1) or H * d == 0 else values_THd.contiguous()


@torch.library.custom_op("fuxi_torchrec::triton_mixing", mutates_args=())
def _mix(
    values_THd: Tensor, params_P: Tensor, offsets_B1: Tensor, timestamps_T: Optional[Tensor],
    next_timestamps_T: Optional[Tensor], kinds: str, sizes: List[int], max_length: int, time_unit: float,
) -> Tensor:  # fmt: skip
    """[T, H, C, d]; kinds are the channels' names with commas between, sizes their parts of params_P."""
    check_can_run(values_THd, "token mixing by triton")
    (T, H, d), names, users = values_THd.shape, kinds.split(","), offsets_B1.numel() - 1
    out_THCd = values_THd.new_empty(T, H, len(names), d)
    for c, name in enumerate(names):
        if name == "zero":
            out_THCd[:, :, c].zero_()
    if out_THCd.numel() == 0:
        return out_THCd
    v = _as_rows(values_THd)
    past, future = (offsets_B1 if t is None else t.contiguous() for t in (timestamps_T, next_timestamps_T))
    kernel = _kernel_for("mix_forward", v)
    with on_device_of(v):
        for launch in _launches(names, sizes):
            kernel[lambda tile: (users * -(-max_length // tile["BLOCK_M"]), -(-H * d // tile["BLOCK_E"]))](
                v, v.stride(0), out_THCd, offsets_B1, past, future,
                params_P[launch.weight :], params_P[launch.time :], time_unit,
                H * d, d, len(names), launch.positional, launch.temporal, users,
                POSITIONAL=launch.positional >= 0, TIME=launch.form,
            )  # fmt: skip
    return out_THCd


@_mix.register_fake
def _(
    values_THd: Tensor,
    params_P: Tensor,
    offsets_B1: Tensor,
    timestamps_T: Optional[Tensor],
    next_timestamps_T: Optional[Tensor],
    kinds: str,
    sizes: Sequence[int],
    max_length: int,
    time_unit: float,
) -> Tensor:
    T, H, d = values_THd.shape
    return values_THd.new_empty(T, H, len(kinds.split(",")), d)


@torch.library.custom_op("fuxi_torchrec::triton_mixing_backward", mutates_args=())
def _mix_backward(
    grad_THCd: Tensor, values_THd: Tensor, params_P: Tensor, offsets_B1: Tensor, timestamps_T: Optional[Tensor],
    next_timestamps_T: Optional[Tensor], kinds: str, sizes: List[int], max_length: int, time_unit: float,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of values_THd (contiguous, its type) and params_P."""
    (T, H, d), names, users = values_THd.shape, kinds.split(","), offsets_B1.numel() - 1
    grad_params_P = torch.zeros_like(params_P)
    launches = _launches(names, sizes)
    if grad_THCd.numel() == 0 or not launches:
        return values_THd.new_zeros(T, H, d), grad_params_P
    v, grad = _as_rows(values_THd), grad_THCd.contiguous()
    past, future = (offsets_B1 if t is None else t.contiguous() for t in (timestamps_T, next_timestamps_T))
    block = map_block(is_interpreting())
    diagonals = -(-max_length // block)
    parts = max(1, min(diagonals, PROGRAMS // (users * diagonals)))
    values_kernel, maps_kernel = _kernel_for("mix_backward_values", v), _kernel_for("mix_backward_maps", v)
    grad_values = []
    for launch in launches:
        slots = power_of_two(CHANNELS[launch.form].num_scalars if launch.form else 1)
        lags = params_P.new_empty((users, parts, diagonals, 2, block) if launch.positional >= 0 else 0)
        sums = params_P.new_empty((users, parts, diagonals, slots) if launch.form else 0)
        grad_values.append(values_THd.new_empty(T, H, d, dtype=v.dtype if len(launches) == 1 else torch.float32))
        shape = (H * d, d, len(names), launch.positional, launch.temporal, users)
        kinds_done = {"POSITIONAL": launch.positional >= 0, "TIME": launch.form}
        with on_device_of(v):
            values_kernel[lambda tile: (users * -(-max_length // tile["BLOCK_N"]), -(-H * d // tile["BLOCK_E"]))](
                grad, grad_values[-1], offsets_B1, past, future,
                params_P[launch.weight :], params_P[launch.time :], time_unit, *shape, **kinds_done,
            )  # fmt: skip
            maps_kernel[(users * diagonals, parts)](
                v, v.stride(0), grad, offsets_B1, past, future, params_P[launch.time :], time_unit, lags, sums,
                *shape, diagonals, parts, **kinds_done, BLOCK=block, SLOTS=slots,
            )  # fmt: skip
        if launch.form:
            count = CHANNELS[launch.form].num_scalars
            grad_params_P[launch.time : launch.time + count] = sums.sum((0, 1, 2))[:count]
        if launch.positional >= 0:
            grad_params_P[launch.weight : launch.weight + max_length] = _sum_lags(lags)[:max_length]
    grad_values_THd = grad_values[0] if len(launches) == 1 else torch.stack(grad_values).sum(0).to(values_THd.dtype)
    return grad_values_THd, grad_params_P


def _sum_lags(lags: Tensor) -> Tensor:
    """Of mix_backward_maps' partial sums: the gradient of every lag, [diagonals * BLOCK]."""
    before_KL, own_KL = lags.sum((0, 1)).unbind(1)
    own_KL[:-1] += before_KL[1:]
    return own_KL.flatten()


@_mix_backward.register_fake
def _(
    grad_THCd: Tensor,
    values_THd: Tensor,
    params_P: Tensor,
    offsets_B1: Tensor,
    timestamps_T: Optional[Tensor],
    next_timestamps_T: Optional[Tensor],
    kinds: str,
    sizes: Sequence[int],
    max_length: int,
    time_unit: float,
) -> Tuple[Tensor, Tensor]:
    return values_THd.new_empty(values_THd.shape), torch.empty_like(params_P)


def _keep_for_backward(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx: Any, grad_THCd: Tensor) -> Tuple[Any, ...]:
    grad_values_THd, grad_params_P = _mix_backward(grad_THCd, *ctx.saved_tensors, *ctx.rest)
    return grad_values_THd, grad_params_P, None, None, None, None, None, None, None


_mix.register_autograd(_backward, setup_context=_keep_for_backward)
