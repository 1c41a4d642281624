/* The linear fake quantizer of geta/quant/ops.py in one pass over memory, forward and backward, in float and double.

   A tensor is [outer][channels][inner] in memory; `d` and `q_m` have one element per channel. Rows of `inner` elements are
   cut into blocks of BLOCK elements, whatever the number of threads, and every block has its own partial sums: results
   depend on neither the number of threads nor their timing.

   Compile with -ffp-contract=off: a fused multiply-add would round differently from the operators of PyTorch.
   This file includes itself once per element type. */

#ifndef REAL

#include <math.h>
#include <stdint.h>

#define GETA_ABI 1
#define BLOCK 4096
#define LANES 32
#define HASH_LANES 32

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

EXPORT int32_t geta_abi(void) { return GETA_ABI; }

EXPORT int32_t geta_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* Number of blocks, which is the number of doubles that the backward needs twice. */
EXPORT int64_t geta_blocks(int64_t outer, int64_t channels, int64_t inner) { return outer * channels * ((inner + BLOCK - 1) / BLOCK); }

/* Polynomials with an odd multiplier, modulo 2^32, one per lane: any change of a single word changes the result. */
static uint64_t hash_words(const uint32_t *words, int64_t n) {
    uint32_t sums[HASH_LANES] = {0};
    int64_t i = 0;
    for (; i + HASH_LANES <= n; i += HASH_LANES)
        for (int lane = 0; lane < HASH_LANES; lane++) sums[lane] = sums[lane] * 0x9E3779B1u + words[i + lane];
    for (int lane = 0; i < n; i++, lane++) sums[lane] = sums[lane] * 0x9E3779B1u + words[i];
    uint64_t hash = (uint64_t)n;
    for (int lane = 0; lane < HASH_LANES; lane++) {
        hash = (hash ^ sums[lane]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return hash;
}

/* One number for the contents of `n` 32-bit words; blocks are hashed side by side, so threads don't change it.
   `partial` holds geta_blocks(1, 1, n) numbers. */
EXPORT uint64_t geta_hash(const uint32_t *words, int64_t n, uint64_t *partial, int32_t threads) {
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * BLOCK;
        partial[block] = hash_words(words + start, n - start < BLOCK ? n - start : BLOCK);
    }
    uint64_t hash = 0xCBF29CE484222325u;
    for (int64_t block = 0; block < blocks; block++) {
        hash = (hash ^ partial[block]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
    }
    return hash;
}

/* cos(pi r) = sum COSINE[n] r^(2n); for |r| <= 1/2 eight terms are exact to 1e-9, thirteen to 1e-18. */
static const double COSINE[13] = {
    1.00000000000000000e+0, -4.93480220054467931e+0, 4.05871212641676822e+0, -1.33526276885458950e+0,
    2.35330630358893205e-1, -2.58068913900140600e-2, 1.92957430940392305e-3, -1.04638104924845707e-4,
    4.30306958703294701e-6, -1.38789524622137721e-7, 3.60473079746250093e-9, -7.70070713060135338e-11,
    1.37686472803774137e-12};

#define REAL float
#define NAME(stem) stem##_f32
#define RINT rintf
#define COSINE_TERMS 8
#include "native_source.c"
#undef REAL
#undef NAME
#undef RINT
#undef COSINE_TERMS

#define REAL double
#define NAME(stem) stem##_f64
#define RINT rint
#define COSINE_TERMS 13
#include "native_source.c"

#else /* once per element type */

typedef struct {
    REAL d, low, high;
    REAL poison; /* NaN where q_m is NaN, else 0: comparisons alone would let numbers through */
} NAME(bounds);

static REAL NAME(clamp)(REAL value, REAL low, REAL high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

/* The domain of ops.py; NaN stays NaN. */
static NAME(bounds) NAME(into_domain)(REAL d, REAL q_m, int32_t is_signed) {
    REAL high = NAME(clamp)(q_m, (REAL)0x1p-24, (REAL)0x1p20);
    REAL least = high / (REAL)0x1p23;
    d = NAME(clamp)(d, (REAL)0x1p-120, (REAL)0x1p90);
    NAME(bounds) bounds = {d < least || least != least ? least : d, is_signed ? -high : 0, high, high != high ? high : 0};
    return bounds;
}

static void NAME(forward_block)(const REAL *restrict x, REAL *restrict out, int64_t n, NAME(bounds) p) {
    for (int64_t i = 0; i < n; i++) out[i] = RINT(NAME(clamp)(x[i], p.low, p.high) / p.d) * p.d + 0;
}

EXPORT void NAME(geta_forward)(const REAL *x, const REAL *d, const REAL *q_m, REAL *out, int64_t outer, int64_t channels,
                               int64_t inner, int32_t is_signed, int32_t threads) {
    int64_t per_row = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < outer * channels * per_row; block++) {
        int64_t row = block / per_row, within = (block - row * per_row) * BLOCK, start = row * inner + within;
        int64_t n = inner - within < BLOCK ? inner - within : BLOCK;
        NAME(forward_block)(x + start, out + start, n, NAME(into_domain)(d[row % channels], q_m[row % channels], is_signed));
    }
}

typedef struct {
    REAL residual[LANES]; /* round(u) - u */
    REAL dx[LANES];
    REAL dd[LANES], beyond[LANES]; /* running sums */
} NAME(lanes);

static inline __attribute__((always_inline)) void NAME(backward_lanes)(const REAL *restrict grad, const REAL *restrict x,
                                                                       NAME(lanes) *restrict s, NAME(bounds) p, int count) {
    for (int lane = 0; lane < count; lane++) {
        REAL g = grad[lane], clipped = NAME(clamp)(x[lane], p.low, p.high) + p.poison, u = clipped / p.d;
        REAL residual = RINT(u) - u;
        REAL sign = (REAL)(clipped > 0) - (REAL)(clipped < 0);
        REAL dx = g * (REAL)(clipped == x[lane]); /* a product: an infinite or NaN gradient is NaN outside of the range, as in ATen */
        s->residual[lane] = residual;
        s->dx[lane] = dx;
        s->dd[lane] += g * residual;
        s->beyond[lane] += (g - dx) * sign;
    }
}

/* dx *= (1 - A) / (1 + A), A = sum_k a_k cos((2k+1) pi r) with sqrt(2) pi already in the a_k; |r| <= 1/2.
   cos(pi r) by its power series, the odd harmonics by cos((2k+1) w) = 2 cos(2 w) cos((2k-1) w) - cos((2k-3) w). */
static inline __attribute__((always_inline)) void NAME(surrogate_lanes)(NAME(lanes) *restrict s, const double *amplitudes,
                                                                        int32_t harmonics) {
    REAL before[LANES], wave[LANES], twice[LANES], series[LANES];
    REAL first = (REAL)amplitudes[0];
    for (int lane = 0; lane < LANES; lane++) {
        REAL w = s->residual[lane] * s->residual[lane], cosine = (REAL)COSINE[COSINE_TERMS - 1];
        for (int term = COSINE_TERMS - 2; term >= 0; term--) cosine = cosine * w + (REAL)COSINE[term];
        wave[lane] = before[lane] = cosine;
        twice[lane] = 4 * cosine * cosine - 2;
        series[lane] = first * cosine;
    }
    for (int32_t k = 1; k < harmonics; k++) {
        REAL amplitude = (REAL)amplitudes[k];
        for (int lane = 0; lane < LANES; lane++) {
            REAL next = twice[lane] * wave[lane] - before[lane];
            before[lane] = wave[lane];
            wave[lane] = next;
            series[lane] += amplitude * next;
        }
    }
    for (int lane = 0; lane < LANES; lane++) s->dx[lane] *= (1 - series[lane]) / (1 + series[lane]);
}

static inline __attribute__((always_inline)) void NAME(backward_block)(const REAL *restrict grad, const REAL *restrict x,
                                                                       REAL *restrict dx, int64_t n, NAME(bounds) p,
                                                                       const double *amplitudes, int32_t harmonics, double *sums) {
    NAME(lanes) s = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        NAME(backward_lanes)(grad + i, x + i, &s, p, LANES);
        if (harmonics) NAME(surrogate_lanes)(&s, amplitudes, harmonics);
        for (int lane = 0; lane < LANES; lane++) dx[i + lane] = s.dx[lane];
    }
    NAME(backward_lanes)(grad + i, x + i, &s, p, (int)(n - i));
    if (harmonics) NAME(surrogate_lanes)(&s, amplitudes, harmonics);
    for (int lane = 0; lane < n - i; lane++) dx[i + lane] = s.dx[lane];
    sums[0] = sums[1] = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sums[0] += s.dd[lane];
        sums[1] += s.beyond[lane];
    }
}

