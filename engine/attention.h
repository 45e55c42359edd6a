/* Rotary embeddings, the cache of keys and values (fp32 or bf16), attention: computed in fp32.
 * Neighbours: model.h (layouts), cpu.c (who calls this). */
#pragma once
#include "product.h"

/* RMSNorm over one head where wanted, rotation by position (half-rotation: i pairs with i + D/2), times a factor. */
static void rope(const model *m, float *x, int position, const float *weight, float factor) {
    int D = m->D, H = D / 2;
    const float *c = m->cos + (size_t)position * (size_t)H, *s = m->sin + (size_t)position * (size_t)H;
    if (weight) {
        float squares = 0;
        for (int i = 0; i < D; i++) squares += x[i] * x[i];
        float inverse = 1.0f / sqrtf(squares / (float)D + m->eps);
        for (int i = 0; i < D; i++) x[i] = x[i] * inverse * weight[i];
    }
    for (int i = 0; i < H; i++) {
        float a = x[i], b = x[i + H];
        x[i] = (a * c[i] - b * s[i]) * factor;
        x[i + H] = (b * c[i] + a * s[i]) * factor;
    }
}

/* The cache: 0 keys, 1 values. Memory fills from its beginning as a text grows, and is read in long runs. */
static size_t heads(const model *m) { return (size_t)m->c.n_layer * (size_t)m->batch * (size_t)m->c.n_kv_head; }
/* Where a head's values of a position begin, in numbers; its keys, for a multiple of 16. */
static size_t kv_at(const model *m, int which, int l, int b, int h, int position) {
    size_t head = (size_t)((l * m->batch + b) * m->c.n_kv_head + h);
    return (((size_t)(position / 64) * heads(m) + head) * 64 + (size_t)(position % 64)) * (size_t)m->width[which];
}
static size_t number_bytes(const model *m) { return m->c.kv_bf16 ? 2 : 4; }
static void *cached(const model *m, int which, size_t i) { return (uint8_t *)m->cache[which].p + number_bytes(m) * i; }

/* Two numbers as bf16 in a word: number i of 32 with number 16 + i, so that 16 words are unpacked
 * by a shift and a mask. */
static uint32_t pair(float low, float high) {
    uint32_t bits[2];
    memcpy(bits, &low, 4), memcpy(bits + 1, &high, 4);
    for (int i = 0; i < 2; i++)
        bits[i] = bits[i] << 1 > 0xff000000 ? 0x7fc0 : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
    return bits[0] | bits[1] << 16;
}

/* n numbers from number i on, as fp32; in `block` where they are kept as bf16. */
static const float *kv_read(const model *m, int which, size_t i, int n, float *block) {
    if (!m->c.kv_bf16) return cached(m, which, i);
    const uint8_t *words = cached(m, which, i);
    for (int at = 0; at < n; at += 32)
#pragma GCC unroll 4
        for (int u = 0; u < WAYS; u++) {
            vi v = loadi(words + 2 * at + 4 * LANES * u);
            store(block + at + LANES * u, (vf)(v << 16));
            store(block + at + 16 + LANES * u, (vf)(v & (int32_t)0xffff0000));
        }
    return block;
}

static void kv_append(const model *m, int l, int b, int h, int position, float *k, const float *v) {
    rope(m, k, position, m->layers[l].k_norm, 1.0f);
    int D = m->D, lane = position % 16;
    void *kto = cached(m, 0, kv_at(m, 0, l, b, h, position - lane));
    void *vto = cached(m, 1, kv_at(m, 1, l, b, h, position));
    if (m->c.kv_bf16) {
        uint32_t *kword = (uint32_t *)kto + lane, *vword = vto;
        for (int d = 0; d < D; d += 2) kword[8 * d] = pair(k[d], k[d + 1]);
        for (int d = 0; d < D; d += 32, vword += 16)
            for (int i = 0; i < 16 && d + i < D; i++) vword[i] = pair(v[d + i], d + 16 + i < D ? v[d + 16 + i] : 0.0f);
    } else {
        for (int d = 0; d < D; d++) ((float *)kto + lane)[16 * d] = k[d];
        memcpy(vto, v, sizeof(float) * (size_t)D);
    }
}

