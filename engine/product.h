/* Quantized tokens times packed matrices: pairs of panels, handed out to the threads, results scaled and stored.
 * Neighbours: kernels.h (the integers), activation.h (the tokens), cpu.c (the order of products). */
#pragma once
#include "activation.h"

/* fp32 tokens times a panel of bf16: even and odd columns have a sum each, in order, whatever T is. */
ALWAYS void fdot(const int T, const int P, const uint8_t *const *w, int groups, const float *x, float *acc) {
    v16 even[FTOKENS][2], odd[FTOKENS][2];
    for (int t = 0; t < T; t++) for (int p = 0; p < P; p++) even[t][p] = odd[t][p] = (v16){0};
    for (int i = 0; i < groups; i++, x += 2 * T) {
        v16 low[2], high[2];
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            i16 v = loadi(w[p] + 64 * (size_t)i);
            __builtin_prefetch(w[p] + 64 * (size_t)i + 4096);
            low[p] = (v16)(v << 16);
            high[p] = (v16)(v & (int32_t)0xffff0000);
        }
#pragma GCC unroll 6
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) {
                even[t][p] = fma16(low[p], all(x[t]), even[t][p]);
                odd[t][p] = fma16(high[p], all(x[T + t]), odd[t][p]);
            }
    }
    for (int t = 0; t < T; t++) for (int p = 0; p < P; p++) store(acc + 32 * t + 16 * p, even[t][p] + odd[t][p]);
}

