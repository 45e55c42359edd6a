/* Quantized tokens times packed matrices: pairs of panels, handed out to the threads, results scaled and stored.
 * Neighbours: integers.h (the integers), activation.h (the tokens), cpu.c (the order of products). */
#pragma once
#include "activation.h"

/* fp32 tokens times registers `from` ... `from` + R - 1 of those that lines of two panels of bf16 take: even and odd
 * columns have a sum each, in order, whatever T is. */
ALWAYS void fdot(const int T, const int from, const int R, const uint8_t *const *w, int groups, enum prefetch how,
                 const float *x, float *acc) {
    vf even[FTOKENS][2 * WAYS], odd[FTOKENS][2 * WAYS];
    for (int t = 0; t < T; t++) for (int r = 0; r < R; r++) even[t][r] = odd[t][r] = (vf){0};
    for (int i = 0; i < groups; i++, x += 2 * T) {
        vf low[2 * WAYS], high[2 * WAYS];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const uint8_t *line = w[(from + r) / WAYS] + 64 * (size_t)i;
            vi v = loadi(line + 4 * LANES * ((from + r) % WAYS));
            if ((from + r) % WAYS == 0) prefetch(line, how);
            low[r] = (vf)(v << 16);
            high[r] = (vf)(v & (int32_t)0xffff0000);
        }
#pragma GCC unroll 6
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                even[t][r] = fmav(low[r], splat(x[t]), even[t][r]);
                odd[t][r] = fmav(high[r], splat(x[T + t]), odd[t][r]);
            }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) store(acc + 32 * t + LANES * (from + r), even[t][r] + odd[t][r]);
}

