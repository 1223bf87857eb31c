/* FuXi's token mixing, y_c = A_c v per user, causal, on jagged rows: no padding, and of the maps only the few rows that
are being multiplied ever exist, in the cache (ops/token_mixing/dispatch.py has the mathematics).

Shapes: T tokens, H heads, d value size per head, E = H d, P = E rounded up to LANES, C channels, n rows of a user. Work is cut
into tasks, some rows (forward) or columns (backward) of one user's maps; threads take them as they come, and sums over
tasks are taken in a fixed order, so results don't depend on the number of threads.

Temporal map: A[i,j] = a exp(-rate L(x)), x = max(time_unit (next_i - time_j), 0), L(x) = x, or ln(1 + x) if `is_log`. */
#include "vector.h"

/* A tile of a product: its sums, a row of its vectors and one weight stay in registers. */
#define ROWS 6
#define VECTORS (REGISTERS / 8)
#define MARGIN (2 * LANES) /* zeros beside the lag weights: what a row of the map has right of the diagonal */
#define UP(n) (((n) + LANES - 1) / LANES * LANES)

typedef struct {
    const int64_t *offsets, *times, *next_times;
    const float *weight_N; /* lag weights, null without a positional channel */
    int64_t H, d, C, positional, temporal; /* channels' places among C, -1 where absent */
    float a, rate, time_unit;
    int32_t is_log;
} Mixing;

INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

static float *floats(int64_t count) {
    void *memory = 0;
    return posix_memalign(&memory, 64, (size_t)UP(count + 1) * sizeof(float)) ? 0 : memory;
}

/* out[r, :] (+)= sum over k < inner of a[r][k] b[k, :], ROWS rows and `vectors` vectors of columns. */
INLINE void product_tile(const float *const *a, const float *b, int64_t ldb, float *out, int64_t ldo, int64_t inner,
                         int accumulate, const int vectors) {
    vec total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            total[r][v] = accumulate ? *(const vec *)(out + r * ldo + v * LANES) : (vec){0};
    for (int64_t k = 0; k < inner; k++) {
        vec row[VECTORS];
        for (int v = 0; v < vectors; v++) row[v] = *(const vec *)(b + k * ldb + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float weight = a[r][k];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) total[r][v] += row[v] * weight;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++) *(vec *)(out + r * ldo + v * LANES) = total[r][v];
}

/* The same for `columns` columns, a multiple of LANES. */
static void product(const float *const *a, const float *b, int64_t ldb, float *out, int64_t ldo, int64_t inner,
                    int64_t columns, int accumulate) {
    int64_t c = 0;
    for (; c + VECTORS * LANES <= columns; c += VECTORS * LANES)
        product_tile(a, b + c, ldb, out + c, ldo, inner, accumulate, VECTORS);
#if VECTORS > 2
    if (columns - c == 3 * LANES) product_tile(a, b + c, ldb, out + c, ldo, inner, accumulate, 3);
    if (columns - c == 2 * LANES) product_tile(a, b + c, ldb, out + c, ldo, inner, accumulate, 2);
#endif
    if (columns - c == LANES) product_tile(a, b + c, ldb, out + c, ldo, inner, accumulate, 1);
}

/* out[k] = max(later[k] - earlier[k], 0) as floats; a step of 0 keeps one of them in place. Differences are taken in int64.
No processor before AVX-512 turns those into floats, so their halves are written into doubles' mantissas: 2^84 + 2^32 high and
2^52 + low, exact below 2^53. */
INLINE void gaps(const int64_t *later, int later_step, const int64_t *earlier, int earlier_step, float *out, int64_t count) {
    int64_t k = 0;
    for (; k + HALF <= count; k += HALF) {
        lvec x = (later_step ? *(const lvec *)(later + k) : (lvec){0} + *later) -
                 (earlier_step ? *(const lvec *)(earlier + k) : (lvec){0} + *earlier);
        x &= x > 0;
        ulvec high = (ulvec)x >> 32 | 0x4530000000000000ull, low = ((ulvec)x & 0xffffffffull) | 0x4330000000000000ull;
        *(halfvec *)(out + k) = __builtin_convertvector(((dvec)high - 0x1.00000001p84) + (dvec)low, halfvec);
    }
    for (; k < count; k++) {
        int64_t x = later[k * later_step] - earlier[k * earlier_step];
        out[k] = x < 0 ? 0.0f : (float)x;
    }
}

/* unit[x] = factor exp(-rate log_part[x]) for `count` time differences later[k] - earlier[k]. */
INLINE void time_strip(const Mixing *m, const int64_t *later, int later_step, const int64_t *earlier, int earlier_step,
                       float *unit, float *log_part, int64_t count, float factor) {
    gaps(later, later_step, earlier, earlier_step, log_part, count);
    const float time_unit = m->time_unit, rate = -m->rate;
    if (m->is_log) {
#pragma omp simd
        for (int64_t k = 0; k < count; k++) log_part[k] = log_of(1.0f + log_part[k] * time_unit);
    } else {
#pragma omp simd
        for (int64_t k = 0; k < count; k++) log_part[k] *= time_unit;
    }
#pragma omp simd
    for (int64_t k = 0; k < count; k++) unit[k] = factor * exp_of(rate * log_part[k]);
}

