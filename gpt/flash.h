/* Causal attention of grouped heads and its gradients: of the scores no more than a few rows are in memory at
 * a time, and backward computes them again (arXiv 2205.14135). There they stand transposed, a row a key, as
 * the sums over queries want. */
#pragma once
#include "matmul.h"

#define QUERIES 256 /* that gradients of keys are summed over at once */

typedef struct {
    int bf16, T, H, G, D;
    int64_t B;
    const float *cos, *sin;      /* (T, D / 2) */
    void *qkv;                   /* values (B T, (H + 2 G) D); forward rotates q and k in place (NeoX halves) */
    void *y;                     /* values (B T, H D) */
    float *lse;                  /* (B, H, T): logarithm of the sum that a softmax divides by */
    drop drop;                   /* of probabilities */
    const void *grad_y;          /* values, like y, but its rows an odd number of lines apart */
    void *grad_qkv;              /* the same of qkv, before its rotation and before the factors */
    const float *rows, *columns; /* which are these, or NULL */
} attention;

/* A head's row rotated by its position's angles, or back; values or, `from_floats`, fp32. */
ALWAYS void rotate(const int bf16, const int from_floats, const float sign, const char *from, char *to,
                   const float *cos, const float *sin, float row, const float *columns, int D) {
    int half = D / 2, in = from_floats ? 0 : bf16;
    for (int i = 0; i < half; i += LANES) {
        vf a = get(from + (in ? 2 : 4) * i, in), b = get(from + (in ? 2 : 4) * (i + half), in);
        if (cos) {
            vf c = load(cos + i), s = load(sin + i) * sign, first = a;
            a = first * c - b * s;
            b = b * c + first * s;
        }
        a *= row, b *= row;
        if (columns) a *= load(columns + i), b *= load(columns + half + i);
        put(TO(to, i), a, bf16);
        put(TO(to, i + half), b, bf16);
    }
}

ALWAYS vu places(const attention *a, int64_t head, int query, int key) {
    return (vu)splati((int32_t)((head * a->T + query) * a->T + key));
}

/* Scores of a query -> e^(scores - their maximum), values, zeros as far as `whole`. Returns 1 / their sum. */
ALWAYS float softmax(const int bf16, float *s, int seen, int whole, float scale, char *to, float *log_sum, drop d,
                     vu place) {
    vf most[WAYS], total[WAYS] = {{0}};
    int last = (seen - 1) / 16 * 16;
    for (int i = last; i < last + 16; i += LANES)
        store(s + i, blend((vi)(lanes() < seen - i), load(s + i), splat(-INFINITY)));
    EACH_WAY(u) most[u] = splat(-INFINITY);
    for (int i = 0; i < seen; i += 16)
        EACH_WAY(u) most[u] = maxv(most[u], load(s + i + LANES * u));
    float top = max_of(most);
    for (int first = 0; first < seen; first += 16)
        EACH_WAY(u) {
            int i = first + LANES * u;
            vf e = expv((load(s + i) - top) * scale);
            if (first == last) e = blend((vi)(lanes() < seen - i), e, splat(0.0f));
            total[u] += e;
            if (d.below) e = dropped(d, place + (vu)(lanes() + i), e);
            put(TO(to, i), e, bf16);
        }
    for (int i = last + 16; i < whole; i += LANES) put(TO(to, i), splat(0.0f), bf16);
    float sum = sum_of(total);
    *log_sum = top * scale + logf(sum);
    return 1.0f / sum;
}

