/* From the rows that go into a norm to what goes into a product, and the way back: fused.c says it all. */
#pragma once
#include "product.h"

#define BLOCK 64 /* rows that are turned together: a column of them, in int8, is a line of the cache */
#define PAD 64   /* behind a turned row: rows that are a power of two apart push each other out of the caches */

enum stage { STREAM, PLAIN, GATED };
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

typedef struct { /* from n rows that go into a norm to those that go into a product, and the way back */
    int kind, bf16, act, width;
    int64_t n;
    float eps;
    const void *x;        /* STREAM: fp32 (n, width); PLAIN: values (n, width); GATED: values (n, gate and up: 2 width) */
    const float *weight;  /* (width), or NULL: no norm */
    void *out;            /* values or int8 (n, width), in whole lines, with zeros */
    void *turned;         /* the same as (width, n + PAD), zeros after n as far as a line goes, or NULL */
    float *inverse;       /* (n): of the rms */
    float *scale;         /* (n): what a step of int8 is worth; NULL: not quantized */
    int32_t *sums;        /* (n) of int8 */
    /* backward */
    const void *grad;                /* values (n, width): of `out`; with `scale` of its integers */
    const float *also;               /* STREAM: fp32 (n, width), added to the gradient of x */
    float *grad_x;                   /* STREAM: fp32 (n, width) */
    void *grad_y;                    /* values, like x: of the product that made x, before its factors. STREAM: or NULL */
    const float *rows, *columns;     /* those factors, (n) and (width), gate and up: (2 width), or NULL */
    drop drop;                       /* STREAM: what was done to the product */
    float *grad_weight;              /* (width) */
} stage;

/* 16 values of a row. */
ALWAYS v16 value(const int kind, const int bf16, const int act, const void *x, int64_t m, int width, int i) {
    if (kind == STREAM) return load((const float *)x + m * width + i);
    if (kind == PLAIN) return get(AT(x, m * width + i), bf16);
    v16 gate = get(AT(x, 2 * m * width + i), bf16), up = get(AT(x, (2 * m + 1) * width + i), bf16);
    return gate * gain(gate, act) * up;
}

ALWAYS void forward_row(const int kind, const int bf16, const int act, const stage *s, int64_t m, float *buffer) {
    int width = s->width, whole = words_of(s->scale ? INT8 : bf16, width) << (s->scale ? INT8 : bf16);
    v16 squares = {0}, most = {0};
    float inv = 1.0f;
    for (int i = 0; i < width; i += 16) {
        v16 r = value(kind, bf16, act, s->x, m, width, i);
        squares = fma16(r, r, squares);
        store(buffer + i, r);
    }
    if (s->weight) s->inverse[m] = inv = 1.0f / sqrtf(sum_of(squares) / (float)width + s->eps);
    for (int i = 0; i < width; i += 16) {
        v16 n = load(buffer + i);
        if (s->weight) n = n * inv * load(s->weight + i);
        if (!s->scale) { put(TO(s->out, m * whole + i), n, bf16); continue; }
        store(buffer + i, n);
        most = max16(most, abs16(n));
    }
    if (s->scale) {
        float top = max_of(most);
        top = top < 1e-5f ? 1e-5f : top;
        float by = 1.0f / top * 127.0f; /* as torch divides a number by a tensor */
        s->scale[m] = 1.0f / by;
        i16 sum = {0};
        for (int i = 0; i < width; i += 16) {
            i16 x = __builtin_convertvector(round16(load(buffer + i) * by), i16);
            b16 bytes = __builtin_convertvector(x, b16);
            if (TRIT_OFFSET) sum += x;
            memcpy((int8_t *)s->out + m * whole + i, &bytes, 16);
        }
        if (TRIT_OFFSET) s->sums[m] = sum_ofi(sum);
    }
    size_t size = s->scale ? 1 : bf16 ? 2 : 4;
    memset((char *)s->out + (size_t)(m * whole + width) * size, 0, (size_t)(whole - width) * size);
}

#define EACH_KIND(s) \
    if (s->kind == STREAM && s->bf16) ROWS_OF(STREAM, 1, 0) \
    else if (s->kind == STREAM) ROWS_OF(STREAM, 0, 0) \
    else if (s->kind == PLAIN && s->bf16) ROWS_OF(PLAIN, 1, 0) \
    else if (s->kind == PLAIN) ROWS_OF(PLAIN, 0, 0) \
    else if (s->act == SILU && s->bf16) ROWS_OF(GATED, 1, SILU) \
    else if (s->act == SILU) ROWS_OF(GATED, 0, SILU) \
    else if (s->bf16) ROWS_OF(GATED, 1, RELU2) \
    else ROWS_OF(GATED, 0, RELU2)