EXPORT void NAME(geta_backward)(const REAL *grad, const REAL *x, const REAL *d, const REAL *q_m, REAL *dx, REAL *dd, REAL *dq_m,
                                double *partial, int64_t outer, int64_t channels, int64_t inner, const double *amplitudes,
                                int32_t harmonics, int32_t is_signed, int32_t threads) {
    int64_t per_row = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < outer * channels * per_row; block++) {
        int64_t row = block / per_row, within = (block - row * per_row) * BLOCK, start = row * inner + within;
        int64_t n = inner - within < BLOCK ? inner - within : BLOCK;
        NAME(bounds) p = NAME(into_domain)(d[row % channels], q_m[row % channels], is_signed);
        if (harmonics)
            NAME(backward_block)(grad + start, x + start, dx + start, n, p, amplitudes, harmonics, partial + 2 * block);
        else
            NAME(backward_block)(grad + start, x + start, dx + start, n, p, amplitudes, 0, partial + 2 * block);
    }
    for (int64_t channel = 0; channel < channels; channel++) {
        double residual = 0, beyond = 0;
        for (int64_t o = 0; o < outer; o++)
            for (int64_t block = 0; block < per_row; block++) {
                const double *sums = partial + 2 * ((o * channels + channel) * per_row + block);
                residual += sums[0];
                beyond += sums[1];
            }
        dd[channel] = (REAL)residual;
        dq_m[channel] = (REAL)beyond;
    }
}

#endif
