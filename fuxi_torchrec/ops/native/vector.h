/* What the kernels share: vectors of floats, exp and log without a call, counter-based random bits.

GCC's and Clang's vector extensions are lowered to whatever the processor has; rows need no alignment. A vector is as wide
as the target's registers: a wider one takes several of them, and tiles that were made to fit spill to memory. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
/* Every kernel returns 0, or OUT_OF_MEMORY. */
#define API __attribute__((visibility("default"))) int
#define OUT_OF_MEMORY 1
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* As many bytes hold half as many numbers of eight bytes. */
#define HALF (LANES / 2)
typedef int64_t lvec __attribute__((vector_size(8 * HALF), aligned(8)));
typedef uint64_t ulvec __attribute__((vector_size(8 * HALF), aligned(8)));
typedef double dvec __attribute__((vector_size(8 * HALF), aligned(8)));
typedef float halfvec __attribute__((vector_size(4 * HALF), aligned(4)));

INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* e^x within 2 units in the last place; 0 below -87, infinite from 88.4 on (where n is 128, whose power of two is), NaN for
NaN. Cody-Waite reduction, then Taylor on |r| <= ln2 / 2. */
INLINE float exp_of(float x) {
    float clamped = x < -87.0f ? -87.0f : (x > 89.0f ? 89.0f : x);
    float shifted = clamped * 1.44269504f + 12582912.0f;  /* rounds to an integer in the low bits */
    float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9841270e-4f;
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    float scale = bits_to_float((float_to_bits(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : p * scale;
}

/* ln(x) for finite x >= 1, within 2 units in the last place: x = m 2^k with m in [2/3, 4/3), ln m = 2 atanh(s). */
INLINE float log_of(float x) {
    uint32_t bits = float_to_bits(x) - 0x3f2aaaabu;
    int32_t k = (int32_t)bits >> 23;
    float m = bits_to_float((bits & 0x7fffffu) + 0x3f2aaaabu);
    float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = 0.11111111f;
    p = p * z + 0.14285714f;
    p = p * z + 0.2f;
    p = p * z + 0.33333333f;
    return (float)k * 0.693147181f + (2.0f * s + 2.0f * s * z * p);
}

/* 32 random bits of element `column` of a row; two rounds of multiply and xorshift on a counter. */
INLINE uint32_t random_bits(uint32_t low, uint32_t high, uint32_t column) {
    uint32_t h = column * 0x9e3779b9u + low;
    h = (h ^ (h >> 16)) * 0x21f0aaadu;
    h = (h ^ (h >> 15) ^ high) * 0x735a2d97u;
    return h ^ (h >> 15);
}

/* The two words that random_bits takes for a row (splitmix64 of the seed and the row). */
INLINE uint64_t row_seed(uint64_t seed, uint64_t row) {
    uint64_t z = seed + (row + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
