/* Sampled softmax with K negatives a token: the loss and all three gradients, some tokens at a time
(ops/sampled_softmax/dispatch.py, per_token).

Shapes: T tokens, C tokens of a chunk, K negatives, U candidates, D columns, P = D rounded up to LANES: candidates and their
gradient have P columns, of which the last are zero. */
#include "vector.h"

#define AHEAD 6 /* rows that are fetched before their turn: a table that is larger than the cache waits for memory */
#define WIDE 8  /* vectors of a row that are summed in registers at a time */
#define WRONG_INDEX 2

typedef float quad __attribute__((vector_size(16), aligned(4)));
typedef int32_t quad_index __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_index){i, j, k, l})
#endif

typedef struct {
    const float *outputs, *positives, *candidates, *bias; /* bias[u] is added to a candidate's logits; may be null */
    const int32_t *index;
    const int64_t *positive_index;
    float *loss, *grad_outputs, *grad_positives, *grad_candidates; /* gradients are null where none are wanted */
    int64_t K, U, D, P;
    float inverse_tau, masked;
} Softmax;

/* Of the C tokens from `start` on: every pair's softmax weight [C, K], the outputs over tau [C, P]. */
typedef struct {
    int64_t start;
    float *weights, *scaled;
} Chunk;

INLINE void fetch(const float *row, int64_t P) {
    for (int64_t c = 0; c < P; c += 16) __builtin_prefetch(row + c);
}

INLINE quad fold(vec x) {
    quad parts[LANES / 4], total;
    memcpy(parts, &x, sizeof x);
    total = parts[0];
    for (int i = 1; i < LANES / 4; i++) total += parts[i];
    return total;
}

/* (sum of a, sum of b, sum of c, sum of d) */
INLINE quad sums_of(vec a, vec b, vec c, vec d) {
    quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    quad pq = SHUFFLE(p, q, 0, 4, 1, 5) + SHUFFLE(p, q, 2, 6, 3, 7), rs = SHUFFLE(r, s, 0, 4, 1, 5) + SHUFFLE(r, s, 2, 6, 3, 7);
    return SHUFFLE(pq, rs, 0, 1, 4, 5) + SHUFFLE(pq, rs, 2, 3, 6, 7);
}

/* out[k] = scale x . table[ids[k]], four rows at a time; writes up to three numbers more. */
INLINE void products_of(const float *x, const float *table, const int32_t *ids, float *out, int64_t K, const int64_t P,
                        float scale) {
    for (int64_t k = 0; k < K; k += 4) {
        const float *rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            rows[i] = table + ids[k + i < K ? k + i : K - 1] * P;
            if (k + i + AHEAD < K) fetch(table + ids[k + i + AHEAD] * P, P);
        }
        vec totals[4] = {{0}, {0}, {0}, {0}};
#pragma GCC unroll 8
        for (int64_t c = 0; c < P; c += LANES) {
            vec part = *(const vec *)(x + c);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) totals[i] += part * *(const vec *)(rows[i] + c);
        }
        *(quad *)(out + k) = sums_of(totals[0], totals[1], totals[2], totals[3]) * scale;
    }
}

/* One version for each of the short rows, whose loops are unrolled. */
#define FOR_WIDTH(vectors, CASE, OTHERWISE) \
    switch (vectors) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) default: OTHERWISE; }

static void products(const float *x, const float *table, const int32_t *ids, float *out, int64_t K, int64_t P, float scale) {
#define CASE(n) case n: products_of(x, table, ids, out, K, n * LANES, scale); break;
    FOR_WIDTH(P / LANES, CASE, products_of(x, table, ids, out, K, P, scale))
#undef CASE
}

/* total[: vectors] += sum over k of weight[k * step] table[ids[k * step]] */
INLINE void add_strip(float *total, const float *table, const int32_t *ids, const float *weight, int64_t step, int64_t count,
                      int64_t P, const int vectors) {
    vec sums[WIDE];
    for (int v = 0; v < vectors; v++) sums[v] = *(vec *)(total + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        const float *row = table + ids[k * step] * P, w = weight[k * step];
        if (k + AHEAD < count) fetch(table + ids[(k + AHEAD) * step] * P, vectors * LANES);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[v] += *(const vec *)(row + v * LANES) * w;
    }
    for (int v = 0; v < vectors; v++) *(vec *)(total + v * LANES) = sums[v];
}

