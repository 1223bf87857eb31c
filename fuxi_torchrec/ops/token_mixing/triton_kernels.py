"""Token mixing as Triton kernels for CUDA, tested through Triton's interpreter; no GPU has timed these kernels yet.

Needs triton; `triton.py` is the way in. A map's entries are made in registers from lags and int64 timestamps and go
straight into a matrix product; tiles above the diagonal are skipped; nothing is added atomically.

Heads share the maps, so a token's values are one row of E = H * d; a channel's outputs or gradients lie in rows of
H * C * d, d at a time. A launch does up to two channels: a positional one (POSITIONAL) and a temporal one (TIME is its
form, "" for none). Tiles: M rows (outputs i), N columns (inputs j), E values. Row indices into [T, ...] are int64.
"""

import triton
import triton.language as tl

from fuxi_torchrec.ops.token_mixing.triton_time_maps import add_time_gradients, load_parameters, time_map
from fuxi_torchrec.ops.triton_common import is_interpreting

INTERPRETING = tl.constexpr(is_interpreting())


@triton.jit
def add_product(a, b, sum):
    """sum + a @ b in float32; float32 factors are not rounded to TF32."""
    if INTERPRETING:  # the interpreter's product takes the bits of a bfloat16 for an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def columns_of(e, d, C):
    """Where value e = h * d + x of channel 0 lies in a row of H * C * d."""
    return (e // d) * (C * d) + e % d


@triton.jit
def lag_map(weight_ptr, i, j, valid):
    """Loads a tile of the positional map."""
    return tl.load(weight_ptr + (i - j), mask=valid, other=0.0)


@triton.jit
def mix_forward(
    v_ptr, v_stride, out_ptr, offsets_ptr, past_ptr, next_ptr, weight_ptr, time_ptr, time_unit,
    E, d, C, positional, temporal, users,
    POSITIONAL: tl.constexpr, TIME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[i, c] = Σ_{j <= i} A_c[i, j] v[j] for one tile of a user's rows and of E; grid (users * row tiles, E tiles)."""
    pid = tl.program_id(0)
    user = pid % users
    first = (tl.num_programs(0) // users - 1 - pid // users) * BLOCK_M  # the longest work first
    start = tl.load(offsets_ptr + user)
    length = (tl.load(offsets_ptr + user + 1) - start).to(tl.int32)
    if first >= length:
        return
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    i = first + tl.arange(0, BLOCK_M)
    positional_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    temporal_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if TIME != "":
        next_M = tl.load(next_ptr + start + i, mask=i < length, other=0)
        parameters = load_parameters(time_ptr, TIME)
    for column in range(0, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        j = column + tl.arange(0, BLOCK_N)
        v_NE = tl.load(
            v_ptr + (start + j)[:, None] * v_stride + e[None, :],
            mask=(j < length)[:, None] & (e < E)[None, :],
            other=0.0,
        )
        valid = (j[None, :] <= i[:, None]) & (i < length)[:, None]
        if POSITIONAL:
            map_MN = lag_map(weight_ptr, i[:, None], j[None, :], valid)
            positional_ME = add_product(map_MN.to(v_NE.dtype), v_NE, positional_ME)
        if TIME != "":
            past_N = tl.load(past_ptr + start + j, mask=j < length, other=0)
            seconds = (next_M[:, None] - past_N[None, :]).to(tl.float32) * time_unit
            map_MN = tl.where(valid, time_map(seconds, parameters, TIME), 0.0)
            temporal_ME = add_product(map_MN.to(v_NE.dtype), v_NE, temporal_ME)
    out = out_ptr + (start + i)[:, None] * (E * C) + columns_of(e, d, C)[None, :]
    stored = (i < length)[:, None] & (e < E)[None, :]
    if POSITIONAL:
        tl.store(out + positional * d, positional_ME, mask=stored)
    if TIME != "":
        tl.store(out + temporal * d, temporal_ME, mask=stored)


@triton.jit
def mix_backward_values(
    grad_ptr, grad_v_ptr, offsets_ptr, past_ptr, next_ptr, weight_ptr, time_ptr, time_unit,
    E, d, C, positional, temporal, users,
    POSITIONAL: tl.constexpr, TIME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad_v[j] = Σ_c Σ_{i >= j} A_c[i, j] grad[i, c] for one tile of a user's columns and of E, c this launch's
    channels; grid (users * column tiles, E tiles)."""
    pid = tl.program_id(0)
    user = pid % users
    first = (pid // users) * BLOCK_N
    start = tl.load(offsets_ptr + user)
    length = (tl.load(offsets_ptr + user + 1) - start).to(tl.int32)
    if first >= length:
        return
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    j = first + tl.arange(0, BLOCK_N)
    grad_v_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if TIME != "":
        past_N = tl.load(past_ptr + start + j, mask=j < length, other=0)
        parameters = load_parameters(time_ptr, TIME)
    for row in range((first // BLOCK_M) * BLOCK_M, length, BLOCK_M):
        i = row + tl.arange(0, BLOCK_M)
        grad = grad_ptr + (start + i)[:, None] * (E * C) + columns_of(e, d, C)[None, :]
        loaded = (i < length)[:, None] & (e < E)[None, :]
        valid = (j[:, None] <= i[None, :]) & (i < length)[None, :]
        if POSITIONAL:
            grad_ME = tl.load(grad + positional * d, mask=loaded, other=0.0)
            map_NM = lag_map(weight_ptr, i[None, :], j[:, None], valid)
            grad_v_NE = add_product(map_NM.to(grad_ME.dtype), grad_ME, grad_v_NE)
        if TIME != "":
            grad_ME = tl.load(grad + temporal * d, mask=loaded, other=0.0)
            next_M = tl.load(next_ptr + start + i, mask=i < length, other=0)
            seconds = (next_M[None, :] - past_N[:, None]).to(tl.float32) * time_unit
            map_NM = tl.where(valid, time_map(seconds, parameters, TIME), 0.0)
            grad_v_NE = add_product(map_NM.to(grad_ME.dtype), grad_ME, grad_v_NE)
    grad_v = grad_v_ptr + (start + j)[:, None] * E + e[None, :]
    tl.store(grad_v, grad_v_NE, mask=(j < length)[:, None] & (e < E)[None, :])


@triton.jit
def mix_backward_maps(
    v_ptr, v_stride, grad_ptr, offsets_ptr, past_ptr, next_ptr, time_ptr, time_unit, lags_ptr, sums_ptr,
    E, d, C, positional, temporal, users, diagonals, parts,
    POSITIONAL: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The maps' parameters' gradients, of the tiles on one diagonal of tiles of one user: row tile = column tile +
    diagonal. A diagonal is shared out over `parts` programs. Grid (users * diagonals, parts).

    lags_ptr: float32 [users, parts, diagonals, 2, BLOCK]; a diagonal's tiles hold the lags from (diagonal - 1) * BLOCK
        ([..., 0, :], of which the first is empty) and from diagonal * BLOCK ([..., 1, :]).
    sums_ptr: float32 [users, parts, diagonals, SLOTS], the temporal parameters.
    """
    pid = tl.program_id(0)
    user, diagonal, part = pid % users, pid // users, tl.program_id(1)
    start = tl.load(offsets_ptr + user)
    length = (tl.load(offsets_ptr + user + 1) - start).to(tl.int32)
    local = tl.arange(0, BLOCK)
    # A tile is turned row by row, so that the entries of one lag stand in one column: x[i, (i - lag) mod BLOCK].
    turned = (local[:, None] - local[None, :]) & (BLOCK - 1)
    is_own_lag = local[:, None] >= local[None, :]
    before_L, own_L = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sums_P = tl.zeros((SLOTS,), tl.float32)
    if TIME != "":
        parameters = load_parameters(time_ptr, TIME)
    for tile in range(diagonal + part, tl.cdiv(length, BLOCK), parts):
        i, j = tile * BLOCK + local, (tile - diagonal) * BLOCK + local
        positional_MN = tl.zeros((BLOCK, BLOCK), tl.float32)
        temporal_MN = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first_e in range(0, E, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            v_EN = tl.load(
                v_ptr + (start + j)[None, :] * v_stride + e[:, None],
                mask=(j < length)[None, :] & (e < E)[:, None],
                other=0.0,
            )
            grad = grad_ptr + (start + i)[:, None] * (E * C) + columns_of(e, d, C)[None, :]
            loaded = (i < length)[:, None] & (e < E)[None, :]
            if POSITIONAL:
                grad_ME = tl.load(grad + positional * d, mask=loaded, other=0.0)
                positional_MN = add_product(grad_ME, v_EN, positional_MN)
            if TIME != "":
                grad_ME = tl.load(grad + temporal * d, mask=loaded, other=0.0)
                temporal_MN = add_product(grad_ME, v_EN, temporal_MN)
        valid = (j[None, :] <= i[:, None]) & (i < length)[:, None]
        if POSITIONAL:
            by_lag = tl.gather(tl.where(valid, positional_MN, 0.0), turned, 1)
            own_L += tl.sum(tl.where(is_own_lag, by_lag, 0.0), 0)
            before_L += tl.sum(tl.where(is_own_lag, 0.0, by_lag), 0)
        if TIME != "":
            next_M = tl.load(next_ptr + start + i, mask=i < length, other=0)
            past_N = tl.load(past_ptr + start + j, mask=j < length, other=0)
            seconds = (next_M[:, None] - past_N[None, :]).to(tl.float32) * time_unit
            sums_P = add_time_gradients(sums_P, seconds, temporal_MN, valid, parameters, TIME)
    slot = (user.to(tl.int64) * parts + part) * diagonals + diagonal
    if POSITIONAL:
        tl.store(lags_ptr + slot * (2 * BLOCK) + local, before_L)
        tl.store(lags_ptr + slot * (2 * BLOCK) + BLOCK + local, own_L)
    if TIME != "":
        tl.store(sums_ptr + slot * SLOTS + tl.arange(0, SLOTS), sums_P)
