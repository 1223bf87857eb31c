/* Norms, gates and dropout, row by row: one pass over memory forward and one backward (ops/row_wise/dispatch.py).

Shapes: T rows, W columns; `ld` is the distance between rows of a view, contiguous where none is given. Dropout keeps an
element where its random bits are at least `threshold` = p 2^32 and multiplies it by `factor`; threshold 0 keeps all. The
bits depend on seed, row and column alone, so backward makes the same mask again. */
#include "vector.h"

#define EACH_ROW(t) _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t t = 0; t < T; t++)
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(total) _Pragma(SIMD_SUM_TEXT(total))
#define SIMD_SUM_TEXT(total) SIMD_SUM_TEXT2(omp simd reduction(+ : total))
#define SIMD_SUM_TEXT2(text) #text
#define KEPT(c) (random_bits(low, high, (uint32_t)(c)) >= threshold)
#define MASK_OF_ROW(t) \
    uint64_t words = row_seed(seed, (uint64_t)(t)); \
    uint32_t low = (uint32_t)words, high = (uint32_t)(words >> 32)

/* Floats of a vector. */
API lanes(int threads) {
    (void)threads;
    return LANES;
}

/* out = x * mask * factor; its own backward. */
API dropout_rows(const float *x, float *out, int64_t T, int64_t W, uint32_t threshold, float factor, uint64_t seed,
                      int threads) {
    EACH_ROW(t) {
        MASK_OF_ROW(t);
        const float *xt = x + t * W;
        float *ot = out + t * W;
        SIMD for (int64_t c = 0; c < W; c++) ot[c] = KEPT(c) ? xt[c] * factor : 0.0f;
    }
    return 0;
}

/* out = scale * x + table[position], then dropout; position[t] is the row of the table. */
API input_rows(const float *x, const float *table, const int64_t *position, float *out, int64_t T, int64_t W,
                    float scale, uint32_t threshold, float factor, uint64_t seed, int threads) {
    EACH_ROW(t) {
        MASK_OF_ROW(t);
        const float *xt = x + t * W, *pt = table + position[t] * W;
        float *ot = out + t * W;
        if (threshold == 0) {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = xt[c] * scale + pt[c];
        } else {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = KEPT(c) ? (xt[c] * scale + pt[c]) * factor : 0.0f;
        }
    }
    return 0;
}

INLINE float inverse_rms(const float *x, int64_t W, float eps) {
    float total = 0;
    SIMD_SUM(total) for (int64_t c = 0; c < W; c++) total += x[c] * x[c];
    return 1.0f / sqrtf(total / (float)W + eps);
}

/* out = gate * x / rms(x), then dropout; gate may be null (all ones). */
API rms_norm_rows(const float *gate, int64_t gate_ld, const float *x, float *out, float *inverse, int64_t T,
                       int64_t W, float eps, uint32_t threshold, float factor, uint64_t seed, int threads) {
    EACH_ROW(t) {
        MASK_OF_ROW(t);
        const float *xt = x + t * W, *gt = gate ? gate + t * gate_ld : 0;
        float *ot = out + t * W, scale = inverse_rms(xt, W, eps);
        inverse[t] = scale;
        scale *= factor;
        if (gt) {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = xt[c] * scale * gt[c];
        } else {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = xt[c] * scale;
        }
        if (threshold) {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = KEPT(c) ? ot[c] : 0.0f;
        }
    }
    return 0;
}

/* With g = grad * mask * factor and i = 1 / rms: d/dgate = g x i; d/dx = i (h - x i^2 mean(h x)), h = g gate. */
API rms_norm_rows_backward(const float *grad, const float *gate, int64_t gate_ld, const float *x,
                                const float *inverse, float *grad_gate, float *grad_x, int64_t T, int64_t W,
                                uint32_t threshold, float factor, uint64_t seed, int threads) {
    EACH_ROW(t) {
        MASK_OF_ROW(t);
        const float *xt = x + t * W, *dt = grad + t * W, *gt = gate ? gate + t * gate_ld : 0;
        float *ot = grad_x + t * W, i = inverse[t], total = 0;
        if (threshold) {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = KEPT(c) ? dt[c] * factor : 0.0f;
        } else {
            SIMD for (int64_t c = 0; c < W; c++) ot[c] = dt[c] * factor;
        }
        if (gt) {
            float *ht = grad_gate + t * W;
            SIMD for (int64_t c = 0; c < W; c++) ht[c] = ot[c] * xt[c] * i;
            SIMD for (int64_t c = 0; c < W; c++) ot[c] *= gt[c];
        }
        SIMD_SUM(total) for (int64_t c = 0; c < W; c++) total += ot[c] * xt[c];
        float along = total / (float)W * i * i * i;
        SIMD for (int64_t c = 0; c < W; c++) ot[c] = ot[c] * i - xt[c] * along;
    }
    return 0;
}

