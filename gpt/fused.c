/* What stands between the matrix products of a training step, in as few passes over memory as can be.
 *
 * Every product of the model (q, k, v; o; gate, up; down) has the same things before it: the row that goes in is a sum
 * (residual stream + what the last block added), a plain one (attention's output) or a gated one (act(gate) * up); it
 * is normed; and for the ternary twin it is quantized. `stage_forward` does all of that in one pass, `stage_backward`
 * the way back. Attention has its rotation and softmax here, the loss its softmax. The products are left to torch.
 *
 * Rows are tokens. "Value" arrays are bf16 or fp32, all others fp32. A product's values may carry one scale a row
 * (x_scale of a ternary layer), and their gradients are then those of the integer sums: times the scale of the row and
 * of the column (w_scale). Threads are OpenMP's, those that torch has already: built without a libgomp of its own
 * (fused.py). One thread computes a row, and gradients of norms are added up thread by thread, so results repeat with
 * the same number of threads. */
#include <omp.h>
#include <stdlib.h>
#include "../engine/floats.h"

#define BLOCK 64 /* rows that are turned together: a column of them, in int8, is a line of the cache */

enum stage { SUM, PLAIN, GATED };
enum act { SILU, RELU2 };

#define AT(p, i) ((const char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))
#define TO(p, i) ((char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))

typedef uint16_t h16 __attribute__((vector_size(32)));

ALWAYS v16 get(const char *p, const int bf16) {
    if (!bf16) return load((const float *)(const void *)p);
    h16 h;
    memcpy(&h, p, 32);
    return (v16)(__builtin_convertvector(h, u16) << 16);
}

ALWAYS void put(char *p, v16 v, const int bf16) {
    if (!bf16) { store((float *)(void *)p, v); return; }
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else /* to the nearest, halves to even; what is not a number stays none */
    u16 bits = (u16)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    h16 h = __builtin_convertvector((u16)choose((i16)(v == v), (v16)rounded, (v16)(alli(0x7fc0))), h16);
#endif
    memcpy(p, &h, 32);
}

ALWAYS int up64(int n) { return (n + 63) / 64 * 64; }
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

/* 32 x 32 bf16 in place: at distance d, blocks off the diagonal change places. */
typedef uint16_t h32 __attribute__((vector_size(64)));
typedef int16_t s32 __attribute__((vector_size(64)));
typedef int8_t b32 __attribute__((vector_size(32)));
ALWAYS void exchange(h32 *a, h32 *b, const int d) {
    h32 low, high;
    for (int j = 0; j < 32; j++) low[j] = (uint16_t)(j & d ? 32 + j - d : j), high[j] = (uint16_t)(j & d ? 32 + j : j + d);
    h32 first = __builtin_shuffle(*a, *b, low);
    *b = __builtin_shuffle(*a, *b, high);
    *a = first;
}
static void turn(h32 *tile) {
#define STEP(d) for (int i = 0; i < 32; i++) if (!(i & d)) exchange(tile + i, tile + i + d, d);
#pragma GCC unroll 32
    STEP(1)
#pragma GCC unroll 32
    STEP(2)
#pragma GCC unroll 32
    STEP(4)
#pragma GCC unroll 32
    STEP(8)
#pragma GCC unroll 32
    STEP(16)
#undef STEP
}

