/* Rotary embeddings, the cache of keys and values, attention: all in fp32.
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

/* The first 64 positions of a head's keys or values; the next 64 are `heads` times as far as they are long. Memory fills
 * from its beginning as a text grows, and is read in long runs. */
static size_t heads(const model *m) { return (size_t)m->c.n_layer * (size_t)m->batch * (size_t)m->c.n_kv_head; }
static size_t head_at(const model *m, int l, int b, int h) { return (size_t)((l * m->batch + b) * m->c.n_kv_head + h); }
static float *keys(const model *m, int l, int b, int h) { return m->kcache + head_at(m, l, b, h) * (size_t)(64 * m->D); }
static float *values(const model *m, int l, int b, int h) { return m->vcache + head_at(m, l, b, h) * (size_t)(64 * m->Dp); }

static void remember(const model *m, int l, int b, int h, int position, float *k, const float *v) {
    size_t block = (size_t)(position / 64) * heads(m) * 64;
    rope(m, k, position, m->layers[l].k_norm, 1.0f);
    float *kto = keys(m, l, b, h) + block * (size_t)m->D + position % 64 / 16 * (16 * m->D) + position % 16;
    for (int d = 0; d < m->D; d++) kto[16 * d] = k[d];
    memcpy(values(m, l, b, h) + block * (size_t)m->Dp + position % 64 * m->Dp, v, sizeof(float) * (size_t)m->D);
}

/* Q queries, of which number i sees seen[i] positions, against one head's keys and values. Each score is one sum over
 * d in order, each output one over positions in order; what is masked adds an exact zero. */
