/* Sampled softmax with K negatives a token: loss and all three gradients in one pass over the tokens, then one over the
candidates (ops/sampled_softmax/dispatch.py, per_token).

Shapes: T tokens, K negatives, U candidates, D columns, a multiple of 16 (zero columns change no product). */
#include "vector.h"

#define AHEAD 6 /* candidates that are fetched before their turn: a table that is larger than the cache waits for memory */

INLINE void fetch(const float *row, int64_t D) {
    for (int64_t c = 0; c < D; c += LANES) __builtin_prefetch(row + c);
}

INLINE float dot(const float *x, const float *y, int64_t D) {
    vec even = {0}, odd = {0};
    int64_t c = 0;
    for (; c + 2 * LANES <= D; c += 2 * LANES) {
        even += *(const vec *)(x + c) * *(const vec *)(y + c);
        odd += *(const vec *)(x + c + LANES) * *(const vec *)(y + c + LANES);
    }
    if (c < D) even += *(const vec *)(x + c) * *(const vec *)(y + c);
    return sum_of(even + odd);
}

INLINE void add_scaled(float *total, const float *x, float weight, int64_t D) {
    for (int64_t c = 0; c < D; c += LANES) *(vec *)(total + c) += *(const vec *)(x + c) * weight;
}

/* total += sum over k of weight[k] table[index[k]], four vectors of columns in registers at a time. */
INLINE void add_weighted_rows(float *total, const float *table, const int32_t *index, const float *weight, int64_t K,
                              int64_t D) {
    int64_t c = 0;
    for (; c + 4 * LANES <= D; c += 4 * LANES) {
        vec *t = (vec *)(total + c), t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
        for (int64_t k = 0; k < K; k++) {
            const vec *row = (const vec *)(table + (int64_t)index[k] * D + c);
            t0 += row[0] * weight[k];
            t1 += row[1] * weight[k];
            t2 += row[2] * weight[k];
            t3 += row[3] * weight[k];
        }
        t[0] = t0, t[1] = t1, t[2] = t2, t[3] = t3;
    }
    for (; c < D; c += LANES) {
        vec t0 = *(vec *)(total + c);
        for (int64_t k = 0; k < K; k++) t0 += *(const vec *)(table + (int64_t)index[k] * D + c) * weight[k];
        *(vec *)(total + c) = t0;
    }
}

/* Per token: loss[t] = -log softmax of the positive, and where gradients are wanted, the softmax weights [T, K] of the
negatives and the gradients of outputs and positives. Logits are products over tau (inverse_tau), plus bias[u] for
negatives; a negative at row positive_index[t] has the logit `masked`. */
API sampled_softmax_tokens(const float *outputs, const float *positives, const float *candidates,
                                const int32_t *index, const int32_t *positive_index, const float *bias, float *loss,
                                float *weights, float *grad_outputs, float *grad_positives, int64_t T, int64_t K,
                                int64_t D, float inverse_tau, float masked, int64_t needs_grad, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < T; t++) {
        const float *x = outputs + t * D, *positive = positives + t * D;
        const int32_t *ids = index + t * K;
        float *w = weights + t * K;
        float positive_logit = dot(x, positive, D) * inverse_tau, top = positive_logit, total = 0;
        for (int64_t k = 0; k < AHEAD && k < K; k++) fetch(candidates + (int64_t)ids[k] * D, D);
        for (int64_t k = 0; k < K; k++) {
            if (k + AHEAD < K) fetch(candidates + (int64_t)ids[k + AHEAD] * D, D);
            w[k] = dot(x, candidates + (int64_t)ids[k] * D, D) * inverse_tau;
        }
        if (bias)
            for (int64_t k = 0; k < K; k++) w[k] += bias[ids[k]];
        for (int64_t k = 0; k < K; k++) w[k] = ids[k] == positive_index[t] ? masked : w[k];
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
        loss[t] = logf(total) + top - positive_logit;
        if (!needs_grad) continue;
        float inverse_total = 1.0f / total, pull = numerator * inverse_total - 1.0f;
#pragma omp simd
        for (int64_t k = 0; k < K; k++) w[k] *= inverse_total;
        float *gx = grad_outputs + t * D, *gp = grad_positives + t * D;
        for (int64_t c = 0; c < D; c++) {
            gx[c] = pull * positive[c];
            gp[c] = pull * inverse_tau * x[c];
        }
        add_weighted_rows(gx, candidates, ids, w, K, D);
        for (int64_t c = 0; c < D; c++) gx[c] *= inverse_tau;
    }
    return 0;
}

/* grad_candidates[index[t, k]] += weights[t, k] * outputs[t] / tau. Every thread owns a range of candidates and goes
through all tokens in order, so nothing is shared and sums don't depend on the number of threads. */
API sampled_softmax_candidates(const float *outputs, const int32_t *index, const float *weights,
                                    float *grad_candidates, int64_t T, int64_t K, int64_t D, int64_t U,
                                    float inverse_tau, int threads) {
    int status = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        int32_t first = (int32_t)(U * part / threads), width = (int32_t)(U * (part + 1) / threads) - first;
        int32_t *mine = malloc((size_t)(K + 1) * sizeof *mine);
        float *scaled = malloc((size_t)(D + 1) * sizeof *scaled);
        if (!mine || !scaled) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
        }
        for (int64_t t = 0; t < T && mine && scaled; t++) {
            const int32_t *ids = index + t * K;
            int64_t found = 0;
            for (int64_t k = 0; k < K; k++) { /* without a branch: half of them would be mispredicted */
                mine[found] = (int32_t)k;
                found += (uint32_t)(ids[k] - first) < (uint32_t)width;
            }
            if (!found) continue;
            for (int64_t c = 0; c < D; c++) scaled[c] = outputs[t * D + c] * inverse_tau;
            for (int64_t i = 0; i < found; i++) {
                if (i + AHEAD < found) fetch(grad_candidates + (int64_t)ids[mine[i + AHEAD]] * D, D);
                add_scaled(grad_candidates + (int64_t)ids[mine[i]] * D, scaled, weights[t * K + mine[i]], D);
            }
        }
        free(mine);
        free(scaled);
    }
    return status;
}
