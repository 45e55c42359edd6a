/* From the rows that go into a norm to what goes into a product, and the way back: fused.c says it all. */
#pragma once
#include <omp.h>
#include "values.h"

#define BLOCK 64 /* rows that are turned together: a column of them, in int8, is a line of the cache */

enum stage { SUM, PLAIN, GATED };
enum act { SILU, RELU2 };

ALWAYS v16 reciprocal(v16 x) {
#if ISA_AVX512 /* 14 bits, doubled by Newton's step; a division takes four times as long */
    v16 r = (v16)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

/* What the activation multiplies its argument with: max(x, 0), or sigmoid(x), which below -40 is 0 here: products with
 * 1e-18 and less would come to numbers that are not normal any more, and a processor takes ten times as long with those. */
ALWAYS v16 gain(v16 x, const int act) {
    if (act == RELU2) return max16(x, all(0.0f));
    return choose((i16)(x > all(-40.0f)), reciprocal(1.0f + exp16(-x)), all(0.0f));
}
/* Its derivative where its gain is s. */
ALWAYS v16 slope(v16 x, v16 s, const int act) { return act == SILU ? s * (1.0f + x * (1.0f - s)) : 2.0f * s; }

/* 16 values of a row that goes into a norm. x: residual stream (width), or NULL; y: values (width, or gate and up: 2 * width). */
ALWAYS v16 value(const int kind, const int bf16, const int act, const float *x, const void *y, float row, int64_t at,
                 int width, int i) {
    if (kind == SUM) return y ? load(x + at * width + i) + get(AT(y, at * width + i), bf16) * row : load(x + at * width + i);
    if (kind == PLAIN) return get(AT(y, at * width + i), bf16) * row;
    v16 gate = get(AT(y, 2 * at * width + i), bf16) * row, up = get(AT(y, (2 * at + 1) * width + i), bf16) * row;
    return gate * gain(gate, act) * up;
}

ALWAYS void forward_row(const int kind, const int bf16, const int act, int64_t m, int width, const float *x,
                        const void *y, const float *rows, const float *weight, float eps, float *sum, void *out,
                        int8_t *out_i8, float *scale, float *inverse, float *buffer) {
    v16 squares = {0}, most = {0};
    float row = rows ? rows[m] : 1.0f, inv = 1.0f;
    for (int i = 0; i < width; i += 16) {
        v16 r = value(kind, bf16, act, x, y, row, m, width, i);
        squares = fma16(r, r, squares);
        store(buffer + i, r);
        if (sum) store(sum + m * width + i, r);
    }
    if (weight) inverse[m] = inv = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
    for (int i = 0; i < width; i += 16) {
        v16 n = load(buffer + i);
        if (weight) n = n * inv * load(weight + i);
        if (!out_i8) { put(TO(out, m * width + i), n, bf16); continue; }
        store(buffer + i, n);
        most = max16(most, abs16(n));
    }
    if (!out_i8) return;
    float top = max_of(most);
    top = top < 1e-5f ? 1e-5f : top;
    float s = 1.0f / top * 127.0f; /* as torch divides a number by a tensor */
    scale[m] = 1.0f / s;
    for (int i = 0; i < width; i += 16) {
        b16 bytes = __builtin_convertvector(__builtin_convertvector(round16(load(buffer + i) * s), i16), b16);
        memcpy(out_i8 + m * up64(width) + i, &bytes, 16);
    }
    if (up64(width) > width) memset(out_i8 + m * up64(width) + width, 0, (size_t)(up64(width) - width));
}

/* Rows -> (sum) -> norm, where there is a weight -> values, or int8 and a scale a row; and the same turned, (width, stride),
 * where there is `turned`: backward sums over tokens, and does so fastest along rows. */
void fused_stage_forward(int kind, int bf16, int act, int64_t n, int width, const float *x, const void *y,
                         const float *rows, const float *weight, float eps, float *sum, void *out, int8_t *out_i8,
                         float *scale, float *inverse, void *turned, int64_t stride) {
#pragma omp parallel
    {
        float *buffer = aligned_alloc(64, sizeof(float) * (size_t)width);
#define ROWS_OF(kind, bf16, act) \
    _Pragma("omp for schedule(static)") \
    for (int64_t first = 0; first < n; first += BLOCK) { \
        int height = n - first < BLOCK ? (int)(n - first) : BLOCK; \
        for (int64_t m = first; m < first + height; m++) \
            forward_row(kind, bf16, act, m, width, x, y, rows, weight, eps, sum, out, out_i8, scale, inverse, buffer); \
        if (turned && out_i8) \
            turn_rows(1, height, width, up64(width), out_i8 + first * up64(width), stride, (int8_t *)turned + first); \
        else if (turned) turn_rows(0, height, width, width, AT(out, first * width), stride, (uint16_t *)turned + first); \
    }
#define EACH_KIND \
    if (kind == SUM && bf16) ROWS_OF(SUM, 1, 0) \
    else if (kind == SUM) ROWS_OF(SUM, 0, 0) \
    else if (kind == PLAIN && bf16) ROWS_OF(PLAIN, 1, 0) \
    else if (kind == PLAIN) ROWS_OF(PLAIN, 0, 0) \
    else if (act == SILU && bf16) ROWS_OF(GATED, 1, SILU) \
    else if (act == SILU) ROWS_OF(GATED, 0, SILU) \
    else if (bf16) ROWS_OF(GATED, 1, RELU2) \
    else ROWS_OF(GATED, 0, RELU2)
        EACH_KIND
#undef ROWS_OF
        free(buffer);
    }
}

ALWAYS void backward_row(const int kind, const int bf16, const int act, int64_t m, int width, const float *x,
                         const void *y, const float *rows, const float *columns, const float *weight,
                         const float *inverse, const void *grad, const float *scale, const float *grad_sum,
                         float *grad_x, void *grad_y, float *grad_weight, float *buffer) {
    float row = rows ? rows[m] : 1.0f, inv = weight ? inverse[m] : 1.0f, factor = scale ? 1.0f / scale[m] : 1.0f;
    float along = 0;
    if (weight) { /* n = r * inv * w, and inv depends on all of r */
        v16 dot = {0};
        for (int i = 0; i < width; i += 16) {
            v16 r;
            if (kind == GATED) {
                v16 gate = get(AT(y, 2 * m * width + i), bf16) * row, s = gain(gate, act);
                store(buffer + i, s);
                r = gate * s * get(AT(y, (2 * m + 1) * width + i), bf16) * row;
            } else {
                r = kind == SUM ? load(x + m * width + i) : value(PLAIN, bf16, act, x, y, row, m, width, i);
            }
            v16 g = get(AT(grad, m * width + i), bf16) * factor;
            dot = fma16(g * load(weight + i), r, dot);
            store(grad_weight + i, fma16(g * inv, r, load(grad_weight + i)));
        }
        along = sum_of(dot) * inv * inv * inv / (float)width;
    }
    for (int i = 0; i < width; i += 16) {
        v16 g = get(AT(grad, m * width + i), bf16) * factor;
        if (kind == GATED) {
            v16 gate = get(AT(y, 2 * m * width + i), bf16) * row, up = get(AT(y, (2 * m + 1) * width + i), bf16) * row;
            v16 s = weight ? load(buffer + i) : gain(gate, act);
            if (weight) g = g * load(weight + i) * inv - gate * s * up * along;
            v16 to_gate = g * up * slope(gate, s, act) * row, to_up = g * gate * s * row;
            if (columns) to_gate *= load(columns + i), to_up *= load(columns + width + i);
            put(TO(grad_y, 2 * m * width + i), to_gate, bf16);
            put(TO(grad_y, (2 * m + 1) * width + i), to_up, bf16);
            continue;
        }
        if (weight) {
            v16 r = kind == SUM ? load(x + m * width + i) : value(PLAIN, bf16, act, x, y, row, m, width, i);
            g = g * load(weight + i) * inv - r * along;
        }
        if (kind == SUM) {
            if (grad_sum) g += load(grad_sum + m * width + i);
            store(grad_x + m * width + i, g);
            if (!grad_y) continue;
        }
        g *= row;
        if (columns) g *= load(columns + i);
        put(TO(grad_y, m * width + i), g, bf16);
    }
}

/* x: the sums that went into the norm (kind SUM). grad: of what came out, (n, width); of int8 rows it is that of the
 * integers, and `scale` what one of them is worth. grad_weight (threads, width) is added to. */
void fused_stage_backward(int kind, int bf16, int act, int64_t n, int width, const float *x, const void *y,
                          const float *rows, const float *columns, const float *weight, const float *inverse,
                          const void *grad, const float *scale, const float *grad_sum, float *grad_x, void *grad_y,
                          float *grad_weight, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *buffer = aligned_alloc(64, sizeof(float) * (size_t)width);
        float *mine = grad_weight + (size_t)omp_get_thread_num() * (size_t)width;
#define ROWS_OF(kind, bf16, act) \
    _Pragma("omp for schedule(static)") \
    for (int64_t m = 0; m < n; m++) \
        backward_row(kind, bf16, act, m, width, x, y, rows, columns, weight, inverse, grad, scale, grad_sum, grad_x, \
                     grad_y, mine, buffer);
        EACH_KIND
#undef ROWS_OF
        free(buffer);
    }
}