/* Registers of positions, or of values, a query. */
ALWAYS int registers(const int Q) { return LANES == 16 ? 4 : Q == 1 ? 8 : Q == 2 ? 4 : 2; }

/* The block that is read next, asked for little by little: a cache of bf16 is read in one go and then computed with,
 * for so long that memory would rest. (What is computed with where it lies is slower when it is asked for.) */
typedef struct { const uint8_t *at, *end; } upcoming;
ALWAYS void prefetch_step(upcoming *soon) {
    for (int i = 0; i < 2 && soon->at < soon->end; i++, soon->at += 64) __builtin_prefetch(soon->at, 0, 3);
}

/* Behind the `step` positions from j on of those up to `end`: the next ones or, behind the last keys, the values of the
 * same span and, behind its values, the next span's keys or, behind the last of `all` positions, the next head's. */
static upcoming next_block(const model *m, int which, int j, int step, int end, int all, int l, int b, int h) {
    int then = which, next = j + step;
    if (next >= end) {
        then = !which;
        if (!which) next = (end - 1) / SPAN * SPAN;
        else if (next >= all) next = 0, h++;
    }
    const uint8_t *p = cached(m, then, kv_at(m, then, l, b, h, next));
    return (upcoming){p, m->c.kv_bf16 ? p + number_bytes(m) * (size_t)(step * m->width[then]) : p};
}