static void pack_rows(float *out, const float *x, int64_t ld, int64_t rows, int64_t columns) {
    int64_t P = UP(columns);
    for (int64_t i = 0; i < rows; i++) {
        memcpy(out + i * P, x + i * ld, (size_t)columns * sizeof(float));
        for (int64_t c = columns; c < P; c++) out[i * P + c] = 0;
    }
}

/* Channel c of [rows, H, C, d] as [rows, P], zero columns at the end; and the way back, which drops them. */
static void pack_channel(const Mixing *m, float *out, const float *x, int64_t rows, int64_t channel) {
    int64_t E = m->H * m->d, P = UP(E);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t h = 0; h < m->H; h++)
            memcpy(out + i * P + h * m->d, x + ((i * m->H + h) * m->C + channel) * m->d, (size_t)m->d * sizeof(float));
        for (int64_t c = E; c < P; c++) out[i * P + c] = 0;
    }
}

static void store_channel(const Mixing *m, const float *tile, float *y, int64_t rows, int64_t channel) {
    int64_t P = UP(m->H * m->d);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < m->H; h++)
            memcpy(y + ((i * m->H + h) * m->C + channel) * m->d, tile + i * P + h * m->d, (size_t)m->d * sizeof(float));
}

/* Rows first <= i < last of one user's outputs. `reversed` holds weight_N backwards, its lag 0 at reversed[longest - 1]. */
static int forward_task(const Mixing *m, const float *v, int64_t ld, const float *reversed, int64_t longest, float *y,
                         int64_t start, int64_t first, int64_t last) {
    int64_t E = m->H * m->d, P = UP(E), width = UP(last + ROWS);
    float *packed = floats(last * P), *maps = floats(ROWS * width), *logs = floats(width), *tile = floats(ROWS * P);
    int status = packed && maps && logs && tile ? 0 : OUT_OF_MEMORY;
    if (status) goto done;
    pack_rows(packed, v + start * ld, ld, last, E);
    for (int64_t i = first; i < last; i += ROWS) {
        const float *rows[ROWS];
        int64_t count = smaller(ROWS, last - i), columns = i + count;
        float *out = y + (start + i) * m->C * E;
        if (m->temporal >= 0) {
            for (int64_t r = 0; r < ROWS; r++) {
                int64_t real = r < count ? i + r + 1 : 0;
                float *row = maps + r * width;
                rows[r] = row;
                time_strip(m, m->next_times + start + i + r, 0, m->times + start, 1, row, logs, real, m->a);
                for (int64_t j = real; j < columns; j++) row[j] = 0;
            }
            product(rows, packed, P, tile, P, columns, P, 0);
            store_channel(m, tile, out, count, m->temporal);
        }
        if (m->positional >= 0) {
            for (int64_t r = 0; r < ROWS; r++) rows[r] = reversed + longest - 1 - (r < count ? i + r : i);
            product(rows, packed, P, tile, P, columns, P, 0);
            store_channel(m, tile, out, count, m->positional);
        }
    }
done:
    free(packed), free(maps), free(logs), free(tile);
    return status;
}

/* What the columns first <= j < last of one user's maps give: grad_v of their rows, the sums over their entries of
dA U and dA U L, and of dA along each lag. All row indices below count from `first`. */
static int backward_task(const Mixing *m, const float *v, int64_t ld, const float *padded_weight, const float *grad,
                          float *grad_v, float *grad_weight, double *sums, int64_t start, int64_t n, int64_t first,
                          int64_t last) {
    int64_t E = m->H * m->d, P = UP(E), rows = n - first, width = UP(rows);
    float *packed = floats(rows * P), *across = floats(E * width), *map_grad = floats(ROWS * width);
    float *maps = floats(ROWS * width), *logs = floats(ROWS * width), *tile = floats((last - first + ROWS) * P);
    float *nothing = calloc((size_t)E, sizeof(float));
    const float *left[ROWS], *values[ROWS];
    int written = 0;
    int status = packed && across && map_grad && maps && logs && tile && nothing ? 0 : OUT_OF_MEMORY;
    if (status) goto done;
    for (int pass = 0; pass < 2; pass++) {
        int64_t channel = pass ? m->positional : m->temporal;
        if (channel < 0) continue;
        pack_channel(m, packed, grad + (start + first) * m->C * E, rows, channel);
        for (int64_t e = 0; e < E; e++) {
            for (int64_t i = 0; i < rows; i++) across[e * width + i] = packed[i * P + e];
            for (int64_t i = rows; i < width; i++) across[e * width + i] = 0;
        }
        for (int64_t j = 0; j < last - first; j += ROWS) {
            int64_t count = smaller(ROWS, last - first - j), from = j / LANES * LANES;
            for (int64_t r = 0; r < ROWS; r++)
                values[r] = r < count ? v + (start + first + j + r) * ld : nothing;
            product(values, across + from, width, map_grad + from, width, E, width - from, 0);
            for (int64_t r = 0; r < ROWS; r++) {
                int64_t own = j + smaller(r, count - 1); /* rows past the end repeat the last; their result is dropped */
                const float *slope = map_grad + r * width;
                if (pass) {
                    left[r] = padded_weight + MARGIN + from - own;
                    if (r < count)
                        for (int64_t i = own; i < rows; i++) grad_weight[i - own] += slope[i];
                    continue;
                }
                float *row = maps + r * width, *log_row = logs + r * width, sum = 0, log_sum = 0;
                left[r] = row + from;
                for (int64_t i = from; i < own; i++) row[i] = 0;
                time_strip(m, m->next_times + start + first + own, 1, m->times + start + first + own, 0, row + own,
                           log_row + own, rows - own, 1.0f);
                if (r >= count) continue;
#pragma omp simd reduction(+ : sum, log_sum)
                for (int64_t i = own; i < rows; i++) {
                    float weighted = slope[i] * row[i];
                    sum += weighted;
                    log_sum += weighted * log_row[i];
                }
                sums[0] += sum;
                sums[1] += log_sum;
            }
            if (!pass)
                for (int64_t r = 0; r < count; r++)
                    for (int64_t i = from; i < rows; i++) maps[r * width + i] *= m->a;
            product(left, packed + from * P, P, tile + j * P, P, rows - from, P, written);
        }
        written = 1;
    }
    for (int64_t j = 0; j < last - first; j++)
        memcpy(grad_v + (start + first + j) * E, tile + j * P, (size_t)E * sizeof(float));
done:
    free(packed), free(across), free(map_grad), free(maps), free(logs), free(tile), free(nothing);
    return status;
}