static void fgemm(int T, const uint8_t *const *w, int groups, enum prefetch how, const float *x, float *acc) {
/* all at once where their sums stay in registers */
#define CASE(n) case n: \
        if (n == 1 || WAYS == 1) fdot(n, 0, 2 * WAYS, w, groups, how, x, acc); \
        else for (int r = 0; r < 2 * WAYS; r++) fdot(n, r, 1, w, groups, how, x, acc); \
        break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* acc += all rows of `a`, k columns of them behind the first `from`, times GEMM_PANELS expanded panels; in tiles of AMX
 * acc is set where `from` is 0. */
static void multiply(int kind, const activation *a, int from, int k, const uint8_t *e, int32_t *acc) {
#if ISA_AMX
    if (a->W == 64) {
        for (int i = 0; i < a->tiles; i += 2) /* a last tile of columns ends in zeros, whatever `e` has there */
            gemm_tiles(i + 1 < a->tiles, e, tile_at(a, i, from), (size_t)(a->k * a->T), round_up(k, 64), from > 0,
                       acc + 32 * 16 * i);
        return;
    }
#endif
    for (int i = 0; i < a->tiles; i++) gemm(kind, a->T, e, tile_at(a, i, from), k / 4, acc + 32 * i * a->T);
}

/* All rows of `a` times two panels, into acc or, for bf16, facc. */
static void pair_product(int kind, int groups, const uint8_t *const *w, const activation *a, scratch *s, int32_t *acc,
                         float *facc) {
    if (kind == BF16) {
        for (int i = 0; i < a->tiles; i++)
            fgemm(a->T, w, groups, a->how, a->f + (size_t)i * (size_t)(a->k * a->T), facc + 32 * i * a->T);
        return;
    }
    if (a->rows <= FEW_ROWS) {
        for (int i = 0; i < a->tiles; i++)
            dot(kind, a->T, w, groups, a->how, tile_at(a, i, 0), acc + 32 * i * a->T);
        return;
    }
    if (a->W == 4) memset(acc, 0, sizeof(int32_t) * 32 * (size_t)(a->tiles * a->T));
    /* in pieces of whole groups and of whole tiles */
    int cols = groups * COLS[kind], pieces = (cols + EXPAND_COLS - 1) / EXPAND_COLS;
    int piece = round_up((cols + pieces - 1) / pieces, 320) / COLS[kind];
    for (int which = 0; which < 2; which += GEMM_PANELS)
        for (int from = 0; from < groups; from += piece) {
            int n = groups - from < piece ? groups - from : piece;
            for (int p = 0; p < GEMM_PANELS; p++)
                expand(kind, w[which + p] + (size_t)from * (size_t)BYTES[kind], n, s->expanded + 64 * p);
            multiply(kind, a, from * COLS[kind], n * COLS[kind], s->expanded, acc + ROWS * which);
        }
}

/* Results of token t, a register of rows of a matrix: acc_i32 * x_scale * w_scale; of bf16, what is in facc. */
ALWAYS vf result(const activation *a, int t, int kind, vf scale, const int32_t *acc, const float *facc) {
    if (kind == BF16) return load(facc + 32 * t);
    if (a->limbs == 1) return tofloat(loadi(acc + 32 * t) - OFFSET[kind] * a->sum[t]) * a->scale[t] * scale;
    vf high = tofloat(loadi(acc + 64 * t) - OFFSET[kind] * a->sum[2 * t]);
    vf low = tofloat(loadi(acc + 64 * t + 32) - OFFSET[kind] * a->sum[2 * t + 1]);
    return fmav(high, splat(254.0f), low) * a->scale[t] * scale;
}

ALWAYS vf activate(int relu2, vf x) {
    if (relu2) { x = maxv(x, (vf){0}); return x * x; }
    return x / (expv(-x) + 1.0f);
}

enum mode { STORE, ADD, GATE };

/* Columns of a row that has `limit`: logits are not padded. */
ALWAYS void put(float *row, int from, int limit, enum mode mode, vf v) {
    if (from + LANES <= limit) {
        store(row + from, mode == ADD ? v + load(row + from) : v);
    } else if (from < limit) {
        float last[LANES]; /* not v itself: a vector whose address is taken goes through memory every time */
        store(last, v);
        memcpy(row + from, last, sizeof(float) * (size_t)(limit - from));
    }
}

/* Pairs of panels whose sums wait in the scratch memory: number i is panel[h] + i of matrix of[h], and its results
 * belong to panel at[h] + i of a row of y. */
typedef struct { const matrix *of[2]; int panel[2], at[2], pairs; } run;

ALWAYS vf scales(const run *r, int h, int i, int lane) {
    return load(r->of[h]->scale + r->of[h]->step * (r->panel[h] + i) + lane);
}

/* Scales the sums of a run and stores them: at two places of y, or one after GATE and where at[1] lies beyond it. */
static void finish(const run *r, const activation *a, const scratch *s, enum mode mode, int relu2, float *y, int stride,
                   int limit) {
    const int each = 32 * a->tiles * a->T;
    for (int i = 0; i < r->pairs; i++) {
        const int32_t *acc = s->acc + i * each;
        const float *facc = s->facc + i * each;
        const int kind = r->of[0]->kind, to[2] = {ROWS * (r->at[0] + i), ROWS * (r->at[1] + i)};
        for (int lane = 0; lane < ROWS; lane += LANES, acc += LANES, facc += LANES) {
            vf scale[2] = {scales(r, 0, i, lane), scales(r, 1, i, lane)};
            for (int t = 0; t < a->tokens; t++) {
                float *row = y + (size_t)t * (size_t)stride;
                vf one = result(a, t, kind, scale[0], acc, facc);
                vf two = result(a, t, kind, scale[1], acc + ROWS, facc + ROWS);
                put(row, to[0] + lane, limit, mode, mode == GATE ? activate(relu2, one) * two : one);
                if (mode != GATE && to[1] < limit) put(row, to[1] + lane, limit, mode, two);
            }
        }
    }
}

/* y[t][columns of each matrix one after the other] (= or +=) a times the matrices; GATE: y = act(w[0] a) * (w[1] a).
 *
 * A thread multiplies two panels at a time that lie far apart, the first and the second half of its part of the
 * matrices (GATE: one of each matrix), so that it reads two long streams: a core has more lines under way than from
 * one. Sums of many pairs wait in the L1 cache, to be scaled and stored together: a line of scales or results that is
 * touched by itself among the weights costs as much as twenty lines of them. */
static void product(const matrix *const *w, int n, const activation *a, scratch *s, pool *threads, int tid,
                    enum mode mode, int relu2, float *y, int stride, int limit) {
    const int kind = w[0]->kind, groups = w[0]->groups, each = 32 * a->tiles * a->T;
    const int most = 32 * SUMS > each ? 32 * SUMS / each : 1;
    const size_t bytes = (size_t)groups * (size_t)BYTES[kind];
    int total = 0;
    for (int i = 0; i < n; i++) total += w[i]->panels;
    const bool many = (size_t)total * bytes > 1 << 20;
    share mine = begin(threads, tid, (total + 1) / 2, many || a->rows > FEW_ROWS);
    run r = {.pairs = 0};
    tiles before = {0};
    if (a->W == 64) before = begin_tiles();
    for (int unit, taken, pairs; (taken = take(&mine, most - r.pairs, &unit));)
        for (; taken; unit += pairs, taken -= pairs) { /* as long as both streams stay in one matrix */
            int at0 = mode == GATE ? unit : unit + mine.from, at1 = mode == GATE ? unit : unit + mine.end;
            int i0 = 0, i1 = mode == GATE;
            int panel0 = at0, panel1 = at1 < total ? at1 : at0; /* a last one by itself: twice */
            while (panel0 >= w[i0]->panels) panel0 -= w[i0++]->panels;
            while (panel1 >= w[i1]->panels) panel1 -= w[i1++]->panels;
            int left0 = w[i0]->panels - panel0, left1 = w[i1]->panels - panel1;
            pairs = taken < left0 ? taken : left0;
            if (pairs > left1) pairs = left1;
            if (w[i0] != r.of[0] || w[i1] != r.of[1] || at0 != r.at[0] + r.pairs || at1 != r.at[1] + r.pairs) {
                finish(&r, a, s, mode, relu2, y, stride, limit);
                r.of[0] = w[i0], r.of[1] = w[i1], r.panel[0] = panel0, r.panel[1] = panel1;
                r.at[0] = at0, r.at[1] = at1, r.pairs = 0;
            }
            const uint8_t *p[2] = {w[i0]->w + (size_t)panel0 * bytes, w[i1]->w + (size_t)panel1 * bytes};
            for (int i = 0; i < pairs; i++, r.pairs++, p[0] += bytes, p[1] += bytes)
                pair_product(kind, groups, p, a, s, s->acc + r.pairs * each, s->facc + r.pairs * each);
            if (r.pairs == most || !many) { /* in caches nothing is to be waited for */
                finish(&r, a, s, mode, relu2, y, stride, limit);
                r.at[0] += r.pairs, r.at[1] += r.pairs, r.panel[0] += r.pairs, r.panel[1] += r.pairs, r.pairs = 0;
            }
        }
    finish(&r, a, s, mode, relu2, y, stride, limit);
    if (a->W == 64) end_tiles(before);
}