/* One head of keys and values of one sequence, with all heads of queries that share it. */
ALWAYS void attend(const int bf16, const attention *a, int64_t b, int g, char *memory) {
    int T = a->T, D = a->D, high = words_of(bf16, D), deep = words_of(bf16, T), wide = (T + 31) / 32 * 32;
    int64_t W = (int64_t)(a->H + 2 * a->G) * D, C = (int64_t)a->H * D, row = W * (bf16 ? 2 : 4);
    char *k = TO(a->qkv, b * T * W + (a->H + g) * D), *v = TO(k, a->G * D);
    char *keys = memory, *values = keys + 4 * (size_t)T * high, *p = values + 4 * (size_t)D * deep;
    float *s = (float *)(void *)(p + 4 * (size_t)HIGH * deep);
    _Alignas(64) char acc[HIGH][128];
    for (int t = 0; t < T; t++)
        rotate(bf16, 0, 1.0f, k + t * row, k + t * row, a->cos + t * (D / 2), a->sin + t * (D / 2), 1.0f, NULL, D);
    for (int t = 0; t < T; t += 16) pack_rows(high, k + t * row, row, keys + 4 * (size_t)t * high);
    pack_columns(bf16, D / 16, T, deep, v, W, values, deep);
    for (int h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++) {
        int64_t head = b * a->H + h;
        char *q = TO(a->qkv, b * T * W + h * D);
        for (int t = 0; t < T; t++)
            rotate(bf16, 0, 1.0f, q + t * row, q + t * row, a->cos + t * (D / 2), a->sin + t * (D / 2), 1.0f, NULL, D);
        for (int first = 0; first < T; first += HIGH) {
            int rows = T - first < HIGH ? T - first : HIGH, panels = (first + rows + 15) / 16;
            float inverse[HIGH];
            for (int n = 0; n < panels; n += 2) {
                const char *w0 = keys + 64 * (size_t)n * high, *w1 = n + 1 < panels ? w0 + 64 * high : w0;
                multiply(bf16, rows, high, q + first * row, row, w0, w1, 0, (char *)(s + 16 * n), 4 * wide);
            }
            int words = words_of(bf16, first + rows);
            for (int t = 0; t < rows; t++)
                inverse[t] = softmax(bf16, s + (size_t)t * wide, first + t + 1, words << bf16, 1.0f / sqrtf((float)D),
                                     p + 4 * (size_t)t * deep, a->lse + head * T + first + t, a->drop,
                                     places(a, head, first + t, 0));
            for (int d = 0; d < D; d += 32) {
                const char *w0 = values + 4 * (size_t)d * deep, *w1 = w0 + 64 * (size_t)deep;
                multiply(bf16, rows, words, p, 4 * deep, w0, w1, 0, acc[0], 128);
                for (int t = 0; t < rows; t++) {
                    char *y = TO(a->y, (b * T + first + t) * C + h * D + d);
                    for (int i = 0; i < 32; i += LANES) put(TO(y, i), (vf)loadi(acc[t] + 4 * i) * inverse[t], bf16);
                }
            }
        }
    }
}


/* Probabilities of a key and their gradients, of queries from `query` on, out of scores and
 * gradients of what they weigh. */
ALWAYS void scores_back(const int masked, const attention *a, int64_t head, int query, int key, float scale,
                        const float *lse, const float *delta, vf *s, vf *g) {
    vf p = expv(fmav(*s, splat(scale), -load(lse + query)));
    if (masked) p = blend((vi)(lanes() >= key - query) & (vi)(lanes() < a->T - query), p, splat(0.0f));
    if (a->drop.below) {
        vu place = places(a, head, query, key) + (vu)(lanes() * a->T);
        *s = dropped(a->drop, place, p);
        *g = dropped(a->drop, place, *g);
    } else {
        *s = p;
    }
    *g = p * ((*g - load(delta + query)) * scale);
    if (masked) *g = blend((vi)(p > splat(0.0f)), *g, splat(0.0f));
}

/* HIGH keys from `first` on and QUERIES queries from `low` on, transposed: what each key weighs (p), what its
 * scores' gradients are (ds), values (HIGH, QUERIES); and those again in panels of queries, `deep` words
 * each, to be summed over keys. */
ALWAYS void keys_back(const int bf16, const attention *a, int64_t head, int first, int low, int end, const char *k,
                      const char *v, int64_t row, const char *queries, const char *grads, const float *lse,
                      const float *delta, char *p, char *ds, char *panels, int deep) {
    int rows = a->T - first < HIGH ? a->T - first : HIGH, high = words_of(bf16, a->D), all_panels = a->T / 16;
    float scale = 1.0f / sqrtf((float)a->D);
    _Alignas(64) char s[HIGH][128], g[HIGH][128];
    for (int n = (first > low ? first : low) / 32 * 2; n < (end + 15) / 16; n += 2) {
        const char *w0 = queries + 64 * (size_t)n * high, *g0 = grads + 64 * (size_t)n * high;
        int next = n + 1 < all_panels ? 64 * high : 0;
        multiply(bf16, rows, high, k + first * row, row, w0, w0 + next, 0, s[0], 128);
        multiply(bf16, rows, high, v + first * row, row, g0, g0 + next, 0, g[0], 128);
        const int masked = first + HIGH > 16 * n || 16 * n + 32 > a->T;
#define EACH(masked) \
        for (int column = 0; column < 32; column += LANES) { \
            int query = 16 * n + column, at = query - low; \
            char *panel = panels + 64 * (size_t)(at / 16 * deep) + 4 * (at % 16); \
            for (int t = 0; t < rows; t += 2) { \
                vs both[2]; \
                for (int i = 0; i < 2; i++) { \
                    vf weight = (vf)loadi(s[t + i] + 4 * column), grad = (vf)loadi(g[t + i] + 4 * column); \
                    scores_back(masked, a, head, query, first + t + i, scale, lse, delta, &weight, &grad); \
                    put(TO(p, (t + i) * QUERIES + at), weight, bf16); \
                    put(TO(ds, (t + i) * QUERIES + at), grad, bf16); \
                    if (bf16) put((char *)&both[i], grad, 1); \
                    else store((float *)(void *)panel + 16 * (first + t + i), grad); \
                } \
                if (bf16) pair(both[0], both[1], panel + 64 * (size_t)((first + t) / 2)); \
            } \
        }
        if (masked) EACH(1)
        else EACH(0)
#undef EACH
    }
}

