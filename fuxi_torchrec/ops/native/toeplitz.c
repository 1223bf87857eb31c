/* Causal Toeplitz products y[i] = sum over j <= i of weight[i - j] v[j], by FFT, a vector of columns at a time.

The FFT is in place, recursive (so that its inner levels stay in the near cache), without bit reversal: frequencies are in
the order that forward leaves them in, inverse takes them from there. One of length S >= n does for n rows, though a product
is n + n long: with w_S^(1/4) for twist, what passes the end comes back times i, and the real part drops it. This is the
right-angle convolution of Crandall and Fagin, "Discrete weighted transforms and large-integer arithmetic" (Mathematics of
Computation 62, 1994).

`table` holds, for each k < S, w_S^k = e^(-2 pi i k / S) and the twist e^(i pi k / (2 S)), as four floats. */
#include "vector.h"

typedef struct {
    vec re, im;
} cvec;

typedef struct {
    float re, im, twist_re, twist_im;
} Unit;

INLINE cvec times(cvec x, float re, float im) { return (cvec){x.re * re - x.im * im, x.re * im + x.im * re}; }
INLINE cvec plus(cvec x, cvec y) { return (cvec){x.re + y.re, x.im + y.im}; }
INLINE cvec minus(cvec x, cvec y) { return (cvec){x.re - y.re, x.im - y.im}; }
INLINE cvec scaled(cvec x, float a) { return (cvec){x.re * a, x.im * a}; }
INLINE cvec times_i(cvec x, float a) { return (cvec){x.im * -a, x.re * a}; }

/* The DFT of 2, 3, 4 or 5 numbers, in place; sign -1 forward, 1 inverse. */
INLINE void small_dft(cvec *z, const int radix, const float sign) {
    if (radix == 2) {
        cvec a = z[0];
        z[0] = plus(a, z[1]), z[1] = minus(a, z[1]);
    } else if (radix == 3) {
        cvec sum = plus(z[1], z[2]), turn = times_i(minus(z[1], z[2]), sign * 0.866025404f);
        cvec rest = minus(z[0], scaled(sum, 0.5f));
        z[0] = plus(z[0], sum), z[1] = plus(rest, turn), z[2] = minus(rest, turn);
    } else if (radix == 4) {
        cvec even = plus(z[0], z[2]), odd = plus(z[1], z[3]), rest = minus(z[0], z[2]);
        cvec turn = times_i(minus(z[1], z[3]), sign);
        z[0] = plus(even, odd), z[1] = plus(rest, turn), z[2] = minus(even, odd), z[3] = minus(rest, turn);
    } else {
        const float c1 = 0.309016994f, s1 = 0.951056516f, c2 = -0.809016994f, s2 = 0.587785252f;
        cvec sum_1 = plus(z[1], z[4]), sum_2 = plus(z[2], z[3]), off_1 = minus(z[1], z[4]), off_2 = minus(z[2], z[3]);
        cvec rest_1 = plus(z[0], plus(scaled(sum_1, c1), scaled(sum_2, c2)));
        cvec rest_2 = plus(z[0], plus(scaled(sum_1, c2), scaled(sum_2, c1)));
        cvec turn_1 = times_i(plus(scaled(off_1, s1), scaled(off_2, s2)), sign);
        cvec turn_2 = times_i(minus(scaled(off_1, s2), scaled(off_2, s1)), sign);
        z[0] = plus(z[0], plus(sum_1, sum_2));
        z[1] = plus(rest_1, turn_1), z[4] = minus(rest_1, turn_1);
        z[2] = plus(rest_2, turn_2), z[3] = minus(rest_2, turn_2);
    }
}

