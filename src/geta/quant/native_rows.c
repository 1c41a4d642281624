/* Rows of many tensors at once, for optimizers: copy them, sum over them, move them, in float and double.

   A row is a contiguous stretch of a tensor. Row r lies in tensor owner[r], from element offset[r] on, has length[r] elements, and
   its copy starts at element start[r] of a flat array. Every row has its own sums, which are added up in the order of the rows:
   results depend on neither the number of threads nor their timing.

   Compile with -ffp-contract=off. This file includes itself once per element type. */

#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

/* Which rows there are; geta/optim/rows.py has the same structure. */
typedef struct {
    int64_t count;
    const int64_t *owner, *offset, *length, *start;
    const int64_t *pair, *family; /* of each row, see geta/optim/groups.py */
    const int64_t *setting;       /* of each row: its place in d, q_m and unit; -1 = not quantized */
    const int64_t *layer;         /* of each row: its quantizer */
    const uint8_t *is_signed;     /* of each row */
    int64_t pairs;
    int32_t threads;
} geta_rows;

/* Set rows to zero; here offset and length are in bytes. */
EXPORT void geta_rows_zero(const geta_rows *rows, char *const *data) {
#pragma omp parallel for schedule(static) num_threads(rows->threads) if (rows->threads > 1)
    for (int64_t r = 0; r < rows->count; r++) memset(data[rows->owner[r]] + rows->offset[r], 0, (size_t)rows->length[r]);
}

/* Copy `count` numbers of `size` bytes from and to addresses all over memory. */
EXPORT void geta_gather(const char *const *from, char *to, int64_t count, int32_t size) {
    for (int64_t i = 0; i < count; i++) memcpy(to + i * size, from[i], (size_t)size);
}

EXPORT void geta_scatter(const char *from, char *const *to, int64_t count, int32_t size) {
    for (int64_t i = 0; i < count; i++) memcpy(to[i], from + i * size, (size_t)size);
}

#define REAL float
#define NAME(stem) stem##_f32
#define RINT rintf
#define ABS fabsf
#include "native_rows.c"
#undef REAL
#undef NAME
#undef RINT
#undef ABS

#define REAL double
#define NAME(stem) stem##_f64
#define RINT rint
#define ABS fabs
#include "native_rows.c"

#else /* once per element type */

EXPORT void NAME(geta_rows_copy)(const geta_rows *rows, const REAL *const *data, REAL *flat) {
#pragma omp parallel for schedule(static) num_threads(rows->threads) if (rows->threads > 1)
    for (int64_t r = 0; r < rows->count; r++)
        memcpy(flat + rows->start[r], data[rows->owner[r]] + rows->offset[r], (size_t)rows->length[r] * sizeof(REAL));
}

/* data *= factor on all rows */
EXPORT void NAME(geta_rows_scale)(const geta_rows *rows, REAL *const *data, double factor) {
    REAL kept = (REAL)factor;
#pragma omp parallel for schedule(static) num_threads(rows->threads) if (rows->threads > 1)
    for (int64_t r = 0; r < rows->count; r++) {
        REAL *now = data[rows->owner[r]] + rows->offset[r];
        for (int64_t i = 0; i < rows->length[r]; i++) now[i] *= kept;
    }
}

typedef struct {
    REAL step_sq[LANES], step_shaped[LANES], shaped_abs[LANES], step_residual[LANES];
} NAME(row_sums);

/* c = x clipped to [low, high], v = unit (round(c / d) - c / d); without a quantizer c = x, v = 0. */
static inline __attribute__((always_inline)) void NAME(row_lanes)(const REAL *restrict before, const REAL *restrict now,
                                                                  NAME(row_sums) *restrict s, const REAL *p, int count, int quantized) {
    for (int lane = 0; lane < count; lane++) {
        REAL x = before[lane], a = x - now[lane], c = x;
        if (quantized) {
            c = c < p[0] ? p[0] : c;
            c = c > p[1] ? p[1] : c;
            REAL u = c / p[2];
            s->step_residual[lane] += a * ((RINT(u) - u) * p[3]);
        }
        s->step_sq[lane] += a * a;
        s->step_shaped[lane] += a * c;
        s->shaped_abs[lane] += ABS(c);
    }
}