/* Rows of a block (at most BLOCK, `stride` apart), int8 or bf16, as columns of `to`, whose rows are n apart. */
static void turn_rows(int quantized, int rows, int width, int64_t stride, const void *from, int64_t n, void *to) {
    for (int c0 = 0; c0 < width; c0 += 32)
        for (int r0 = 0; r0 < rows; r0 += 32) {
            h32 tile[32];
            int wide = width - c0 < 32 ? width - c0 : 32, high = rows - r0 < 32 ? rows - r0 : 32;
            for (int r = 0; r < high; r++) {
                int64_t at = (r0 + r) * stride + c0;
                if (quantized) {
                    b32 bytes = {0};
                    memcpy(&bytes, (const int8_t *)from + at, (size_t)wide);
                    tile[r] = (h32)__builtin_convertvector(bytes, s32);
                } else {
                    memcpy(&tile[r], (const uint16_t *)from + at, 2 * (size_t)wide);
                }
            }
            turn(tile);
            for (int c = 0; c < wide; c++) {
                int64_t at = (c0 + c) * n + r0;
                b32 bytes = __builtin_convertvector((s32)tile[c], b32);
                if (quantized) memcpy((int8_t *)to + at, &bytes, (size_t)high);
                else memcpy((uint16_t *)to + at, &tile[c], 2 * (size_t)high);
            }
        }
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

/* ---------------------------------------------------------------- attention ------------------------------------- */
ALWAYS void rotate_head(const int bf16, const int back, const char *from, char *to, float row, const float *columns,
                        const float *cos, const float *sin, int D) {
    int half = D / 2;
    for (int i = 0; i < half; i += 16) {
        v16 a = get(from + (bf16 ? 2 : 4) * i, bf16), b = get(from + (bf16 ? 2 : 4) * (i + half), bf16);
        if (cos) {
            v16 c = load(cos + i), s = back ? -load(sin + i) : load(sin + i), first = a;
            a = first * c - b * s;
            b = b * c + first * s;
        }
        a *= row, b *= row;
        if (columns) a *= load(columns + i), b *= load(columns + half + i);
        put(to + (bf16 ? 2 : 4) * i, a, bf16);
        put(to + (bf16 ? 2 : 4) * (i + half), b, bf16);
    }
}

ALWAYS void rotate_token(const int bf16, const int back, int64_t m, int T, int H, int G, int D, const float *cos,
                         const float *sin, const float *rows, const float *columns, void *qkv, void *q, void *k, void *v) {
    int64_t b = m / T, t = m % T, W = (int64_t)(H + 2 * G) * D;
    for (int h = 0; h < H + 2 * G; h++) {
        void *part = h < H ? q : h < H + G ? k : v;
        int64_t heads = h < H ? H : G, head = h < H ? h : (h - H) % G;
        char *outside = TO(part, ((b * heads + head) * T + t) * D), *inside = TO(qkv, m * W + h * D);
        const float *c = h < H + G ? cos + t * (D / 2) : NULL, *s = sin + t * (D / 2);
        rotate_head(bf16, back, back ? outside : inside, back ? inside : outside, rows ? rows[m] : 1.0f,
                    columns ? columns + h * D : NULL, c, s, D);
    }
}

/* Rotary embedding (NeoX halves): qkv (B, T, (H + 2 G) D) <-> q (B, H, T, D), k, v (B, G, T, D); `back` for gradients. */
void fused_rotate(int bf16, int back, int64_t B, int T, int H, int G, int D, const float *cos, const float *sin,
                  const float *rows, const float *columns, void *qkv, void *q, void *k, void *v) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < B * T; m++) {
        if (bf16 && back) rotate_token(1, 1, m, T, H, G, D, cos, sin, rows, columns, qkv, q, k, v);
        else if (bf16) rotate_token(1, 0, m, T, H, G, D, cos, sin, rows, NULL, qkv, q, k, v);
        else if (back) rotate_token(0, 1, m, T, H, G, D, cos, sin, rows, columns, qkv, q, k, v);
        else rotate_token(0, 0, m, T, H, G, D, cos, sin, rows, NULL, qkv, q, k, v);
    }
}