/* One level of the transform of n numbers: decimation in frequency forward, in time on the way back. */
INLINE void level(cvec *x, int64_t n, const Unit *table, int64_t stride, const int radix, const int inverse) {
    int64_t m = n / radix;
    for (int64_t j = 0; j < m; j++) {
        cvec z[5];
        for (int q = 0; q < radix; q++) z[q] = x[j + q * m];
        if (inverse && j)
            for (int q = 1; q < radix; q++) z[q] = times(z[q], table[q * j * stride].re, -table[q * j * stride].im);
        small_dft(z, radix, inverse ? 1.0f : -1.0f);
        if (!inverse && j)
            for (int q = 1; q < radix; q++) z[q] = times(z[q], table[q * j * stride].re, table[q * j * stride].im);
        for (int q = 0; q < radix; q++) x[j + q * m] = z[q];
    }
}

static int radix_of(int64_t n) { return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : n % 3 == 0 ? 3 : 5; }

static void transform(cvec *x, int64_t n, const Unit *table, int64_t stride) {
    if (n == 1) return;
    int radix = radix_of(n);
    if (radix == 4) level(x, n, table, stride, 4, 0);
    else if (radix == 2) level(x, n, table, stride, 2, 0);
    else if (radix == 3) level(x, n, table, stride, 3, 0);
    else level(x, n, table, stride, 5, 0);
    if (n == radix) return;
    for (int q = 0; q < radix; q++) transform(x + q * (n / radix), n / radix, table, stride * radix);
}

static void transform_back(cvec *x, int64_t n, const Unit *table, int64_t stride) {
    if (n == 1) return;
    int radix = radix_of(n);
    if (n > radix)
        for (int q = 0; q < radix; q++) transform_back(x + q * (n / radix), n / radix, table, stride * radix);
    if (radix == 4) level(x, n, table, stride, 4, 1);
    else if (radix == 2) level(x, n, table, stride, 2, 1);
    else if (radix == 3) level(x, n, table, stride, 3, 1);
    else level(x, n, table, stride, 5, 1);
}

/* Rows of a matrix: row i at x + i * ld, column e of it at columns[e]. */
typedef struct {
    float *x;
    int64_t ld;
    const int64_t *columns;
} Rows;

INLINE int contiguous(const Rows *rows, int64_t first, int64_t count) {
    for (int64_t e = 1; e < count; e++)
        if (rows->columns[first + e] != rows->columns[first] + e) return 0;
    return count == LANES;
}

/* The twisted columns first, first + 1, … of n rows, zero up to `size` rows; backwards: the last row of all comes first. */
static void load(cvec *out, const Rows *rows, int64_t n, int64_t first, int64_t count, int64_t size, const Unit *table,
                 int backwards) {
    int whole = contiguous(rows, first, count);
    for (int64_t k = 0; k < size; k++) {
        int64_t i = backwards ? size - 1 - k : k;
        vec value = {0};
        if (i < n) {
            const float *row = rows->x + i * rows->ld;
            if (whole) memcpy(&value, row + rows->columns[first], sizeof value);
            else
                for (int64_t e = 0; e < count; e++) value[e] = row[rows->columns[first + e]];
        }
        out[k] = (cvec){value * table[k].twist_re, value * table[k].twist_im};
    }
}

/* The way back; adds to what is there, or replaces it. */
static void store(const cvec *in, const Rows *rows, int64_t n, int64_t first, int64_t count, int64_t size,
                  const Unit *table, int backwards, int add) {
    int whole = contiguous(rows, first, count);
    for (int64_t i = 0; i < n; i++) {
        int64_t k = backwards ? size - 1 - i : i;
        vec value = in[k].re * table[k].twist_re + in[k].im * table[k].twist_im;
        float *row = rows->x + i * rows->ld;
        if (whole) {
            vec *place = (vec *)(row + rows->columns[first]);
            *place = add ? *place + value : value;
        } else
            for (int64_t e = 0; e < count; e++) row[rows->columns[first + e]] = value[e] + (add ? row[rows->columns[first + e]] : 0);
    }
}