/* scores (Q, R registers of positions), rows APART, of queries q and keys: each is one sum over d in order. */
ALWAYS void score_some(const int Q, const int R, int D, float *const *q, const float *k, float *scores,
                       upcoming *soon) {
    vf sum[QUERIES][8];
#pragma GCC unroll 6
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 8
        for (int u = 0; u < R; u++) sum[i][u] = (vf){0};
    for (int d = 0; d < D; d++) {
        prefetch_step(soon);
#pragma GCC unroll 8
        for (int u = 0; u < R; u++) {
            vf column = load(k + 16 * (size_t)(u / WAYS * D + d) + u % WAYS * LANES);
#pragma GCC unroll 6
            for (int i = 0; i < Q; i++) sum[i][u] = fmav(column, splat(q[i][d]), sum[i][u]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 8
        for (int u = 0; u < R; u++) store(scores + i * APART + LANES * u, sum[i][u]);
}

/* ... of the first n <= 64 positions of a block, and as few others as that takes: they may have to come from memory. */
ALWAYS void score(const int Q, int D, float *const *q, const float *k, int n, float *scores, upcoming soon) {
    const int U = registers(Q);
    for (int j = 0; j < n; j += U * LANES) {
        const float *at = k + j / 16 * (16 * D) + j % 16;
        if (n - j > U / 2 * LANES) score_some(Q, U, D, q, at, scores + j, &soon);
        else if (U == 2 || n - j > U / 4 * LANES) score_some(Q, U / 2, D, q, at, scores + j, &soon);
        else score_some(Q, U / 4, D, q, at, scores + j, &soon);
    }
}

/* sums (Q, Dp), rows Dp + TAIL, += weights (Q, n), rows APART, of a block of values, R registers of them: each goes
 * on over positions in order. */
ALWAYS void weigh_some(const int Q, const int R, int Dp, const float *weights, const float *v, int n, float *sums,
                       upcoming *soon) {
    vf sum[QUERIES][8];
#pragma GCC unroll 6
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 8
        for (int u = 0; u < R; u++) sum[i][u] = load(sums + i * (Dp + TAIL) + LANES * u);
    for (int j = 0; j < n; j++, v += Dp) {
        prefetch_step(soon);
#pragma GCC unroll 8
        for (int u = 0; u < R; u++) {
            vf value = load(v + LANES * u);
#pragma GCC unroll 6
            for (int i = 0; i < Q; i++) sum[i][u] = fmav(value, splat(weights[i * APART + j]), sum[i][u]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 8
        for (int u = 0; u < R; u++) store(sums + i * (Dp + TAIL) + LANES * u, sum[i][u]);
}

ALWAYS void weigh_rows(const int Q, int Dp, const float *weights, const float *v, int n, float *sums, upcoming *soon) {
    const int U = registers(Q);
    int d = 0;
    if (LANES == 16 && Q <= 2)
        for (; d + 8 * LANES <= Dp; d += 8 * LANES) weigh_some(Q, 8, Dp, weights, v + d, n, sums + d, soon);
    for (; d + U * LANES <= Dp; d += U * LANES) weigh_some(Q, U, Dp, weights, v + d, n, sums + d, soon);
    for (; d < Dp; d += LANES) weigh_some(Q, 1, Dp, weights, v + d, n, sums + d, soon);
}

/* The four queries of a token that share a head are taken by twos, whose sums leave registers for longer pieces of a
 * row: a piece of it at a time is not how memory is read fast. */
ALWAYS void weigh(const int Q, int Dp, const float *weights, const float *v, int n, float *sums, upcoming soon) {
    const int most = Q > 4 ? Q : 2;
    int i = 0;
    for (; i + most <= Q; i += most)
        weigh_rows(most, Dp, weights + i * APART, v, n, sums + i * (Dp + TAIL), &soon);
    if (i < Q) weigh_rows(1, Dp, weights + i * APART, v, n, sums + i * (Dp + TAIL), &soon);
}

/* Either of them, for 1 to QUERIES queries. */
static void score_or_weigh(int Q, bool keys, int D, float *const *q, const float *block, int n, float *scores,
                           float *sums, upcoming soon) {
#define CASE(Q) case Q: if (keys) score(Q, D, q, block, n, scores, soon); \
                        else weigh(Q, D, scores, block, n, sums, soon); \
                        break;
    switch (Q) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if QUERIES == 6
        CASE(5) CASE(6)
#endif
    }
#undef CASE
}

/* The first `seen` of s become e^(s - max), the others up to `most` an exact zero. Their sum, and the max. */
static void exponentials(float *s, int seen, int most, float *sum, float *max) {
    vf top[WAYS], total[WAYS] = {{0}};
    for (int u = 0; u < WAYS; u++) top[u] = splat(-INFINITY);
    for (int j = seen; j % 16; j++) s[j] = -INFINITY;
    for (int j = 0; j < seen; j += LANES) top[0] = maxv(top[0], load(s + j));
    *max = max_of(top);
    for (int j = 0; j < most; j += 16)
        for (int u = 0, at = j; u < WAYS; u++, at += LANES) {
            vf e = expv(load(s + at) - *max);
            if (at + LANES > seen) e = blend(lanes() < seen - at, e, (vf){0});
            store(s + at, e);
            total[u] += e;
        }
    *sum = sum_of(total);
}

/* Softmax is taken a span of positions at a time, and results of spans are merged in the order of positions, so that it
 * does not matter which threads computed them, or in how many chunks. A result is a row a query: the sum of the values,
 * weighted by e^(score - max), then the sum of the weights, then max. */
typedef struct {
    int n, seen[TOGETHER]; /* positions that each may look at */
    float *q[TOGETHER], *out[TOGETHER];
} queries;
static int spans(int positions) { return (positions + SPAN - 1) / SPAN; }
static int row_width(const model *m) { return m->width[1] + TAIL; }

/* From number i on, up to TOGETHER of the queries of tokens [t0, t1) of sequence b that share key head h: as many go
 * through a block of keys or values while it is in the L1 cache. */
static queries gather(const model *m, int b, int h, int t0, int t1, int i) {
    const int group = m->c.n_head / m->c.n_kv_head, D = m->D;
    queries to = {.n = 0};
    for (int t = t0 + i % (t1 - t0), head = h * group + i / (t1 - t0);
         to.n < TOGETHER && head < (h + 1) * group; to.n++) {
        to.seen[to.n] = m->from + t + 1;
        to.q[to.n] = m->qkv + (size_t)(b * m->T + t) * (size_t)m->QKV + head * D;
        to.out[to.n] = m->att + (size_t)(b * m->T + t) * (size_t)m->Cp + head * D;
        if (++t == t1) t = t0, head++;
    }
    return to;
}

/* Rows of the span that begins at position `from`; `all` positions are in the cache. A query that sees none gets
 * zeros. */
static void attend_span(const model *m, scratch *s, int l, int b, int h, const queries *x, int from, int all,
                        float *rows) {
    const int wide = m->width[1], row = row_width(m), end = all < from + SPAN ? all : from + SPAN;
    /* positions at a time: unpacked, 64 would be all that the L1 cache holds; for many queries they are worth it */
    const int step = m->c.kv_bf16 && x->n <= QUERIES ? 16 : 64;
    int most[TOGETHER / QUERIES] = {0}; /* of those whose sums are in registers together */
    for (int i = 0; i < x->n; i++) {
        int *of = &most[i / QUERIES], seen = x->seen[i] < end ? x->seen[i] - from : end - from;
        *of = *of > seen ? *of : seen;
    }
    memset(rows, 0, sizeof(float) * (size_t)(x->n * row));
    for (int which = 0; which < 2; which++) {
        if (which)
            for (int i = 0; i < x->n; i++) {
                int seen = x->seen[i] < end ? x->seen[i] - from : end - from;
                float *sum = rows + i * row + wide;
                if (seen > 0) exponentials(s->scores + i * APART, seen, most[i / QUERIES], sum, sum + 1);
                else if (most[i / QUERIES] > 0) memset(s->scores + i * APART, 0, sizeof(float) * SPAN);
            }
        for (int j = from; j < end; j += step) {
            int left = end - j < step ? end - j : step, read = which ? left : round_up(left, 16);
            upcoming soon = next_block(m, which, j, step, end, all, l, b, h);
            const float *block = kv_read(m, which, kv_at(m, which, l, b, h, j), read * m->width[which], s->block);
            for (int i = 0; i < x->n; i += QUERIES) {
                int Q = x->n - i < QUERIES ? x->n - i : QUERIES, of = most[i / QUERIES] - (j - from);
                if (of > 0) score_or_weigh(Q, !which, m->width[which], x->q + i, block, of < step ? of : step,
                                           s->scores + i * APART + (j - from), rows + i * row, soon);
                soon.end = soon.at; /* once is enough */
            }
        }
    }
}

/* Adds the span that begins at position `from` to what there is of those before it. The larger max stays, so
 * one of the two factors is 1. */
static void merge(const model *m, const queries *x, int from, float *rows, const float *more) {
    const int wide = m->width[1], row = row_width(m);
    for (int i = 0; i < x->n; i++, rows += row, more += row) {
        if (x->seen[i] <= from) continue;
        float rise = more[wide + 1] - rows[wide + 1], max = rise > 0 ? more[wide + 1] : rows[wide + 1];
        vf shrunk = expv(splat(-fabsf(rise))), a = rise > 0 ? shrunk : splat(1.0f), b = rise > 0 ? splat(1.0f) : shrunk;
        for (int d = 0; d < row; d += LANES) store(rows + d, fmav(load(more + d), b, load(rows + d) * a));
        rows[wide + 1] = max;
    }
}

static void write_out(const model *m, const queries *x, const float *rows) {
    for (int i = 0; i < x->n; i++, rows += row_width(m))
        for (int d = 0; d < m->D; d += LANES) {
            vf v = load(rows + d) * (1.0f / rows[m->width[1]]);
            memcpy(x->out[i] + d, &v, sizeof(float) * (size_t)(m->D - d < LANES ? m->D - d : LANES));
        }
}

static void attend(const model *m, scratch *s, int l, int b, int h, int t0, int t1) {
    for (int i = 0; i < m->c.n_head / m->c.n_kv_head * (t1 - t0); i += TOGETHER) {
        queries x = gather(m, b, h, t0, t1, i);
        for (int from = 0, all = m->from + t1; from < all; from += SPAN) {
            attend_span(m, s, l, b, h, &x, from, all, from ? s->more : s->rows);
            if (from) merge(m, &x, from, s->rows, s->more);
        }
        write_out(m, &x, s->rows);
    }
}

/* One span of a single token; the thread that is the last to finish one of this head merges them all. */
static void attend_part(model *m, scratch *s, int l, int unit, int span) {
    const int kv = m->c.n_kv_head, group = m->c.n_head / kv, b = unit / kv, h = unit % kv;
    const int all = m->from + 1, n = spans(all);
    const size_t row = (size_t)row_width(m);
    float *rows = (float *)m->parts.p + (size_t)unit * (size_t)spans(m->S) * (size_t)group * row;
    for (int i = 0; i < group; i += TOGETHER) {
        queries x = gather(m, b, h, 0, 1, i);
        attend_span(m, s, l, b, h, &x, span * SPAN, all, rows + (size_t)(span * group + i) * row);
    }
    atomic_int *done = (atomic_int *)m->done.p + unit;
    if (atomic_fetch_add_explicit(done, 1, memory_order_acq_rel) < n - 1) return;
    atomic_store_explicit(done, 0, memory_order_relaxed); /* for the next layer, behind a barrier */
    for (int i = 0; i < group; i += TOGETHER) {
        queries x = gather(m, b, h, 0, 1, i);
        for (int k = 1; k < n; k++)
            merge(m, &x, k * SPAN, rows + (size_t)i * row, rows + (size_t)(k * group + i) * row);
        write_out(m, &x, rows + (size_t)i * row);
    }
}

static void attention(model *m, int l, int tid) {
    int heads = m->c.n_head, kv = m->c.n_kv_head, group = heads / kv, D = m->D, n = m->threads.n;
    int kat = round_up(heads * D, 16), vat = kat + round_up(kv * D, 16), units = m->batch * kv;
    int parts = m->T == 1 ? spans(m->from + 1) : 1; /* of a single token: threads share the spans of a head */
    bool alone = m->T == 1 && (parts == 1 || n == 1);
    float factor = 1.0f / sqrtf((float)D);
    for (int unit = part_of(units, tid, n); unit < part_of(units, tid + 1, n); unit++) {
        int b = unit / kv, h = unit % kv;
        for (int t = 0; t < m->T; t++) {
            float *row = m->qkv + (size_t)(b * m->T + t) * (size_t)m->QKV;
            for (int g = 0; g < group; g++)
                rope(m, row + (h * group + g) * D, m->from + t, m->layers[l].q_norm, factor);
            kv_append(m, l, b, h, m->from + t, row + kat + h * D, row + vat + h * D);
        }
        if (alone) attend(m, &m->own[tid], l, b, h, 0, 1);
    }
    if (alone) return;
    barrier(&m->threads, tid);
    int tiles = (m->T + TOGETHER - 1) / TOGETHER;
    share mine = begin(&m->threads, tid, units * tiles * parts, true);
    for (int i; take(&mine, 1, &i);) {
        if (m->T == 1) { attend_part(m, &m->own[tid], l, i / parts, i % parts); continue; }
        int tile = tiles - 1 - i / units, t1 = TOGETHER * (tile + 1); /* the longest first */
        attend(m, &m->own[tid], l, i % units / kv, i % kv, TOGETHER * tile, t1 < m->T ? t1 : m->T);
    }
}