static inline __attribute__((always_inline)) void NAME(row_total)(const REAL *restrict before, const REAL *restrict now, int64_t n,
                                                                  const REAL *p, int quantized, double *out) {
    NAME(row_sums) s = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) NAME(row_lanes)(before + i, now + i, &s, p, LANES, quantized);
    NAME(row_lanes)(before + i, now + i, &s, p, (int)(n - i), quantized);
    for (int kind = 0; kind < 4; kind++) out[kind] = 0;
    for (int lane = 0; lane < LANES; lane++) {
        out[0] += s.step_sq[lane];
        out[1] += s.step_shaped[lane];
        out[2] += s.shaped_abs[lane];
        out[3] += s.step_residual[lane];
    }
}

/* low, high, d and unit of a row */
static inline void NAME(row_settings)(const geta_rows *rows, int64_t r, const REAL *d, const REAL *q_m, const REAL *unit, REAL *p) {
    int64_t at = rows->setting[r];
    p[0] = rows->is_signed[r] ? -q_m[at] : 0;
    p[1] = q_m[at];
    p[2] = d[at];
    p[3] = unit[at];
}

/* sums[kind][pair] of the four kinds of geta/optim/forget.py::PairSums; `partial` holds 4 doubles per row */
EXPORT void NAME(geta_rows_sums)(const geta_rows *rows, const REAL *const *data, const REAL *flat, const REAL *d, const REAL *q_m,
                                 const REAL *unit, double *partial, double *sums) {
#pragma omp parallel for schedule(static) num_threads(rows->threads) if (rows->threads > 1)
    for (int64_t r = 0; r < rows->count; r++) {
        const REAL *before = flat + rows->start[r], *now = data[rows->owner[r]] + rows->offset[r];
        REAL p[4] = {0};
        if (rows->setting[r] >= 0) {
            NAME(row_settings)(rows, r, d, q_m, unit, p);
            NAME(row_total)(before, now, rows->length[r], p, 1, partial + 4 * r);
        } else
            NAME(row_total)(before, now, rows->length[r], p, 0, partial + 4 * r);
    }
    memset(sums, 0, (size_t)(4 * rows->pairs) * sizeof(double));
    for (int64_t r = 0; r < rows->count; r++)
        for (int kind = 0; kind < 4; kind++) sums[kind * rows->pairs + rows->pair[r]] += partial[4 * r + kind];
}

static inline __attribute__((always_inline)) void NAME(row_move)(const REAL *restrict before, REAL *restrict now, int64_t n,
                                                                 const REAL *p, REAL rate, REAL ratio, int quantized) {
    for (int64_t i = 0; i < n; i++) {
        REAL c = before[i];
        if (quantized) {
            c = c < p[0] ? p[0] : c;
            c = c > p[1] ? p[1] : c;
            REAL u = c / p[2];
            c = c + ratio * ((RINT(u) - u) * p[3]);
        }
        now[i] -= rate * c;
    }
}

/* data -= rate (c + ratio v), with the rate of the row's family and the ratio of its quantizer */
EXPORT void NAME(geta_rows_move)(const geta_rows *rows, REAL *const *data, const REAL *flat, const REAL *d, const REAL *q_m,
                                 const REAL *unit, const REAL *rate, const REAL *ratio) {
#pragma omp parallel for schedule(static) num_threads(rows->threads) if (rows->threads > 1)
    for (int64_t r = 0; r < rows->count; r++) {
        const REAL *before = flat + rows->start[r];
        REAL *now = data[rows->owner[r]] + rows->offset[r], p[4] = {0};
        if (rows->setting[r] >= 0) {
            NAME(row_settings)(rows, r, d, q_m, unit, p);
            NAME(row_move)(before, now, rows->length[r], p, rate[rows->family[r]], ratio[rows->layer[r]], 1);
        } else
            NAME(row_move)(before, now, rows->length[r], p, rate[rows->family[r]], 0, 0);
    }
}

/* q_m within a factor of what it was and in [lowest, highest]; then d between q_m / most and q_m / least levels. One number each. */
EXPORT void NAME(geta_constrain)(REAL *const *d, REAL *const *q_m, const REAL *before, const REAL *most, const REAL *least, int64_t count,
                                 double factor, double lowest, double highest) {
    const REAL times = (REAL)factor, from = (REAL)lowest, to = (REAL)highest;
    for (int64_t i = 0; i < count; i++) {
        REAL range = *q_m[i], step = *d[i];
        range = range < before[i] / times ? before[i] / times : range;
        range = range > before[i] * times ? before[i] * times : range;
        range = range < from ? from : range;
        range = range > to ? to : range;
        step = step < range / most[i] ? range / most[i] : step;
        step = step > range / least[i] ? range / least[i] : step;
        *q_m[i] = range;
        *d[i] = step;
    }
}

#endif