static cvec *cvecs(int64_t count) {
    void *memory = 0;
    return posix_memalign(&memory, 64, (size_t)(count + 1) * sizeof(cvec)) ? 0 : memory;
}

/* sizes[s] = (S, the place of its table): the transforms of weight[0 … S - 1], over S, one after the other; null where
memory is short. */
static float *spectra(const float *weight, int64_t N, const int64_t *sizes, int64_t num_sizes, int64_t total,
                      const Unit *tables) {
    float *out = malloc((size_t)(2 * total + 1) * sizeof(float));
    for (int64_t s = 0; s < num_sizes; s++) {
        int64_t S = sizes[2 * s];
        const Unit *table = tables + sizes[2 * s + 1];
        cvec *x = out ? cvecs(S) : 0;
        if (!x) {
            free(out);
            return 0;
        }
        for (int64_t k = 0; k < S; k++) {
            float value = k < N ? weight[k] / (float)S : 0;
            x[k].re = (vec){0} + value * table[k].twist_re;
            x[k].im = (vec){0} + value * table[k].twist_im;
        }
        transform(x, S, table, 1);
        for (int64_t k = 0; k < S; k++) {
            out[2 * (sizes[2 * s + 1] + k)] = x[k].re[0];
            out[2 * (sizes[2 * s + 1] + k) + 1] = x[k].im[0];
        }
        free(x);
    }
    return out;
}

/* users[u] = (first row, rows, S, the place of S's table). */
API toeplitz_forward(float *v, int64_t ldv, const int64_t *v_columns, float *y, int64_t ldy, const int64_t *y_columns,
                          const float *weight, int64_t N, const int64_t *users, int64_t num_users, const int64_t *sizes,
                          int64_t num_sizes, const float *tables, int64_t total, int64_t E, int threads) {
    int status = 0;
    int64_t slabs = (E + LANES - 1) / LANES;
    float *weights = spectra(weight, N, sizes, num_sizes, total, (const Unit *)tables);
    if (!weights) return OUT_OF_MEMORY;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < num_users * slabs; task++) {
        const int64_t *user = users + 4 * (task / slabs);
        int64_t n = user[1], S = user[2], e = task % slabs * LANES, count = E - e < LANES ? E - e : LANES;
        const Unit *table = (const Unit *)tables + user[3];
        const float *filter = weights + 2 * user[3];
        Rows from = {v + user[0] * ldv, ldv, v_columns}, to = {y + user[0] * ldy, ldy, y_columns};
        cvec *x = cvecs(S);
        if (!x) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
            continue;
        }
        load(x, &from, n, e, count, S, table, 0);
        transform(x, S, table, 1);
        for (int64_t k = 0; k < S; k++) x[k] = times(x[k], filter[2 * k], filter[2 * k + 1]);
        transform_back(x, S, table, 1);
        store(x, &to, n, e, count, S, table, 0, 0);
        free(x);
    }
    free(weights);
    return status;
}

/* grad_weight[0 … N - 1] from the products of all users and slabs, whose row S - 1 - k belongs to lag k; `places` has where
each user's begin. */
static int add_lags(float *grad_weight, int64_t N, const float *products, const int64_t *places, const int64_t *users,
                    int64_t num_users, int64_t slabs, int64_t S, const Unit *table, int threads) {
    cvec *x = cvecs(S);
    if (!x) return OUT_OF_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < S; k++) {
        double re = 0, im = 0; /* in one order, whatever the number of threads */
        for (int64_t u = 0; u < num_users; u++)
            for (int64_t slab = 0; slab < slabs && users[4 * u + 2] == S; slab++) {
                re += products[2 * (places[u] + slab * S + k)];
                im += products[2 * (places[u] + slab * S + k) + 1];
            }
        x[k] = (cvec){(vec){0} + (float)(re / (double)S), (vec){0} + (float)(im / (double)S)};
    }
    transform_back(x, S, table, 1);
    for (int64_t lag = 0; lag < S && lag < N; lag++) {
        int64_t k = S - 1 - lag;
        grad_weight[lag] += x[k].re[0] * table[k].twist_re + x[k].im[0] * table[k].twist_im;
    }
    free(x);
    return 0;
}