API silu_rows(const float *x, float *out, int64_t T, int64_t W, int threads) {
    EACH_ROW(t) {
        const float *xt = x + t * W;
        float *ot = out + t * W;
        SIMD for (int64_t c = 0; c < W; c++) ot[c] = xt[c] / (1.0f + exp_of(-xt[c]));
    }
    return 0;
}

/* One part of the columns of silu_rows' backward: grad_x[:, first : first + width] from its own gradient. */
API silu_rows_backward(const float *grad, int64_t grad_ld, const float *x, float *grad_x, int64_t T, int64_t W,
                            int64_t first, int64_t width, int threads) {
    EACH_ROW(t) {
        const float *xt = x + t * W + first, *dt = grad + t * grad_ld;
        float *ot = grad_x + t * W + first;
        SIMD for (int64_t c = 0; c < width; c++) {
            float s = 1.0f / (1.0f + exp_of(-xt[c]));
            ot[c] = dt[c] * s * (1.0f + xt[c] * (1.0f - s));
        }
    }
    return 0;
}

/* out[T, F] = silu(x[:, :F]) * x[:, F:]. */
API swiglu_rows(const float *x, float *out, int64_t T, int64_t F, int threads) {
    EACH_ROW(t) {
        const float *gt = x + t * 2 * F, *ut = gt + F;
        float *ot = out + t * F;
        SIMD for (int64_t c = 0; c < F; c++) ot[c] = gt[c] / (1.0f + exp_of(-gt[c])) * ut[c];
    }
    return 0;
}

API swiglu_rows_backward(const float *grad, const float *x, float *grad_x, int64_t T, int64_t F, int threads) {
    EACH_ROW(t) {
        const float *gt = x + t * 2 * F, *ut = gt + F, *dt = grad + t * F;
        float *og = grad_x + t * 2 * F, *ou = og + F;
        SIMD for (int64_t c = 0; c < F; c++) {
            float s = 1.0f / (1.0f + exp_of(-gt[c])), silu = gt[c] * s;
            ou[c] = dt[c] * silu;
            og[c] = dt[c] * ut[c] * (s + silu * (1.0f - s));
        }
    }
    return 0;
}

/* out = x / max(|x|, eps); norm[t] = |x|. */
API unit_rows(const float *x, float *out, float *norm, int64_t T, int64_t W, float eps, int threads) {
    EACH_ROW(t) {
        const float *xt = x + t * W;
        float *ot = out + t * W, total = 0;
        SIMD_SUM(total) for (int64_t c = 0; c < W; c++) total += xt[c] * xt[c];
        float n = sqrtf(total), scale = n < eps ? eps : n;
        norm[t] = n;
        SIMD for (int64_t c = 0; c < W; c++) ot[c] = xt[c] / scale;
    }
    return 0;
}

/* Below eps the divisor is a constant, and the row's own length passes the gradient on. */
API unit_rows_backward(const float *grad, const float *unit, const float *norm, float *grad_x, int64_t T, int64_t W,
                            float eps, int threads) {
    EACH_ROW(t) {
        const float *dt = grad + t * W, *ut = unit + t * W;
        float *ot = grad_x + t * W, along = 0, scale = norm[t] < eps ? eps : norm[t];
        SIMD_SUM(along) for (int64_t c = 0; c < W; c++) along += dt[c] * ut[c];
        if (norm[t] < eps) along = 0;
        SIMD for (int64_t c = 0; c < W; c++) ot[c] = (dt[c] - ut[c] * along) / scale;
    }
    return 0;
}