static void add_rows(float *total, const float *table, const int32_t *ids, const float *weight, int64_t step, int64_t count,
                     int64_t P) {
    for (int64_t c = 0; c < P; c += WIDE * LANES) {
#define CASE(n) case n: add_strip(total + c, table + c, ids, weight, step, count, P, n); break;
        FOR_WIDTH((P - c) / LANES, CASE, add_strip(total + c, table + c, ids, weight, step, count, P, WIDE))
#undef CASE
    }
}

/* Turns the logits w[K] and the positive's into softmax weights; returns the positive's weight. */
INLINE float normalise(float *w, int64_t K, float positive_logit, float *loss) {
    float top = positive_logit, total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < K; k++) top = w[k] > top ? w[k] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < K; k++) {
        /* x - x is 0, or NaN where x is not finite: a broken logit must break the loss */
        float e = exp_of(w[k] - top) + (w[k] - w[k]);
        w[k] = e;
        total += e;
    }
    float numerator = exp_of(positive_logit - top) + (positive_logit - positive_logit);
    total += numerator;
    *loss = logf(total) + top - positive_logit;
    float inverse_total = 1.0f / total;
#pragma omp simd
    for (int64_t k = 0; k < K; k++) w[k] *= inverse_total;
    return numerator * inverse_total;
}

/* The c-th token of a chunk; `row` and `sum` hold P floats. Returns 0, or WRONG_INDEX. */
static int token(const Softmax *s, const Chunk *chunk, int64_t c, float *logits, float *row, float *sum) {
    const int64_t t = chunk->start + c;
    const float *x = s->outputs + t * s->D, *positive = s->positives + t * s->D;
    const int32_t *ids = s->index + t * s->K;
    const int64_t own = s->positive_index[t];
    float *w = chunk->weights + c * s->K, *scaled = chunk->scaled + c * s->P, positive_logit = 0;
    int wrong = own < -1 || own >= s->U;
    for (int64_t k = 0; k < s->K; k++) wrong |= (uint32_t)ids[k] >= (uint32_t)s->U;
    if (wrong) return WRONG_INDEX;
    memcpy(row, x, (size_t)s->D * sizeof(float));
#pragma omp simd reduction(+ : positive_logit)
    for (int64_t i = 0; i < s->D; i++) positive_logit += x[i] * positive[i];
    positive_logit *= s->inverse_tau;
    products(row, s->candidates, ids, logits, s->K, s->P, s->inverse_tau);
    if (s->bias)
        for (int64_t k = 0; k < s->K; k++) logits[k] += s->bias[ids[k]];
    for (int64_t k = 0; k < s->K; k++) w[k] = ids[k] == own ? s->masked : logits[k];
    float pull = normalise(w, s->K, positive_logit, s->loss + t) - 1.0f;
    if (!s->grad_outputs) return 0;
    memset(sum, 0, (size_t)s->P * sizeof(float));
    add_rows(sum, s->candidates, ids, w, 1, s->K, s->P);
    float *gx = s->grad_outputs + t * s->D, *gp = s->grad_positives + t * s->D;
    for (int64_t i = 0; i < s->D; i++) gx[i] = (sum[i] + pull * positive[i]) * s->inverse_tau;
    for (int64_t i = 0; i < s->D; i++) gp[i] = pull * s->inverse_tau * x[i];
    for (int64_t i = 0; i < s->P; i++) scaled[i] = row[i] * s->inverse_tau;
    return 0;
}

