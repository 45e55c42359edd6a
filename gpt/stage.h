/* From the rows that go into a norm to what goes into a product, and the way back. fused.c has the
 * whole picture; a stage takes `width` floats a row and is described by the struct below. */
#pragma once
#include "matmul.h"

enum stage { STREAM, PLAIN, GATED };
enum act { SILU, RELU2 };

ALWAYS vf reciprocal(vf x) {
#if LANES == 16 /* 14 bits, doubled by Newton's step; a division takes four times as long */
    vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

/* act(x) / x: max(x, 0) or sigmoid(x). Below -40 the sigmoid is flushed to 0: products with it would be denormal
 * numbers, with which a processor takes ten times as long. */
ALWAYS vf gain(vf x, const int act) {
    if (act == RELU2) return maxv(x, splat(0.0f));
    return blend((vi)(x > splat(-40.0f)), reciprocal(1.0f + expv(-x)), splat(0.0f));
}
/* Its derivative where its gain is s. */
ALWAYS vf slope(vf x, vf s, const int act) { return act == SILU ? s * (1.0f + x * (1.0f - s)) : 2.0f * s; }

typedef struct { /* from n rows that go into a norm to those that go into a product, and the way back */
    int kind, bf16, act, width;
    int64_t n;
    float eps;
    const void *x;        /* STREAM: fp32 (n, width); PLAIN: values (n, width); GATED: (n, gate and up: 2 width) */
    const float *weight;  /* (width), or NULL: no norm */
    void *transposed;     /* what comes out, values or int8, as (width, n), zeros behind n; or NULL */
    float *rstd;          /* (n): of the rms */
    float *scale;         /* (n): what a step of int8 is worth; NULL: not quantized */
    int32_t *sums;        /* (n) of int8 */
    /* backward */
    const float *also;               /* STREAM: fp32 (n, width), added to the gradient of x */
    float *grad_x;                   /* STREAM: fp32 (n, width) */
    void *grad_y;                    /* values: of the product that made x, before its factors. STREAM: or NULL */
    int64_t away;                    /* rows of grad_y from each other, in values */
    const float *rows, *columns;     /* those factors, (n) and (width), gate and up: (2 width), or NULL */
    drop drop;                       /* STREAM: what was done to the product */
    float *grad_weight;              /* (width) */
} stage;

/* Values of a row. */
ALWAYS vf value(const int kind, const int bf16, const int act, const void *x, int64_t m, int width, int i) {
    if (kind == STREAM) return load((const float *)x + m * width + i);
    if (kind == PLAIN) return get(AT(x, m * width + i), bf16);
    vf gate = get(AT(x, 2 * m * width + i), bf16), up = get(AT(x, (2 * m + 1) * width + i), bf16);
    return gate * gain(gate, act) * up;
}

/* out: values or int8 (width), in whole lines, with zeros */
ALWAYS void forward_row(const int kind, const int bf16, const int act, const stage *s, int64_t m, char *out,
                        float *buffer) {
    int width = s->width, whole = words_of(s->scale ? INT8 : bf16, width) << (s->scale ? INT8 : bf16);
    vf squares[WAYS] = {{0}}, most[WAYS] = {{0}};
    float inv = 1.0f;
    for (int i = 0; i < width; i += 16)
        EACH_WAY(u) {
            vf r = value(kind, bf16, act, s->x, m, width, i + LANES * u);
            squares[u] = fmav(r, r, squares[u]);
            store(buffer + i + LANES * u, r);
        }
    if (s->weight) s->rstd[m] = inv = 1.0f / sqrtf(sum_of(squares) / (float)width + s->eps);
    for (int i = 0; i < width; i += LANES) {
        vf n = load(buffer + i);
        if (s->weight) n = n * inv * load(s->weight + i);
        if (!s->scale) { put(TO(out, i), n, bf16); continue; }
        store(buffer + i, n);
        most[0] = maxv(most[0], absv(n));
    }
    if (s->scale) {
        float top = max_of(most);
        top = top < 1e-5f ? 1e-5f : top;
        float by = 1.0f / top * 127.0f; /* as torch divides a number by a tensor */
        s->scale[m] = 1.0f / by;
        vi sum = {0};
        for (int i = 0; i < width; i += LANES) {
            vi x = toint(roundv(load(buffer + i) * by));
            vb bytes = tobytes(x);
            if (TRIT_OFFSET) sum += x;
            memcpy(out + i, &bytes, sizeof bytes);
        }
        if (TRIT_OFFSET) s->sums[m] = sum_ofi(sum);
    }
    size_t size = s->scale ? 1 : bf16 ? 2 : 4;
    memset(out + (size_t)width * size, 0, (size_t)(whole - width) * size);
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

/* Rows m ... m + rows - 1 (m a multiple of BLOCK) -> out (rows, width); buffer: (width). */
static void stage_forward(const stage *s, int64_t m, int rows, char *out, float *buffer) {
    int type = s->scale ? INT8 : s->bf16;
    int64_t whole = row_stride(type, s->width), high = row_stride(type, s->n);
    size_t size = (size_t)(4 >> type);
#define ROWS_OF(kind, bf16, act) \
    for (int i = 0; i < rows; i++) forward_row(kind, bf16, act, s, m + i, out + (size_t)(i * whole) * size, buffer);
    EACH_KIND(s)
#undef ROWS_OF
    for (int first = 0; s->transposed && first < rows; first += BLOCK)
        transpose_rows(type, rows - first < BLOCK ? rows - first : BLOCK, s->width,
                       out + (size_t)(first * whole) * size, whole,
                       (char *)s->transposed + (size_t)(m + first) * size, high);
    if (s->transposed && type != FLOAT && s->n % 32 && m + rows == s->n)
        for (int64_t i = 0; i < s->width; i++)
            memset((char *)s->transposed + (size_t)(i * high + s->n) * size, 0, 16 * size);
}

/* grad: values (width), of what came out; with `scale` of its integers. grad_weight (width) is added to. */
ALWAYS void backward_row(const int kind, const int bf16, const int act, const stage *s, int64_t m, const char *grad,
                         float *grad_weight, float *buffer) {
    int width = s->width;
    float row = s->rows ? s->rows[m] : 1.0f, inv = s->weight ? s->rstd[m] : 1.0f;
    float factor = s->scale ? 1.0f / s->scale[m] : 1.0f;
    float along = 0;
    if (s->weight) { /* n = r * inv * w, and inv depends on all of r */
        vf sum[WAYS] = {{0}};
        for (int first = 0; first < width; first += 16)
            EACH_WAY(u) {
                int i = first + LANES * u;
                vf r;
                if (kind == GATED) {
                    vf gate = get(AT(s->x, 2 * m * width + i), bf16), by = gain(gate, act);
                    store(buffer + i, by);
                    r = gate * by * get(AT(s->x, (2 * m + 1) * width + i), bf16);
                } else {
                    r = value(kind, bf16, act, s->x, m, width, i);
                }
                vf g = get(AT(grad, i), bf16) * factor;
                sum[u] = fmav(g * load(s->weight + i), r, sum[u]);
                store(grad_weight + i, fmav(g * inv, r, load(grad_weight + i)));
            }
        along = sum_of(sum) * inv * inv * inv / (float)width;
    }
    for (int i = 0; i < width; i += LANES) {
        vf g = get(AT(grad, i), bf16) * factor;
        if (kind == GATED) {
            vf gate = get(AT(s->x, 2 * m * width + i), bf16), up = get(AT(s->x, (2 * m + 1) * width + i), bf16);
            vf by = s->weight ? load(buffer + i) : gain(gate, act);
            if (s->weight) g = g * load(s->weight + i) * inv - gate * by * up * along;
            vf to_gate = g * up * slope(gate, by, act) * row, to_up = g * gate * by * row;
            if (s->columns) to_gate *= load(s->columns + i), to_up *= load(s->columns + width + i);
            put(TO(s->grad_y, m * s->away + i), to_gate, bf16);
            put(TO(s->grad_y, m * s->away + width + i), to_up, bf16);
            continue;
        }
        if (s->weight) g = g * load(s->weight + i) * inv - value(kind, bf16, act, s->x, m, width, i) * along;
        if (kind == STREAM) {
            if (s->also) g += load(s->also + m * width + i);
            store(s->grad_x + m * width + i, g);
            if (!s->grad_y) continue;
            if (s->drop.below) g = dropped(s->drop, (vu)(lanes() + (int32_t)(m * width + i)), g);
        }
        g *= row;
        if (s->columns) g *= load(s->columns + i);
        put(TO(s->grad_y, m * s->away + i), g, bf16);
    }
}

/* Rows m ... m + rows - 1, from grad (rows, width). */
static void stage_backward(const stage *s, int64_t m, int rows, const char *grad, float *grad_weight, float *buffer) {
    size_t size = (size_t)s->width * (s->bf16 ? 2 : 4);
#define ROWS_OF(kind, bf16, act) \
    for (int i = 0; i < rows; i++) \
        backward_row(kind, bf16, act, s, m + i, grad + (size_t)i * size, grad_weight, buffer);
    EACH_KIND(s)
#undef ROWS_OF
}

/* What the threads (threads, width) have added up of the gradient of the norm. */
static void add_up(const stage *s, int threads, const float *parts) {
    for (int i = 0; s->weight && i < s->width; i += LANES) {
        vf sum = {0};
        for (int t = 0; t < threads; t++) sum += load(parts + (size_t)t * (size_t)s->width + i);
        store(s->grad_weight + i, sum);
    }
}

/* grad_y of rows x (fp32, kind STREAM): with its factors, and without what was dropped. */
static void stage_values(const stage *s) {
    int bf16 = s->bf16, width = s->width;
    double start = omp_get_wtime();
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < s->n; m++)
        for (int i = 0; i < width; i += LANES) {
            vf g = load((const float *)s->x + m * width + i);
            if (s->drop.below) g = dropped(s->drop, (vu)(lanes() + (int32_t)(m * width + i)), g);
            if (s->rows) g *= s->rows[m];
            if (s->columns) g *= load(s->columns + i);
            put(TO(s->grad_y, m * s->away + i), g, bf16);
        }
    since(STAGES, start);
}

/* ---------------------------------------------------------------------------------------------- a layer */
/* A stage and the product of what comes out of it, a few rows at a time, so that these stay in the cache. */
static void layer_forward(const stage *s, const product *p) {
    int kind = s->scale ? INT8 : s->bf16;
    size_t row = (size_t)(row_stride(kind, s->width) * (4 >> kind));
#pragma omp parallel
    {
        char *x = buffer_of(row * (TOGETHER + HIGH));
        float *buffer = buffer_of(4 * row);
        tiles before = begin_tiles();
        EACH_ROWS(s->n) {
            double start = omp_get_wtime();
            stage_forward(s, m, (int)rows, x, buffer);
            start = since(STAGES, start);
            multiply_rows(kind, s->bf16, p, m, (int)rows, x);
            since(PRODUCTS, start);
        }
        end_tiles(before);
        free(x), free(buffer);
    }
}

/* And the way back, from `grad`: values (n, N). */
static void layer_backward(const stage *s, int N, const void *back, const char *grad) {
    int bf16 = s->bf16, threads = omp_get_max_threads();
    int64_t row = row_stride(bf16, N) * (bf16 ? 2 : 4);
    size_t width = (size_t)s->width;
    float *parts = zeros_of(sizeof(float) * (size_t)threads * width);
#pragma omp parallel
    {
        char *y = buffer_of(4 * width * TOGETHER);
        float *buffer = buffer_of(4 * width);
        tiles before = begin_tiles();
        EACH_ROWS(s->n) {
            double start = omp_get_wtime();
            product p = {.N = s->width, .K = N, .panels = back, .y = y, .away = s->width};
            multiply_rows(bf16, bf16, &p, 0, (int)rows, grad + m * row);
            start = since(PRODUCTS, start);
            stage_backward(s, m, (int)rows, y, parts + (size_t)omp_get_thread_num() * width, buffer);
            since(STAGES, start);
        }
        end_tiles(before);
        free(y), free(buffer);
    }
    add_up(s, threads, parts);
    free(parts);
}