ALWAYS i16 lanes(void) { return (i16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

ALWAYS void softmax_row(const int bf16, char *s, int seen, int keys, float scale, float *buffer) {
    v16 most = all(-INFINITY), total = {0};
    for (int i = 0; i < seen; i += 16) {
        v16 v = choose((i16)(lanes() < seen - i), get(s + (bf16 ? 2 : 4) * i, bf16), all(-INFINITY));
        most = max16(most, v);
        store(buffer + i, v);
    }
    float top = max_of(most);
    for (int i = 0; i < seen; i += 16) {
        v16 v = load(buffer + i), e = choose((i16)(v > all(-INFINITY)), exp16((v - top) * scale), all(0.0f));
        total += e;
        store(buffer + i, e);
    }
    float inverse = 1.0f / sum_of(total);
    for (int i = 0; i < keys; i += 16) put(s + (bf16 ? 2 : 4) * i, i < seen ? load(buffer + i) * inverse : all(0.0f), bf16);
}

ALWAYS void softmax_back_row(const int bf16, const char *p, char *g, int seen, int keys, float scale) {
    v16 dot = {0};
    for (int i = 0; i < seen; i += 16) dot = fma16(get(p + (bf16 ? 2 : 4) * i, bf16), get(g + (bf16 ? 2 : 4) * i, bf16), dot);
    float along = sum_of(dot); /* p is 0 beyond `seen` */
    for (int i = 0; i < keys; i += 16) {
        v16 d = {0};
        if (i < seen) d = get(p + (bf16 ? 2 : 4) * i, bf16) * (get(g + (bf16 ? 2 : 4) * i, bf16) - along) * scale;
        put(g + (bf16 ? 2 : 4) * i, d, bf16);
    }
}

/* In place: scores (n, R, Q, keys) of queries first ... first + Q - 1 -> probabilities, each query seeing the keys up to
 * its own position; with `p` (the probabilities) their gradients -> those of the scores. keys: a multiple of 16. */
void fused_softmax(int bf16, int64_t n, int Q, int first, int keys, float scale, void *s, const void *p) {
#pragma omp parallel
    {
        float *buffer = aligned_alloc(64, sizeof(float) * (size_t)keys);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < n * Q; m++) {
            char *row = TO(s, m * keys);
            int seen = first + (int)(m % Q) + 1;
            if (p && bf16) softmax_back_row(1, AT(p, m * keys), row, seen, keys, scale);
            else if (p) softmax_back_row(0, AT(p, m * keys), row, seen, keys, scale);
            else if (bf16) softmax_row(1, row, seen, keys, scale, buffer);
            else softmax_row(0, row, seen, keys, scale, buffer);
        }
        free(buffer);
    }
}

/* ---------------------------------------------------------------- loss ------------------------------------------ */
ALWAYS v16 get_some(const char *p, int left, const int bf16) {
    if (left >= 16) return get(p, bf16);
    char bytes[64] = {0};
    memcpy(bytes, p, (size_t)left * (bf16 ? 2 : 4));
    return choose((i16)(lanes() < left), get(bytes, bf16), all(-INFINITY));
}

ALWAYS float cross_entropy_row(const int bf16, char *l, int V, int64_t target, float weight) {
    if (target < 0 || target >= V) return NAN;
    v16 most = all(-INFINITY), total = {0};
    for (int i = 0; i < V; i += 16) most = max16(most, get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16));
    float top = max_of(most), at_target = get_some(l + (bf16 ? 2 : 4) * target, 1, bf16)[0];
    for (int i = 0; i < V; i += 16) {
        v16 e = exp16(get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16) - top);
        total += i + 16 <= V ? e : choose((i16)(lanes() < V - i), e, all(0.0f));
    }
    float sum = sum_of(total);
    if (weight) { /* the gradient: softmax, less 1 at the target */
        float each = weight / sum;
        for (int i = 0; i < V; i += 16) {
            v16 g = exp16(get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16) - top) * each;
            if (target >= i && target < i + 16) g -= choose((i16)(lanes() == (int)(target - i)), all(weight), all(0.0f));
            if (i + 16 <= V) { put(l + (bf16 ? 2 : 4) * i, g, bf16); continue; }
            char bytes[64];
            put(bytes, g, bf16);
            memcpy(l + (bf16 ? 2 : 4) * i, bytes, (size_t)(V - i) * (bf16 ? 2 : 4));
        }
    }
    return logf(sum) + top - at_target;
}

/* losses (n) of logits (n, V), which with a weight become their gradients: weight * (softmax - 1 at the target). */
void fused_cross_entropy(int bf16, int64_t n, int V, void *logits, const int64_t *targets, float weight, float *losses) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < n; m++)
        losses[m] = bf16 ? cross_entropy_row(1, TO(logits, m * V), V, targets[m], weight)
                         : cross_entropy_row(0, TO(logits, m * V), V, targets[m], weight);
}

/* ---------------------------------------------------------------- layout ---------------------------------------- */
/* (A, B, C, D) values -> (A, C, B, D): heads beside tokens, or the way back. */
void fused_swap(int bf16, int64_t A, int B, int C, int D, const void *from, void *to) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < A * C; m++)
        for (int b = 0; b < B; b++)
            memcpy(TO(to, (m * B + b) * D), AT(from, ((m / C * B + b) * C + m % C) * D), (size_t)D * (bf16 ? 2 : 4));
}