/* tasks[k] = (user, first row, last row + 1), the longest first; y is [T, H, C, d]; v has rows at distance ld. */
API mix_forward(const float *v, int64_t ld, const int64_t *offsets, const int64_t *times,
                     const int64_t *next_times, const float *weight_N, float *y, const int64_t *tasks, int64_t num_tasks,
                     int64_t longest, int64_t H, int64_t d, int64_t C, int64_t positional, int64_t temporal,
                     int64_t is_log, float a, float rate, float time_unit, int threads) {
    Mixing m = {offsets, times, next_times, weight_N, H, d, C, positional, temporal, a, rate, time_unit, (int32_t)is_log};
    int status = 0;
    float *reversed = floats(longest + MARGIN);
    if (!reversed) return OUT_OF_MEMORY;
    for (int64_t k = 0; k < longest; k++) reversed[k] = positional >= 0 ? weight_N[longest - 1 - k] : 0;
    for (int64_t k = longest; k < longest + MARGIN; k++) reversed[k] = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < num_tasks; k++) {
        const int64_t *task = tasks + 3 * k;
        if (forward_task(&m, v, ld, reversed, longest, y, offsets[task[0]], task[1], task[2])) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
        }
    }
    free(reversed);
    return status;
}

/* grad_v is [T, E]; grad_weight [longest], sums [2] = (sum of dA U, sum of dA U L). */
API mix_backward(const float *v, int64_t ld, const int64_t *offsets, const int64_t *times,
                      const int64_t *next_times, const float *weight_N, const float *grad, float *grad_v,
                      float *grad_weight, double *sums, const int64_t *tasks, int64_t num_tasks, int64_t longest,
                      int64_t H, int64_t d, int64_t C, int64_t positional, int64_t temporal, int64_t is_log, float a,
                      float rate, float time_unit, int threads) {
    Mixing m = {offsets, times, next_times, weight_N, H, d, C, positional, temporal, a, rate, time_unit, (int32_t)is_log};
    float *padded = calloc((size_t)(longest + 2 * MARGIN), sizeof(float));
    float *lag_parts = calloc((size_t)(num_tasks * longest + 1), sizeof(float));
    double *sum_parts = calloc((size_t)(num_tasks * 2 + 1), sizeof(double));
    int status = padded && lag_parts && sum_parts ? 0 : OUT_OF_MEMORY;
    if (status) goto done;
    if (positional >= 0) memcpy(padded + MARGIN, weight_N, (size_t)longest * sizeof(float));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < num_tasks; k++) {
        const int64_t *task = tasks + 3 * k;
        int64_t start = offsets[task[0]], n = offsets[task[0] + 1] - start;
        if (backward_task(&m, v, ld, padded, grad, grad_v, lag_parts + k * longest, sum_parts + 2 * k, start, n, task[1],
                          task[2])) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t lag = 0; lag < longest; lag++) {
        double total = 0;
        for (int64_t k = 0; k < num_tasks; k++) total += lag_parts[k * longest + lag];
        grad_weight[lag] = (float)total;
    }
    sums[0] = sums[1] = 0;
    for (int64_t k = 0; k < num_tasks; k++) sums[0] += sum_parts[2 * k], sums[1] += sum_parts[2 * k + 1];
done:
    free(padded), free(lag_parts), free(sum_parts);
    return status;
}
