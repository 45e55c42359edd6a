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
            AHEAD(w[p] + 64 * (size_t)i);
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
        for (int i = 0; i < tiles; i++)
            dot(kind, a->T, w, groups, a->x + (size_t)i * (size_t)a->k4 * (size_t)(4 * a->T), s->acc + 32 * i * a->T);
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
                     s->acc + 32 * i * a->T + ROWS * which);
        }
}

/* Scaled results of token t, 16 rows of the matrix: acc_i32 * x_scale * w_scale. */
ALWAYS v16 result(const activation *a, scratch *s, int t, int which, const matrix *w, int panel) {
    if (w->kind == BF16) return load(s->facc + 32 * t + ROWS * which);
    v16 scale = load(w->scale + w->step * panel);
    if (a->limbs == 1)
        return tofloat(loadi(s->acc + 32 * t + ROWS * which) - OFFSET[w->kind] * a->sum[t]) * a->scale[t] * scale;
    v16 high = tofloat(loadi(s->acc + 64 * t + ROWS * which) - OFFSET[w->kind] * a->sum[2 * t]);
    v16 low = tofloat(loadi(s->acc + 64 * t + 32 + ROWS * which) - OFFSET[w->kind] * a->sum[2 * t + 1]);
    return fma16(high, all(254.0f), low) * a->scale[t] * scale;
}

ALWAYS v16 activate(int relu2, v16 x) {
    if (relu2) { x = max16(x, (v16){0}); return x * x; }
    return x / (exp16(-x) + 1.0f);
}

enum mode { STORE, ADD, GATE };

/* y[t][columns of each matrix one after the other] (= or += ) a times the matrices; GATE: y = act(w[0] a) * (w[1] a).
 *
 * A thread multiplies two panels at a time that lie far apart, the first and the second half of its part of the matrices
 * (GATE: one of each matrix), so that it reads two long streams: a core has more lines under way than from one. */
static void product(const matrix *const *w, int n, const activation *a, scratch *s, pool *threads, int tid,
                    enum mode mode, int relu2, float *y, int stride, int limit) {
    int total = 0;
    for (int i = 0; i < n; i++) total += w[i]->panels;
    bool large = a->rows > FEW_ROWS || (size_t)total * (size_t)w[0]->groups * (size_t)BYTES[w[0]->kind] > 1 << 20;
    share mine = begin(threads, tid, (total + 1) / 2, large);
    for (int unit; take(&mine, &unit);) {
        int at[2] = {unit + mine.from, unit + mine.end}, panel[2], pairs = mode == GATE || at[1] < total ? 2 : 1;
        const matrix *of[2];
        for (int h = 0; h < 2; h++) {
            int i = 0, p = at[h < pairs ? h : 0];
            while (p >= w[i]->panels) p -= w[i++]->panels;
            of[h] = mode == GATE ? w[h] : w[i], panel[h] = mode == GATE ? unit : p;
        }
        pair_product(of[0], panel[0], of[1], panel[1], a, s);
        for (int t = 0; t < a->tokens; t++) {
            float *row = y + (size_t)t * (size_t)stride;
            if (mode == GATE) {
                store(row + ROWS * unit, activate(relu2, result(a, s, t, 0, w[0], unit)) * result(a, s, t, 1, w[1], unit));
                continue;
            }
            for (int h = 0; h < pairs; h++) {
                v16 v = result(a, s, t, h, of[h], panel[h]);
                float *to = row + ROWS * at[h];
                if (mode == ADD) v += load(to);
                if (ROWS * at[h] + ROWS <= limit) store(to, v);
                else memcpy(to, &v, sizeof(float) * (size_t)(limit - ROWS * at[h]));
            }
        }
    }
}