/* One slab of one user's columns: adds grad * weight, read backwards, to grad_v; product gets grad * v's transform. */
static int backward_slab(const Rows *values, const Rows *from, const Rows *to, int64_t n, int64_t e, int64_t count,
                         int64_t S, const Unit *table, const float *filter, float *product) {
    cvec *x = cvecs(2 * S), *g;
    if (!x) return OUT_OF_MEMORY;
    g = x + S;
    load(x, values, n, e, count, S, table, 0);
    transform(x, S, table, 1);
    load(g, from, n, e, count, S, table, 1);
    transform(g, S, table, 1);
    for (int64_t k = 0; k < S; k++) {
        vec re = g[k].re * x[k].re - g[k].im * x[k].im, im = g[k].re * x[k].im + g[k].im * x[k].re;
        float sum_re = 0, sum_im = 0;
#pragma omp simd reduction(+ : sum_re, sum_im)
        for (int lane = 0; lane < LANES; lane++) sum_re += re[lane], sum_im += im[lane];
        product[2 * k] = sum_re, product[2 * k + 1] = sum_im;
        g[k] = times(g[k], filter[2 * k], filter[2 * k + 1]);
    }
    transform_back(g, S, table, 1);
    store(g, to, n, e, count, S, table, 1, 1);
    free(x);
    return 0;
}

/* Adds to grad_v, and writes the gradient of weight[0 … N - 1]. With the rows of grad backwards, both are causal products
again: grad * weight, read backwards, and grad * v, whose row S - 1 - k belongs to lag k. */
API toeplitz_backward(float *v, int64_t ldv, const int64_t *v_columns, float *grad, int64_t ldg,
                      const int64_t *grad_columns, float *grad_v, int64_t ldo, const int64_t *out_columns,
                      const float *weight, float *grad_weight, int64_t N, const int64_t *users, int64_t num_users,
                      const int64_t *sizes, int64_t num_sizes, const float *tables, int64_t total, int64_t E,
                      int threads) {
    int64_t slabs = (E + LANES - 1) / LANES, *places = malloc((size_t)(num_users + 1) * sizeof(int64_t));
    if (!places) return OUT_OF_MEMORY;
    places[0] = 0;
    for (int64_t u = 0; u < num_users; u++) places[u + 1] = places[u] + slabs * users[4 * u + 2];
    float *weights = spectra(weight, N, sizes, num_sizes, total, (const Unit *)tables);
    float *products = malloc((size_t)(2 * places[num_users] + 1) * sizeof(float));
    int status = weights && products ? 0 : OUT_OF_MEMORY;
    if (status) goto done;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < num_users * slabs; task++) {
        int64_t u = task / slabs, slab = task % slabs, e = slab * LANES, count = E - e < LANES ? E - e : LANES;
        const int64_t *user = users + 4 * u;
        Rows values = {v + user[0] * ldv, ldv, v_columns}, from = {grad + user[0] * ldg, ldg, grad_columns};
        Rows to = {grad_v + user[0] * ldo, ldo, out_columns};
        if (backward_slab(&values, &from, &to, user[1], e, count, user[2], (const Unit *)tables + user[3],
                          weights + 2 * user[3], products + 2 * (places[u] + slab * user[2]))) {
#pragma omp atomic write
            status = OUT_OF_MEMORY;
        }
    }
    memset(grad_weight, 0, (size_t)N * sizeof(float));
    for (int64_t s = 0; s < num_sizes && !status; s++)
        status = add_lags(grad_weight, N, products, places, users, num_users, slabs, sizes[2 * s],
                          (const Unit *)tables + sizes[2 * s + 1], threads);
done:
    free(weights), free(places), free(products);
    return status;
}
