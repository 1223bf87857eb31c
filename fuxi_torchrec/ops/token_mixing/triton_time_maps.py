"""The temporal maps f(t_{i+1} - t_j) and their parameters' gradients, for Triton kernels; no GPU has timed them yet.

Needs triton. The forms and the order of their parameters are those of time_maps.TIME_MAPS. A tile of time gaps is in
float32 seconds, made from int64 ticks; M rows, N columns, P slots of parameters (a power of two).
"""

import triton
import triton.language as tl

from fuxi_torchrec.ops.token_mixing import time_maps

NUM_BUCKETS = tl.constexpr(time_maps.NUM_BUCKETS)


@triton.jit
def load_parameters(p, TIME: tl.constexpr):
    """The scalars of a functional form, or where the table of the bucketed map lies."""
    if TIME == "bucketed":
        return (p,)
    elif TIME == "mixed":
        head = (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5))
        tail = (tl.load(p + 6), tl.load(p + 7), tl.load(p + 8), tl.load(p + 9), tl.load(p + 10), tl.load(p + 11))
        return head + tail + (tl.load(p + 12),)
    elif TIME == "log":
        return (tl.load(p), tl.load(p + 1), tl.load(p + 2))
    elif TIME == "sin":
        return (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3))
    else:
        return (tl.load(p), tl.load(p + 1))


@triton.jit
def bucket_of(seconds):
    """Computes the bucket of a gap in seconds."""
    log = tl.log(tl.maximum(tl.abs(seconds), 1.0))
    return tl.minimum(tl.div_rn(log, tl.full(log.shape, 0.301, tl.float32)).to(tl.int32), NUM_BUCKETS)


@triton.jit
def time_map(seconds, p, TIME: tl.constexpr):
    """f(seconds); the forms are those of time_maps.TIME_MAPS."""
    x = tl.maximum(seconds, 0.0)
    if TIME == "pow":
        return p[0] * tl.exp(-p[1] * tl.log(1.0 + x))
    elif TIME == "exp":
        return p[0] * tl.exp(-tl.exp(p[1]) * x)
    elif TIME == "log":
        return p[0] * tl.log(1.0 + p[1] * x) + p[2]
    elif TIME == "linear":
        return p[0] * seconds + p[1]
    elif TIME == "sin":
        return p[2] * tl.sin(p[0] * seconds + p[1]) + p[3]
    elif TIME == "mixed":
        total = p[0] * tl.exp(-p[1] * tl.log(1.0 + x)) + p[2] * tl.exp(-tl.exp(p[3]) * x)
        total += p[4] * tl.log(1.0 + p[5] * x) + p[6] + p[7] * seconds + p[8]
        return (total + p[11] * tl.sin(p[9] * seconds + p[10]) + p[12]) / 5
    else:
        tl.static_assert(TIME == "bucketed")
        return tl.load(p[0] + bucket_of(seconds))


@triton.jit
def add_sum(sums_P, slot, term_MN, valid_MN):
    """sums_P with the sum of a tile's valid terms added at `slot`."""
    total = tl.sum(tl.where(valid_MN, term_MN, 0.0))
    return sums_P + tl.where(tl.arange(0, sums_P.shape[0]) == slot, total, 0.0)


@triton.jit
def add_form_gradients(sums_P, seconds, grad, valid, p, AT: tl.constexpr, FORM: tl.constexpr):
    """sums_P plus the gradients of sum(grad * f) of one functional form, whose parameters begin at p[AT]."""
    x = tl.maximum(seconds, 0.0)
    if FORM == "pow":
        log1p = tl.log(1.0 + x)
        unit = grad * tl.exp(-p[AT + 1] * log1p)
        sums_P = add_sum(sums_P, AT, unit, valid)
        return add_sum(sums_P, AT + 1, -p[AT] * unit * log1p, valid)
    elif FORM == "exp":
        rate = tl.exp(p[AT + 1])
        unit = grad * tl.exp(-rate * x)
        sums_P = add_sum(sums_P, AT, unit, valid)
        return add_sum(sums_P, AT + 1, -p[AT] * rate * x * unit, valid)
    elif FORM == "log":
        inner = 1.0 + p[AT + 1] * x
        sums_P = add_sum(sums_P, AT, grad * tl.log(inner), valid)
        sums_P = add_sum(sums_P, AT + 1, grad * p[AT] * x / inner, valid)
        return add_sum(sums_P, AT + 2, grad, valid)
    elif FORM == "linear":
        sums_P = add_sum(sums_P, AT, grad * seconds, valid)
        return add_sum(sums_P, AT + 1, grad, valid)
    else:
        tl.static_assert(FORM == "sin")
        phase = p[AT] * seconds + p[AT + 1]
        slope = grad * p[AT + 2] * tl.cos(phase)
        sums_P = add_sum(sums_P, AT, slope * seconds, valid)
        sums_P = add_sum(sums_P, AT + 1, slope, valid)
        sums_P = add_sum(sums_P, AT + 2, grad * tl.sin(phase), valid)
        return add_sum(sums_P, AT + 3, grad, valid)


@triton.jit
def add_time_gradients(sums_P, seconds, grad, valid, p, TIME: tl.constexpr):
    """sums_P plus the gradients of the temporal map's parameters, of one tile."""
    if TIME == "bucketed":
        bucket = bucket_of(seconds)
        # Buckets of the entries of a tile lie together, the more so the further it is from the diagonal.
        least = tl.min(tl.where(valid, bucket, NUM_BUCKETS))
        most = tl.max(tl.where(valid, bucket, -1))
        for slot in range(least, most + 1):
            sums_P = add_sum(sums_P, slot, grad, valid & (bucket == slot))
        return sums_P
    elif TIME == "mixed":
        grad = grad / 5
        sums_P = add_form_gradients(sums_P, seconds, grad, valid, p, 0, "pow")
        sums_P = add_form_gradients(sums_P, seconds, grad, valid, p, 2, "exp")
        sums_P = add_form_gradients(sums_P, seconds, grad, valid, p, 4, "log")
        sums_P = add_form_gradients(sums_P, seconds, grad, valid, p, 7, "linear")
        return add_form_gradients(sums_P, seconds, grad, valid, p, 9, "sin")
    else:
        return add_form_gradients(sums_P, seconds, grad, valid, p, 0, TIME)
