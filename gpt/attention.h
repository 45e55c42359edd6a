/* What attention has between its products: rotation, softmax, heads beside tokens or tokens beside heads. */
#pragma once
#include "values.h"

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

/* (A, B, C, D) values -> (A, C, B, D): heads beside tokens, or the way back. */
void fused_swap(int bf16, int64_t A, int B, int C, int D, const void *from, void *to) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < A * C; m++)
        for (int b = 0; b < B; b++)
            memcpy(TO(to, (m * B + b) * D), AT(from, ((m / C * B + b) * C + m % C) * D), (size_t)D * (bf16 ? 2 : 4));
}