ALWAYS void attend(const model *m, const int Q, float *const *q, const int *seen, const float *K, const float *V,
                   float *scores, float *const *out) {
    /* registers of positions, or of values, a query */
    const int U = LANES == 16 ? 4 : Q == 1 ? 8 : Q == 2 ? 4 : 2, WIDE = U * LANES;
    int D = m->D, Dp = m->Dp, most = seen[0];
    const size_t kblock = heads(m) * (size_t)(64 * D), vblock = heads(m) * (size_t)(64 * Dp);
    float inverse[QUERIES];
    for (int i = 1; i < Q; i++) most = most > seen[i] ? most : seen[i];
    for (int j = 0; j < most; j += WIDE) {
        vf sum[QUERIES][8];
        const float *k = K + (size_t)(j / 64) * kblock + j % 64 / 16 * (16 * D) + j % 16;
        for (int i = 0; i < Q; i++) for (int u = 0; u < U; u++) sum[i][u] = (vf){0};
        for (int d = 0; d < D; d++) {
#pragma GCC unroll 8
            for (int u = 0; u < U; u++) {
                vf column = load(k + 16 * (size_t)(u / WAYS * D + d) + u % WAYS * LANES);
#pragma GCC unroll 6
                for (int i = 0; i < Q; i++) sum[i][u] = fmav(column, all(q[i][d]), sum[i][u]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < Q; i++)
#pragma GCC unroll 8
            for (int u = 0; u < U; u++) store(scores + (size_t)i * (size_t)m->S + j + LANES * u, sum[i][u]);
    }
    for (int i = 0; i < Q; i++) {
        float *s = scores + (size_t)i * (size_t)m->S;
        vf top[WAYS], total[WAYS] = {{0}};
        for (int u = 0; u < WAYS; u++) top[u] = all(-INFINITY);
        for (int j = seen[i]; j % 16; j++) s[j] = -INFINITY;
        for (int j = 0; j < seen[i]; j += LANES) top[0] = maxv(top[0], load(s + j));
        float high = max_of(top);
        for (int j = 0; j < most; j += 16)
            for (int u = 0, at = j; u < WAYS; u++, at += LANES) {
                vf e = expv(load(s + at) - high);
                if (at + LANES > seen[i]) e = choose(lanes() < seen[i] - at, e, (vf){0});
                store(s + at, e);
                total[u] += e;
            }
        inverse[i] = 1.0f / sum_of(total);
    }
    for (int d = 0; d < Dp; d += WIDE) {
        int n = Dp - d < WIDE ? (Dp - d) / LANES : U;
        vf sum[QUERIES][8];
        for (int i = 0; i < Q; i++) for (int u = 0; u < U; u++) sum[i][u] = (vf){0};
        for (int block = 0; block < most; block += 64) {
            const float *v = V + (size_t)(block / 64) * vblock + d;
            int end = most - block < 64 ? most - block : 64;
            if (n == U)
                for (int j = 0; j < end; j++, v += Dp) {
#pragma GCC unroll 8
                    for (int u = 0; u < U; u++) {
                        vf value = load(v + LANES * u);
#pragma GCC unroll 6
                        for (int i = 0; i < Q; i++)
                            sum[i][u] = fmav(value, all(scores[(size_t)i * (size_t)m->S + block + j]), sum[i][u]);
                    }
                }
            else
                for (int j = 0; j < end; j++, v += Dp)
                    for (int u = 0; u < n; u++)
                        for (int i = 0; i < Q; i++)
                            sum[i][u] = fmav(load(v + LANES * u), all(scores[(size_t)i * (size_t)m->S + block + j]), sum[i][u]);
        }
        for (int i = 0; i < Q; i++)
            for (int u = 0; u < n; u++) {
                vf v = sum[i][u] * inverse[i];
                int left = D - d - LANES * u;
                if (left > 0) memcpy(out[i] + d + LANES * u, &v, sizeof(float) * (size_t)(left < LANES ? left : LANES));
            }
    }
}

static void attend_some(const model *m, int Q, float *const *q, const int *seen, const float *K, const float *V, float *scores,
                        float *const *out) {
#define CASE(n) case n: attend(m, n, q, seen, K, V, scores, out); break;
    switch (Q) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if QUERIES == 6
        CASE(5) CASE(6)
#endif
    }
#undef CASE
}

/* All queries of tokens [t0, t1) of sequence b that share key head h. */
static void attend_tokens(model *m, scratch *s, int l, int b, int h, int t0, int t1) {
    int group = m->c.n_head / m->c.n_kv_head, D = m->D, waiting = 0, seen[QUERIES];
    float *q[QUERIES], *out[QUERIES];
    const float *K = keys(m, l, b, h), *V = values(m, l, b, h);
    for (int g = 0; g < group; g++)
        for (int t = t0; t < t1; t++) {
            int token = b * m->T + t, head = h * group + g;
            q[waiting] = m->qkv + (size_t)token * (size_t)m->QKV + head * D;
            out[waiting] = m->att + (size_t)token * (size_t)m->Cp + head * D;
            seen[waiting++] = m->from + t + 1;
            if (waiting == QUERIES) {
                attend_some(m, waiting, q, seen, K, V, s->scores, out);
                waiting = 0;
            }
        }
    attend_some(m, waiting, q, seen, K, V, s->scores, out);
}

static void attention(model *m, int l, int tid) {
    int heads = m->c.n_head, kv = m->c.n_kv_head, group = heads / kv, D = m->D, n = m->threads.n;
    int kat = up_to(heads * D, 16), vat = kat + up_to(kv * D, 16), units = m->batch * kv;
    float factor = 1.0f / sqrtf((float)D);
    for (int unit = (int)((int64_t)units * tid / n); unit < (int)((int64_t)units * (tid + 1) / n); unit++) {
        int b = unit / kv, h = unit % kv;
        for (int t = 0; t < m->T; t++) {
            float *row = m->qkv + (size_t)(b * m->T + t) * (size_t)m->QKV;
            for (int g = 0; g < group; g++)
                rope(m, row + (h * group + g) * D, m->from + t, m->layers[l].q_norm, factor);
            remember(m, l, b, h, m->from + t, row + kat + h * D, row + vat + h * D);
        }
        if (m->T == 1) attend_tokens(m, &m->own[tid], l, b, h, 0, 1);
    }
    if (m->T == 1) return;
    barrier(&m->threads, tid);
    int tiles = (m->T + 15) / 16;
    share mine = begin(&m->threads, tid, units * tiles, true);
    for (int unit; take(&mine, 1, &unit);) {
        int tile = tiles - 1 - unit / units, t1 = 16 * tile + 16; /* the longest first */
        attend_tokens(m, &m->own[tid], l, unit % units / kv, unit % kv, 16 * tile, t1 < m->T ? t1 : m->T);
    }
}
