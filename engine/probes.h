/* For the tests and bench.py: one matrix product by itself, and how fast memory is read. Part of cpu.c. */
#pragma once
#include "product.h"

/* One matrix times M tokens. For int8 x (M, k): acc (M, n) = the exact sums; for floats, with x NULL: y (M, n) as a
 * layer of the model computes it from xf. For the tests. */
int bitgpt_product(int kind, int n, int k, const uint8_t *packed, const float *scale, int M, const int8_t *x,
                   int32_t *acc, const float *xf, float *y) {
    get_ready();
    matrix w = {kind, n, k, (n + ROWS - 1) / ROWS, (k + COLS[kind] - 1) / COLS[kind], packed, NULL, ROWS};
    activation a = {0};
    scratch s = {0};
    int kp = round_up(k, 16);
    float *padded = alloc_zeroed(sizeof(float) * (size_t)kp);
    w.scale = alloc_zeroed(sizeof(float) * (size_t)(w.panels * ROWS));
    s.acc = alloc_zeroed(sizeof(int32_t) * 32 * (size_t)(2 * M + MOST_TOKENS));
    s.facc = alloc_zeroed(sizeof(float) * 32 * (size_t)(M + FTOKENS));
    s.expanded = alloc_zeroed((size_t)(EXPAND_COLS + 80) * ROWS * GEMM_PANELS);
    bool ok = make_activation(&a, 2 * M, k, kind == BF16) && padded && w.scale && s.acc && s.facc && s.expanded;
    if (ok) {
        for (int i = 0; i < n; i++) w.scale[i] = scale ? scale[i] : 1.0f;
        lay_out(&a, M, x ? 1 : limbs_for(&w), k, &w);
        for (int t = 0; t < M; t++) {
            if (!x) {
                memcpy(padded, xf + (size_t)t * (size_t)k, sizeof(float) * (size_t)k);
                quantize(&a, t, padded, k, NULL, 0, &w);
                continue;
            }
            int8_t *to = row_at(&a, t);
            a.sum[t] = 0;
            for (int i = 0; i < k; i++) {
                to[column_at(&a, i)] = x[(size_t)t * (size_t)k + i];
                a.sum[t] += x[(size_t)t * (size_t)k + i];
            }
        }
        tiles before = {0};
        if (a.W == 64) before = begin_tiles();
        for (int i = 0; i < w.panels; i += 2) {
            int panel[2] = {i, i + 1 < w.panels ? i + 1 : i};
            const uint8_t *at[2];
            for (int which = 0; which < 2; which++)
                at[which] = packed + (size_t)panel[which] * (size_t)w.groups * (size_t)BYTES[kind];
            pair_product(kind, w.groups, at, &a, &s, s.acc, s.facc);
            for (int which = 0; which < 2; which++)
                for (int t = 0; t < M; t++)
                    for (int lane = 0; lane < ROWS; lane += LANES) {
                        int at = ROWS * which + lane, to = ROWS * panel[which] + lane;
                        vf v = x ? (vf)(loadi(s.acc + 32 * t + at) - OFFSET[kind] * a.sum[t])
                                 : result(&a, t, kind, load(w.scale + to), s.acc + at, s.facc + at);
                        put((x ? (float *)acc : y) + (size_t)t * (size_t)n, to, n, STORE, v);
                    }
        }
        if (a.W == 64) end_tiles(before);
    }
    free_activation(&a);
    free(padded), free(w.scale), free(s.acc), free(s.facc), free(s.expanded);
    return ok ? 0 : -1;
}

/* How fast `threads` threads read `bytes` of memory once, in bytes per second, each in `streams` (1 or 2) runs that lie
 * side by side, asking ahead in one of the kernels' ways. For bench.py. */
typedef struct {
    const uint8_t *w;
    size_t bytes;
    int threads, streams;
    enum prefetch how;
    int32_t sums[MAX_THREADS][LANES];
} reading;
static void read_job(void *arg, int tid) {
    reading *r = arg;
    size_t lines = r->bytes / 128 / (size_t)r->threads;
    size_t apart = r->streams == 2 ? lines : 1, step = r->streams == 2 ? 1 : 2;
    const uint8_t *w = r->w + 128 * lines * (size_t)tid;
    vi sum[2] = {{0}, {0}};
    for (size_t i = 0; i < lines; i++)
        for (size_t u = 0; u < 2; u++) {
            const uint8_t *p = w + 64 * (i * step + u * apart);
            prefetch(p, r->how);
            for (int way = 0; way < WAYS; way++) sum[u] ^= loadi(p + 4 * LANES * way);
        }
    sum[0] ^= sum[1];
    memcpy(r->sums[tid], &sum[0], sizeof sum[0]);
}

double bitgpt_bandwidth(const uint8_t *w, int64_t bytes, int threads, int streams, int how) {
    pool *p = alloc_zeroed(sizeof(pool));
    reading *r = alloc_zeroed(sizeof(reading));
    double rate = 0;
    if (p && r) {
        pool_start(p, threads);
        *r = (reading){.w = w, .bytes = (size_t)bytes, .threads = p->n, .streams = streams, .how = how};
        double start = seconds();
        pool_run(p, read_job, r);
        rate = (double)bytes / (seconds() - start);
        pool_stop(p);
    }
    free(p), free(r);
    return rate;
}