static void fgemm(int T, const uint8_t *const *w, int groups, const float *x, float *acc) {
#define CASE(n) case n: fdot(n, 2, w, groups, x, acc); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* Where the sums of a row of activations times one of the two panels of a pair stand in acc. */
static int32_t *acc_at(int32_t *acc, const activation *a, int row, int which) {
    if (GEMM_PANELS == 2) return acc + 32 * row + 16 * which;
    int tiles = (a->rows + a->T - 1) / a->T;
    return acc + (size_t)which * (size_t)(16 * tiles * a->T) + 16 * row;
}

/* All rows of `a` times panel p0 of w0 and panel p1 of w1 (of equal kind and width), into s->acc or s->facc. */
static void pair_product(const matrix *w0, int p0, const matrix *w1, int p1, const activation *a, scratch *s) {
    int kind = w0->kind, groups = w0->groups;
    size_t bytes = (size_t)groups * (size_t)BYTES[kind];
    const uint8_t *w[2] = {w0->w + (size_t)p0 * bytes, w1->w + (size_t)p1 * bytes};
    int tiles = (a->rows + a->T - 1) / a->T;
    if (kind == BF16) {
        for (int i = 0; i < tiles; i++)
            fgemm(a->T, w, groups, a->f + (size_t)i * (size_t)(4 * a->k4 * a->T), s->facc + 32 * i * a->T);
        return;
    }
    if (a->rows <= FEW_ROWS) {
        int32_t acc[FEW * ROWS];
        for (int which = 0; which < 2; which++)
            for (int i = 0; i < tiles; i++) {
                dot(kind, a->T, w[which], groups, a->x + (size_t)i * (size_t)a->k4 * (size_t)(4 * a->T), acc);
                for (int t = 0; t < a->T; t++) memcpy(acc_at(s->acc, a, i * a->T + t, which), acc + ROWS * t, 64);
            }
        return;
    }
    memset(s->acc, 0, sizeof(int32_t) * 32 * (size_t)(tiles * a->T));
    int pieces = (groups * COLS[kind] + EXPAND_COLS - 1) / EXPAND_COLS, piece = (groups + pieces - 1) / pieces;
    for (int which = 0; which < 2; which += GEMM_PANELS)
        for (int from = 0; from < groups; from += piece) {
            int n = groups - from < piece ? groups - from : piece, k4 = n * COLS[kind] / 4;
            for (int p = 0; p < GEMM_PANELS; p++)
                expand(kind, w[which + p] + (size_t)from * (size_t)BYTES[kind], n, s->expanded + 64 * p);
            for (int i = 0; i < tiles; i++)
                gemm(kind, a->T, s->expanded,
                     a->x + ((size_t)i * (size_t)a->k4 + (size_t)(from * COLS[kind] / 4)) * (size_t)(4 * a->T), k4,
                     acc_at(s->acc, a, i * a->T, which));
        }
}

/* Scaled results of token t, 16 rows of the matrix: acc_i32 * x_scale * w_scale. */
ALWAYS v16 result(const activation *a, scratch *s, int t, int which, const matrix *w, int panel) {
    if (w->kind == BF16) return load(s->facc + 32 * t + 16 * which);
    v16 scale = load(w->scale + ROWS * panel);
    if (a->limbs == 1)
        return tofloat(loadi(acc_at(s->acc, a, t, which)) - OFFSET[w->kind] * a->sum[t]) * a->scale[t] * scale;
    v16 high = tofloat(loadi(acc_at(s->acc, a, 2 * t, which)) - OFFSET[w->kind] * a->sum[2 * t]);
    v16 low = tofloat(loadi(acc_at(s->acc, a, 2 * t + 1, which)) - OFFSET[w->kind] * a->sum[2 * t + 1]);
    return fma16(high, all(254.0f), low) * a->scale[t] * scale;
}

ALWAYS v16 activate(int relu2, v16 x) {
    if (relu2) { x = max16(x, (v16){0}); return x * x; }
    return x / (exp16(-x) + 1.0f);
}

enum mode { STORE, ADD, GATE };

/* Units of work for one thread. Small phases are split once and for all (each core finds its part of the weights in its
 * own cache); large ones are handed out in pieces that shrink with what is left, so that a slow core holds nobody up. */
typedef struct { int n, threads, at, end; atomic_int *next; } share;

static share begin(int n, bool shared, atomic_int *next, int tid, int threads) {
    if (threads > 1 && shared) return (share){n, threads, 0, 0, next};
    return (share){n, threads, (int)((int64_t)n * tid / threads), (int)((int64_t)n * (tid + 1) / threads), NULL};
}
static bool take(share *s, int *unit) {
    if (s->at >= s->end) {
        if (!s->next) return false;
        int at = atomic_load_explicit(s->next, memory_order_relaxed), piece;
        do {
            if (at >= s->n) return false;
            piece = (s->n - at) / (2 * s->threads);
            piece = piece < 1 ? 1 : piece;
        } while (!atomic_compare_exchange_weak_explicit(s->next, &at, at + piece, memory_order_relaxed, memory_order_relaxed));
        s->at = at;
        s->end = at + piece;
    }
    *unit = s->at++;
    return true;
}

/* y[t][columns of each matrix one after the other] (= or += ) a times the matrices; GATE: y = act(w[0] a) * (w[1] a). */
static void product(const matrix *const *w, int n, const activation *a, scratch *s, pool *threads, int tid,
                    atomic_int *next, enum mode mode, int relu2, float *y, int stride, int limit) {
    int pairs[3] = {0}, total = 0;
    size_t bytes = 0;
    for (int i = 0; i < n; i++) {
        pairs[i] = (w[i]->panels + 1) / 2;
        total += pairs[i];
        bytes += (size_t)w[i]->panels * (size_t)w[i]->groups * (size_t)BYTES[w[i]->kind];
    }
    if (mode == GATE) total = w[0]->panels;
    share mine = begin(total, a->rows > FEW_ROWS || bytes > 1 << 20, next, tid, threads->n);
    for (int unit; take(&mine, &unit);) {
        if (mode == GATE) {
            pair_product(w[0], unit, w[1], unit, a, s);
            for (int t = 0; t < a->tokens; t++)
                store(y + (size_t)t * (size_t)stride + ROWS * unit,
                      activate(relu2, result(a, s, t, 0, w[0], unit)) * result(a, s, t, 1, w[1], unit));
            continue;
        }
        int i = 0, before = 0;
        while (unit >= pairs[i]) { unit -= pairs[i]; before += ROWS * w[i]->panels; i++; }
        int p0 = 2 * unit, p1 = p0 + 1 < w[i]->panels ? p0 + 1 : p0;
        pair_product(w[i], p0, w[i], p1, a, s);
        for (int which = 0; which <= p1 - p0; which++) {
            int at = before + ROWS * (p0 + which);
            for (int t = 0; t < a->tokens; t++) {
                v16 v = result(a, s, t, which, w[i], p0 + which);
                float *to = y + (size_t)t * (size_t)stride + at;
                if (mode == ADD) v += load(to);
                if (at + ROWS <= limit) store(to, v);
                else memcpy(to, &v, sizeof(float) * (size_t)(limit - at));
            }
        }
    }
}