/* bf16 (K, N) -> fp32 (N, K), a row divided by `columns` where they are given: the gradient of a weight. */
void fused_weight_grad(int K, int64_t N, const uint16_t *from, const float *columns, float *to) {
#pragma omp parallel for schedule(static)
    for (int64_t n0 = 0; n0 < N; n0 += 32)
        for (int k0 = 0; k0 < K; k0 += 32) {
            h32 tile[32];
            int64_t wide = N - n0 < 32 ? N - n0 : 32;
            int high = K - k0 < 32 ? K - k0 : 32;
            for (int k = 0; k < high; k++) memcpy(&tile[k], from + (k0 + k) * N + n0, 2 * (size_t)wide);
            turn(tile);
            for (int n = 0; n < wide; n++)
                for (int k = 0; k < high; k += 16) {
                    v16 v = get((char *)&tile[n] + 2 * k, 1);
                    store(to + (n0 + n) * K + k0 + k, columns ? v * (1.0f / columns[n0 + n]) : v);
                }
        }
}

/* ---------------------------------------------------------------- the ternary product --------------------------- */
/* Packed trits: [N / 16][K / 4][16][4], K padded with zeros to 64, so that 64 columns of 16 rows are a tile of AMX and 4
 * columns a line for `vpdpbusd`, which wants one side unsigned: there codes are trits + 1, and sum(x) is taken off. */
#if defined(__AMX_INT8__)
#define TRIT_OFFSET 0
#else
#define TRIT_OFFSET 1
#endif

/* w_trit = round(w * inverse) clamped to -1 ... 1, of w (rows, K), into the panels from row `first` (a multiple of 16). */
void fused_ternarize(int64_t rows, int K, const float *w, float inverse, int8_t *packed) {
    int Kp = up64(K);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < (rows + 15) / 16; panel++)
        for (int k = 0; k < Kp; k += 16)
            for (int r = 0; r < 16; r++) {
                v16 v = {0};
                if (k < K && 16 * panel + r < rows) v = load(w + (16 * panel + r) * K + k) * inverse;
                v = max16(min16(v, all(1.0f)), all(-1.0f)); /* clamped before it is rounded: the same trits */
                b16 t = __builtin_convertvector(__builtin_convertvector(round16(v), i16), b16) + TRIT_OFFSET;
                int8_t *to = packed + (panel * Kp + k) * 16 + 4 * r;
                for (int j = 0; j < 4; j++) memcpy(to + 64 * j, (int8_t *)&t + 4 * j, 4);
            }
}

/* Packed trits -> values (N, K) */
void fused_unpack_trits(int bf16, int64_t N, int K, const int8_t *packed, void *to) {
    int Kp = up64(K);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int k = 0; k < K; k += 16) {
            b16 t;
            for (int j = 0; j < 4; j++) memcpy((int8_t *)&t + 4 * j, packed + (n / 16 * Kp + k) * 16 + 64 * j + n % 16 * 4, 4);
            put(TO(to, n * K + k), tofloat(__builtin_convertvector((b16)(t - TRIT_OFFSET), i16)), bf16);
        }
}

#if ISA_AVX512
/* 16 sums as values: times their columns. */
ALWAYS void finish(const int bf16, i16 acc, const float *columns, char *y) { put(y, tofloat(acc) * load(columns), bf16); }
#endif

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
/* The system lends the tile registers to a process that asks. 0 where it does not: then torch multiplies. */
int fused_has_product(void) { return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

typedef struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;

/* 32 tokens times 32 columns: four tiles of sums, two of tokens, two of trits. */
ALWAYS void block(const int bf16, int tokens, int N, int n, int Kp, const int8_t *x, const int8_t *w0, const int8_t *w1,
                  const float *columns, char *y) {
    _Alignas(64) int32_t acc[4][16][16];
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int k = 0; k < Kp; k += 64) {
        _tile_loadd(6, w0 + 16 * k, 64);
        _tile_loadd(7, w1 + 16 * k, 64);
        _tile_loadd(4, x + k, Kp);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, x + 16 * Kp + k, Kp);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, acc[0], 64); _tile_stored(1, acc[1], 64); _tile_stored(2, acc[2], 64); _tile_stored(3, acc[3], 64);
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2 && n + 16 * half < N; half++)
            finish(bf16, loadi(acc[2 * (t / 16) + half][t % 16]), columns + n + 16 * half, y + (bf16 ? 2 : 4) * ((int64_t)t * N + n + 16 * half));
}