/* (D, 16) of rows of 32 -> (16, D) */
ALWAYS void turn_head(int D, const char *from, char *to) {
    for (int d = 0; d < D; d += LANES)
        for (int t = 0; t < 16; t += LANES)
            transpose_block(from + 128 * (size_t)d + 4 * t, 128, to + 4 * (t * D + d), 4 * D);
}

/* to (rows, 32), D apart, += x (rows, QUERIES), `words` of each row, times two panels, `next` bytes from each other. */
ALWAYS void add_product(const int bf16, int rows, int words, const char *x, const char *panel, size_t next, float *to,
                        int D) {
    _Alignas(64) char acc[HIGH][128];
    multiply(bf16, rows, words, x, (bf16 ? 2 : 4) * QUERIES, panel, panel + next, 0, acc[0], 128);
    for (int t = 0; t < rows; t++, to += D)
        for (int i = 0; i < 32; i += LANES) store(to + i, load(to + i) + (vf)loadi(acc[t] + 4 * i));
}

ALWAYS void attend_back(const int bf16, const attention *a, int64_t b, int g, char *memory) {
    int T = a->T, D = a->D, high = words_of(bf16, D), deep = words_of(bf16, T), whole = deep << bf16;
    int64_t W = (int64_t)(a->H + 2 * a->G) * D, C = (int64_t)a->H * D, row = W * (bf16 ? 2 : 4);
    int64_t away = row_stride(bf16, C), wide = row_stride(bf16, W);
    char *k = TO(a->qkv, b * T * W + (a->H + g) * D), *v = TO(k, a->G * D);
    size_t square = 4 * (size_t)D * (size_t)deep, tall = 4 * (size_t)T * (size_t)high, some = 4 * HIGH * QUERIES;
    arena all = {memory, 0};
    char *transposed = arena_alloc(&all, square + 4 * HIGH * (size_t)deep);                  /* keys (D, T) */
    char *queries = arena_alloc(&all, tall), *grads = arena_alloc(&all, tall);               /* to be summed over D */
    char *queries_down = arena_alloc(&all, square), *grads_down = arena_alloc(&all, square); /* and over queries */
    char *p = arena_alloc(&all, some), *ds = arena_alloc(&all, some);
    char *panels = arena_alloc(&all, 4 * QUERIES * (size_t)deep);
    char *grad_q = arena_alloc(&all, 128 * (size_t)(D + HIGH)), *line = arena_alloc(&all, 64 * (size_t)D);
    float *grad_k = arena_alloc(&all, 4 * (size_t)T * (size_t)D);
    float *grad_v = arena_alloc(&all, 4 * (size_t)T * (size_t)D);
    float *lse = arena_alloc(&all, 4 * (size_t)(T + 16)); /* read in pairs of panels, as `delta` is */
    float *delta = arena_alloc(&all, 4 * (size_t)(T + 16));
    memset(transposed, 0, 4 * (size_t)(D + HIGH) * (size_t)deep);
    transpose_rows(bf16, T, D, k, W, transposed, whole);
    memset(grad_k, 0, 4 * (size_t)T * (size_t)D), memset(grad_v, 0, 4 * (size_t)T * (size_t)D);
    memset(panels, 0, 4 * (size_t)QUERIES * (size_t)deep);
    for (int h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++) {
        int64_t head = b * a->H + h;
        char *q = TO(a->qkv, b * T * W + h * D), *y = TO(a->y, b * T * C + h * D);
        const char *grad = AT(a->grad_y, b * T * away + h * D);
        for (int t = 0; t < T; t += 16) {
            pack_rows(high, q + t * row, row, queries + 4 * (size_t)t * high);
            pack_rows(high, AT(grad, t * away), away * (bf16 ? 2 : 4), grads + 4 * (size_t)t * high);
        }
        pack_columns(bf16, D / 16, T, deep, q, W, queries_down, deep);
        pack_columns(bf16, D / 16, T, deep, grad, away, grads_down, deep);
        memcpy(lse, a->lse + head * T, 4 * (size_t)T);
        for (int t = 0; t < T; t++) {
            vf sum[WAYS] = {{0}};
            for (int d = 0; d < D; d += 16)
                EACH_WAY(u) {
                    int i = d + LANES * u;
                    sum[u] = fmav(get(AT(y, t * C + i), bf16), get(AT(grad, t * away + i), bf16), sum[u]);
                }
            delta[t] = sum_of(sum);
        }
        for (int low = 0; low < T; low += QUERIES) {
            int end = T - low < QUERIES ? T : low + QUERIES;
            for (int first = 0; first < end; first += HIGH) {
                int rows = T - first < HIGH ? T - first : HIGH, start = (first > low ? first : low) / 32 * 32;
                int words = words_of(bf16, end - start);
                keys_back(bf16, a, head, first, low, end, k, v, row, queries, grads, lse, delta, p, ds, panels, deep);
                for (int d = 0; d < D; d += 32) {
                    size_t at = 4 * (size_t)d * deep + 64 * (size_t)(start >> bf16), next = 64 * (size_t)deep;
                    size_t to = (size_t)first * D + d;
                    add_product(bf16, rows, words, TO(p, start - low), grads_down + at, next, grad_v + to, D);
                    add_product(bf16, rows, words, TO(ds, start - low), queries_down + at, next, grad_k + to, D);
                }
            }
            for (int first = low; first < end; first += 32) {
                int last = first + 32 < T ? first + 32 : T, words = words_of(bf16, last);
                const char *panel = panels + 64 * (size_t)((first - low) / 16 * deep);
                for (int d = 0; d < D; d += HIGH)
                    multiply(bf16, D - d, words, transposed + 4 * (size_t)d * deep, 4 * deep, panel,
                             panel + 64 * (size_t)deep, 0, grad_q + 128 * (size_t)d, 128);
                for (int t = first; t < last; t++) {
                    if (t % 16 == 0) turn_head(D, grad_q + 4 * (t - first), line);
                    int64_t m = b * T + t;
                    rotate(bf16, 1, -1.0f, line + 4 * (size_t)(t % 16 * D), TO(a->grad_qkv, m * wide + h * D),
                           a->cos + t * (D / 2), a->sin + t * (D / 2), a->rows ? a->rows[m] : 1.0f,
                           a->columns ? a->columns + h * D : NULL, D);
                }
            }
        }
    }
    for (int64_t t = 0; t < T; t++) {
        int64_t m = b * T + t, at = (a->H + g) * D, behind = at + a->G * D;
        float by = a->rows ? a->rows[m] : 1.0f;
        rotate(bf16, 1, -1.0f, (char *)(grad_k + t * D), TO(a->grad_qkv, m * wide + at), a->cos + t * (D / 2),
               a->sin + t * (D / 2), by, a->columns ? a->columns + at : NULL, D);
        rotate(bf16, 1, 1.0f, (char *)(grad_v + t * D), TO(a->grad_qkv, m * wide + behind), NULL, NULL, by,
               a->columns ? a->columns + behind : NULL, D);
    }
}