static void stage_forward(const stage *s) {
    int type = s->scale ? INT8 : s->bf16;
    int64_t whole = (int64_t)words_of(type, s->width) << type;
    size_t size = (size_t)(4 >> type);
#pragma omp parallel
    {
        float *buffer = aligned_alloc(64, sizeof(float) * (size_t)s->width);
#define ROWS_OF(kind, bf16, act) \
    _Pragma("omp for schedule(static)") \
    for (int64_t first = 0; first < s->n; first += BLOCK) { \
        int high = s->n - first < BLOCK ? (int)(s->n - first) : BLOCK; \
        for (int64_t m = first; m < first + high; m++) forward_row(kind, bf16, act, s, m, buffer); \
        if (!s->turned) continue; \
        turn_rows(type, high, s->width, (char *)s->out + (size_t)(first * whole) * size, whole, \
                  (char *)s->turned + (size_t)first * size, s->n + PAD); \
        if (s->n % 32 && first + high == s->n) \
            for (int64_t i = 0; i < s->width; i++) \
                memset((char *)s->turned + (size_t)(i * (s->n + PAD) + s->n) * size, 0, 16 * size); \
    }
        EACH_KIND(s)
#undef ROWS_OF
        free(buffer);
    }
}

ALWAYS void backward_row(const int kind, const int bf16, const int act, const stage *s, int64_t m, float *grad_weight,
                         float *buffer) {
    int width = s->width;
    float row = s->rows ? s->rows[m] : 1.0f, inv = s->weight ? s->inverse[m] : 1.0f, factor = s->scale ? 1.0f / s->scale[m] : 1.0f;
    float along = 0;
    if (s->weight) { /* n = r * inv * w, and inv depends on all of r */
        v16 sum = {0};
        for (int i = 0; i < width; i += 16) {
            v16 r;
            if (kind == GATED) {
                v16 gate = get(AT(s->x, 2 * m * width + i), bf16), by = gain(gate, act);
                store(buffer + i, by);
                r = gate * by * get(AT(s->x, (2 * m + 1) * width + i), bf16);
            } else {
                r = value(kind, bf16, act, s->x, m, width, i);
            }
            v16 g = get(AT(s->grad, m * width + i), bf16) * factor;
            sum = fma16(g * load(s->weight + i), r, sum);
            store(grad_weight + i, fma16(g * inv, r, load(grad_weight + i)));
        }
        along = sum_of(sum) * inv * inv * inv / (float)width;
    }
    for (int i = 0; i < width; i += 16) {
        v16 g = get(AT(s->grad, m * width + i), bf16) * factor;
        if (kind == GATED) {
            v16 gate = get(AT(s->x, 2 * m * width + i), bf16), up = get(AT(s->x, (2 * m + 1) * width + i), bf16);
            v16 by = s->weight ? load(buffer + i) : gain(gate, act);
            if (s->weight) g = g * load(s->weight + i) * inv - gate * by * up * along;
            v16 to_gate = g * up * slope(gate, by, act) * row, to_up = g * gate * by * row;
            if (s->columns) to_gate *= load(s->columns + i), to_up *= load(s->columns + width + i);
            put(TO(s->grad_y, 2 * m * width + i), to_gate, bf16);
            put(TO(s->grad_y, (2 * m + 1) * width + i), to_up, bf16);
            continue;
        }
        if (s->weight) g = g * load(s->weight + i) * inv - value(kind, bf16, act, s->x, m, width, i) * along;
        if (kind == STREAM) {
            if (s->also) g += load(s->also + m * width + i);
            store(s->grad_x + m * width + i, g);
            if (!s->grad_y) continue;
            if (s->drop.below) g = dropped(s->drop, (u16)(lanes() + (int32_t)(m * width + i)), g);
        }
        g *= row;
        if (s->columns) g *= load(s->columns + i);
        put(TO(s->grad_y, m * width + i), g, bf16);
    }
}

static void stage_backward(const stage *s) {
    size_t threads = (size_t)omp_get_max_threads(), width = (size_t)s->width;
    float *grad_weight = calloc(threads * width, sizeof(float)); /* of each thread's rows */
#pragma omp parallel
    {
        float *buffer = aligned_alloc(64, sizeof(float) * width), *mine = grad_weight + (size_t)omp_get_thread_num() * width;
#define ROWS_OF(kind, bf16, act) \
    _Pragma("omp for schedule(static)") \
    for (int64_t m = 0; m < s->n; m++) backward_row(kind, bf16, act, s, m, mine, buffer);
        EACH_KIND(s)
#undef ROWS_OF
        free(buffer);
    }
    for (size_t i = 0; s->weight && i < width; i += 16) {
        v16 sum = {0};
        for (size_t t = 0; t < threads; t++) sum += load(grad_weight + t * width + i);
        store(s->grad_weight + i, sum);
    }
    free(grad_weight);
}

/* grad_y of rows x (fp32, kind STREAM): with its factors, and without what was dropped. */
static void stage_values(const stage *s) {
    int bf16 = s->bf16, width = s->width;
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < s->n; m++)
        for (int i = 0; i < width; i += 16) {
            v16 g = load((const float *)s->x + m * width + i);
            if (s->drop.below) g = dropped(s->drop, (u16)(lanes() + (int32_t)(m * width + i)), g);
            if (s->rows) g *= s->rows[m];
            if (s->columns) g *= load(s->columns + i);
            put(TO(s->grad_y, m * width + i), g, bf16);
        }
}