/* y (M, N) values = (x (M, Kp) @ trits.T) * columns; x has 31 rows more than M to be read, N is a multiple of 16. */
void fused_ternary_product(int bf16, int64_t M, int N, int K, const int8_t *x, const int8_t *packed, const float *columns, void *y) {
    int Kp = up64(K), group = (int64_t)N * Kp > 1 << 20 ? 64 : 32; /* tokens that use trits which come from beyond L2 */
#pragma omp parallel
    {
        tiles mine = {.palette = 1}, before;
        for (int i = 0; i < 8; i++) mine.bytes[i] = 64, mine.rows[i] = 16;
        _tile_storeconfig(&before);
        _tile_loadconfig(&mine);
#pragma omp for schedule(static)
        for (int64_t m0 = 0; m0 < M; m0 += group)
            for (int n = 0; n < N; n += 32)
                for (int64_t m = m0; m < m0 + group && m < M; m += 32) {
                    const int8_t *w0 = packed + (int64_t)n * Kp, *w1 = n + 16 < N ? w0 + 16 * Kp : w0;
                    int tokens = M - m < 32 ? (int)(M - m) : 32;
                    if (bf16) block(1, tokens, N, n, Kp, x + m * Kp, w0, w1, columns, TO(y, m * N));
                    else block(0, tokens, N, n, Kp, x + m * Kp, w0, w1, columns, TO(y, m * N));
                }
        if (before.palette) _tile_loadconfig(&before); /* torch may count on its own */
        else _tile_release();
    }
}

#elif ISA_AVX512
int fused_has_product(void) { return 1; }

/* T tokens times 32 columns, every sum in a register; sums (T) of x are taken off. */
ALWAYS void block(const int T, const int bf16, int N, int n, int Kp, const int8_t *x, const int8_t *w0, const int8_t *w1,
                  const int32_t *sums, const float *columns, char *y) {
    i16 acc[T][2];
#pragma GCC unroll 14
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = alli(-sums[t]);
    for (int k = 0; k < Kp; k += 4) {
        __m512i a = _mm512_loadu_si512(w0 + 16 * k), b = _mm512_loadu_si512(w1 + 16 * k);
#pragma GCC unroll 14
        for (int t = 0; t < T; t++) {
            int32_t four;
            memcpy(&four, x + (int64_t)t * Kp + k, 4);
            acc[t][0] = (i16)_mm512_dpbusd_epi32((__m512i)acc[t][0], a, _mm512_set1_epi32(four));
            acc[t][1] = (i16)_mm512_dpbusd_epi32((__m512i)acc[t][1], b, _mm512_set1_epi32(four));
        }
    }
#pragma GCC unroll 14
    for (int t = 0; t < T; t++)
        for (int half = 0; half < 2 && n + 16 * half < N; half++)
            finish(bf16, acc[t][half], columns + n + 16 * half, y + (bf16 ? 2 : 4) * ((int64_t)t * N + n + 16 * half));
}

void fused_ternary_product(int bf16, int64_t M, int N, int K, const int8_t *x, const int8_t *packed, const float *columns, void *y) {
    int Kp = up64(K);
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < (M + 13) / 14; m++) { /* the last tile reads rows beyond M and does not keep them */
        int tokens = M - 14 * m < 14 ? (int)(M - 14 * m) : 14;
        const int8_t *from = x + 14 * m * Kp;
        int32_t sums[14] = {0};
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < Kp; k += 16) {
                b16 b;
                memcpy(&b, from + (int64_t)t * Kp + k, 16);
                sums[t] += sum_ofi(__builtin_convertvector(b, i16));
            }
        for (int n = 0; n < N; n += 32) {
            const int8_t *w0 = packed + (int64_t)n * Kp, *w1 = n + 16 < N ? w0 + 16 * Kp : w0;
#define CASE(t) case t: if (bf16) block(t, 1, N, n, Kp, from, w0, w1, sums, columns, TO(y, 14 * m * N)); \
                        else block(t, 0, N, n, Kp, from, w0, w1, sums, columns, TO(y, 14 * m * N)); break;
            switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
                              CASE(12) CASE(13) CASE(14) }
#undef CASE
        }
    }
}
#else
int fused_has_product(void) { return 0; }
void fused_ternary_product(int bf16, int64_t M, int N, int K, const int8_t *x, const int8_t *packed, const float *columns, void *y) {
    (void)bf16, (void)M, (void)N, (void)K, (void)x, (void)packed, (void)columns, (void)y;
}
#endif