/* grad_candidates[u] += sum over the chunk's pairs of u of weight scaled[token], for first <= u < last: the pairs are sorted
by candidate, so that a row is read and written once, and in the order of the tokens, so that no sum depends on the threads. */
static int add_candidates(const Softmax *s, const Chunk *chunk, int64_t tokens, int64_t first, int64_t last) {
    int64_t width = last - first;
    uint32_t *ends = calloc((size_t)width + 1, sizeof *ends);
    int32_t *mine = malloc((size_t)(s->K + 1) * sizeof *mine);
    struct pair { int32_t token; float weight; } *pairs = 0;
    int status = ends && mine ? 0 : OUT_OF_MEMORY;
    for (int pass = 0; pass < 2 && !status; pass++) {
        for (int64_t c = 0; c < tokens; c++) {
            const int32_t *ids = s->index + (chunk->start + c) * s->K;
            int64_t found = 0;
            for (int64_t k = 0; k < s->K; k++) { /* without a branch: half of them would be mispredicted */
                mine[found] = (int32_t)k;
                found += (uint64_t)(ids[k] - first) < (uint64_t)width;
            }
            if (!pass)
                for (int64_t i = 0; i < found; i++) ends[ids[mine[i]] - first + 1]++;
            else
                for (int64_t i = 0; i < found; i++)
                    pairs[ends[ids[mine[i]] - first]++] = (struct pair){(int32_t)c, chunk->weights[c * s->K + mine[i]]};
        }
        if (pass) continue;
        for (int64_t u = 0; u < width; u++) ends[u + 1] += ends[u];
        pairs = malloc(((size_t)ends[width] + 1) * sizeof *pairs);
        if (!pairs) status = OUT_OF_MEMORY;
    }
    for (int64_t u = 0, start = 0; u < width && !status; start = ends[u++])
        if (ends[u] > start)
            add_rows(s->grad_candidates + (first + u) * s->P, chunk->scaled, &pairs[start].token, &pairs[start].weight, 2,
                     ends[u] - start, s->P);
    free(ends), free(mine), free(pairs);
    return status;
}

/* loss[t] = -log softmax of the positive, and the gradients of its sum; that of the candidates is added to what is there.
Logits are products over tau, plus bias[u] for negatives; a negative at row positive_index[t] has the logit `masked`. */
API sampled_softmax(const float *outputs, const float *positives, const float *candidates, const int32_t *index,
                    const int64_t *positive_index, const float *bias, float *loss, float *grad_outputs, float *grad_positives,
                    float *grad_candidates, int64_t T, int64_t K, int64_t U, int64_t D, int64_t chunk_tokens,
                    float inverse_tau, float masked, int threads) {
    int64_t P = (D + LANES - 1) / LANES * LANES, C = chunk_tokens < T ? chunk_tokens : T;
    Softmax s = {outputs, positives, candidates, bias, index, positive_index, loss, grad_outputs, grad_positives,
                 grad_candidates, K, U, D, P, inverse_tau, masked};
    Chunk chunk = {0, malloc((size_t)(C * K + 1) * sizeof(float)), malloc((size_t)(C * P + 1) * sizeof(float))};
    float *scratch = calloc((size_t)((K + 4 + 2 * P) * threads), sizeof(float));
    int status = chunk.weights && chunk.scaled && scratch ? 0 : OUT_OF_MEMORY;
    for (; chunk.start < T && !status; chunk.start += C) {
        int64_t tokens = T - chunk.start < C ? T - chunk.start : C;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int part = 0; part < threads; part++) {
            float *logits = scratch + (K + 4 + 2 * P) * part, *row = logits + K + 4;
            int failed = 0;
            for (int64_t c = tokens * part / threads; c < tokens * (part + 1) / threads && !failed; c++)
                failed = token(&s, &chunk, c, logits, row, row + P);
            if (failed) {
#pragma omp atomic write
                status = failed;
            }
        }
        if (!grad_candidates || status) continue;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int part = 0; part < threads; part++) {
            if (add_candidates(&s, &chunk, tokens, U * part / threads, U * (part + 1) / threads)) {
#pragma omp atomic write
                status = OUT_OF_MEMORY;
            }
        }
    }
    free(chunk.weights), free(chunk.scaled), free(scratch);
    return status;
}