/* Each group of heads of each sequence, with so many bytes of memory for a thread. */
ALWAYS void each_group(const attention *a, size_t bytes, const int back) {
    double start = omp_get_wtime();
#pragma omp parallel
    {
        char *memory = buffer_of(bytes);
        tiles before = begin_tiles();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->B * a->G; i++) {
            int64_t b = i / a->G;
            int g = (int)(i % a->G);
            if (back && a->bf16) attend_back(1, a, b, g, memory);
            else if (back) attend_back(0, a, b, g, memory);
            else if (a->bf16) attend(1, a, b, g, memory);
            else attend(0, a, b, g, memory);
        }
        end_tiles(before);
        free(memory);
    }
    since(ATTENTION, start);
}

static void attention_forward(const attention *a) {
    size_t high = (size_t)words_of(a->bf16, a->D), deep = (size_t)words_of(a->bf16, a->T), T = (size_t)a->T;
    each_group(a, 4 * (T * high + ((size_t)a->D + HIGH) * deep + HIGH * (T + 32)), 0);
}

static void attention_backward(const attention *a) {
    size_t high = (size_t)words_of(a->bf16, a->D), deep = (size_t)words_of(a->bf16, a->T);
    size_t T = (size_t)a->T, D = (size_t)a->D;
    each_group(a, 4 * ((D + HIGH) * deep + 2 * T * high + 2 * D * deep + 2 * HIGH * QUERIES + QUERIES * deep + 2 * T * D
                       + 2 * (T + 16) + 32 * (D + HIGH) + 16 * D) + 64 * 16, 1);
}
