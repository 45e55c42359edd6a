/* The whole decode step of a model in one call: packed weights in, logits out.
 *
 * A step is one job on all threads of the pool (pool.h). Its phases, with a barrier between any two:
 *
 *   norm, quantize | q, k, v | rope, attention | sub-norm, quantize | o | norm, quantize | gate, up | sub-norm, quantize | down
 *
 * A single token is normed and quantized by every thread for itself, which is cheaper than a barrier. Every number
 * is computed by one thread in an order that depends neither on how many threads there are nor on how the tokens
 * were cut into chunks, so prefill, cached decoding and any thread count give bitwise the same logits.
 *
 * Layouts: residual stream and everything fp32 is [token][padded width]; int8 activations are tiles [k/4][T][4] for
 * gemm (kernels.h); keys are [position/64][head][4][D][16], so that a vector holds 16 positions; values
 * are [position/64][head][64][D], both fp32.
 * Compiled by build.py, called through cpu.py, neighbours kernels.h (integers), floats.h (fp32), pool.h (threads). */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include "floats.h"
#include "kernels.h"
#include "pool.h"

#define CHUNK 512          /* tokens that go through the layers together */
#define EXPAND_COLS 1280   /* columns of two panels that are expanded at a time: 40 KB of the 48 of the L1 cache */
#define FTOKENS 6          /* tokens a tile of the fp32 matrix product */
#define FEW_ROWS (2 * FEW) /* up to here a panel is cheaper to decode twice than to expand */

typedef struct {
    int kind, n, k, panels, groups;
    const uint8_t *w;
    float *scale;  /* (panels * 16), zero beyond n */
} matrix;

/* Quantized tokens. rows: int8 rows, one a token, or two (high and low part, 15 bits together) for the head. */
typedef struct {
    int tokens, limbs, rows, T, k4;
    int8_t *x;      /* [tile][k4][T][4] */
    float *f;       /* [tile][k][T], for bf16 weights instead of x */
    float *scale;   /* per token: what one step of x is worth */
    int32_t *sum;   /* per row: sum of x */
    float *normed;  /* one token of scratch */
} activation;

typedef struct {
    float *attn_norm, *q_norm, *k_norm, *attn_sub_norm, *mlp_norm, *mlp_sub_norm;
    matrix q, k, v, o, gate, up, down;
} layer;

typedef struct {
    activation act;
    int32_t *acc;     /* [rows][2][16] */
    float *facc;
    uint8_t *expanded;
    float *scores;    /* [4][positions] */
} scratch;

typedef struct {
    int n_layer, n_head, n_kv_head, n_embd, n_ff, block_size, vocab_size, relu2, sub_norm, qk_norm, tied, ternary, threads;
} shape;

typedef struct {
    shape c;
    int D, Dp, Cp, Fp, QKV, S;  /* head width, padded to 16; padded widths; q, k, v together; padded positions */
    float eps;
    const float *cos, *sin;     /* (block_size, D / 2) */
    layer *layers;
    matrix wte, head;
    float *norm;
    pool threads;
    scratch own[MAX_THREADS];
    activation shared;
    int batch, length, reserved;
    float *kcache, *vcache;     /* [S / 64][layer][sequence][kv head][64 D or 64 Dp] */
    size_t kbytes, vbytes;
    float *x, *qkv, *att, *h;
    _Alignas(64) atomic_int *next; /* work counters, 16 ints apart, one a phase */
    /* the job */
    const int32_t *tokens;
    int T, stride, from;        /* positions of this chunk, tokens a sequence in `tokens`, first position */
    float *logits;
} model;

static void *room(size_t bytes) {
    void *p = NULL;
    bytes = (bytes + 127) / 64 * 64;
    if (posix_memalign(&p, 64, bytes)) return NULL;
    memset(p, 0, bytes);
    return p;
}

/* Zeros in large pages, of which those that are never touched take no memory; NULL without it. */
static void *zeros(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}
static void release(void *p, size_t bytes) { if (p) munmap(p, bytes); }

static int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/* ---------------------------------------------------------------- activations ----------------------------------- */
static bool make_activation(activation *a, int rows, int k, bool floats) {
    size_t kp = (size_t)up_to(k, 80);
    rows += GEMM_TOKENS; /* the last tile may be cut short */
    free(a->x), free(a->f), free(a->scale), free(a->sum), free(a->normed);
    a->x = room((size_t)rows * kp);
    a->f = room(floats ? sizeof(float) * (size_t)rows * kp : 0);
    a->scale = room(sizeof(float) * (size_t)rows);
    a->sum = room(sizeof(int32_t) * (size_t)rows);
    a->normed = room(sizeof(float) * kp);
    return a->x && a->f && a->scale && a->sum && a->normed;
}

static void lay_out(activation *a, int tokens, int k, const matrix *w) {
    a->limbs = w->kind == Q8 || w->kind == Q6 ? 2 : 1;
    a->tokens = tokens;
    a->rows = tokens * a->limbs;
    int most = w->kind == BF16 ? FTOKENS : a->rows <= FEW_ROWS ? FEW : GEMM_TOKENS;
    int tiles = (a->rows + most - 1) / most;
    a->T = (a->rows + tiles - 1) / tiles;
    a->k4 = up_to(k, 80) / 4;
}

/* Token t of `a` from x (k floats, padded with zeros to 16): RMSNorm where there is a weight, then int8.
 * s = 127 / max|x|.clamp(1e-5), x_i8 = round(x * s).clamp(-128, 127), x_scale = 1 / s: arXiv 2402.17764, eq. 4-6,
 * in the order of operations of transformers' BitLinear. The head's two parts are the same with 127 * 254. */
static void quantize(activation *a, int t, const float *x, int k, const float *weight, float eps, const matrix *w,
                     float *temp) {
    int kp = up_to(k, 16);
    v16 most = {0};
    if (weight) {
        float inverse = 1.0f / sqrtf(sum_squares(x, kp) / (float)k + eps);
        for (int i = 0; i < kp; i += 16) {
            v16 v = load(x + i) * inverse * load(weight + i);
            store(temp + i, v);
            most = max16(most, abs16(v));
        }
        x = temp;
    } else {
        for (int i = 0; i < kp; i += 16) most = max16(most, abs16(load(x + i)));
    }
    int T = a->T;
    if (w->kind == BF16) {
        float *to = a->f + (size_t)(t / T) * (size_t)(4 * a->k4) * (size_t)T + t % T;
        if (T == 1) memcpy(to, x, sizeof(float) * (size_t)k);
        else for (int i = 0; i < k; i++) to[(size_t)i * (size_t)T] = x[i];
        for (int i = k; i < 4 * a->k4; i++) to[(size_t)i * (size_t)T] = 0;
        return;
    }
    float top = max_of(most);
    if (top < 1e-5f) top = 1e-5f;
    float s = 1.0f / top * (a->limbs == 2 ? 127.0f * 254.0f : 127.0f); /* torch divides a number by a tensor so */
    a->scale[t] = 1.0f / s;
    for (int part = 0; part < a->limbs; part++) {
        int row = t * a->limbs + part;
        int8_t *to = a->x + ((size_t)(row / T) * (size_t)a->k4 * (size_t)T + (size_t)(row % T)) * 4;
        i16 total = {0};
        for (int i = 0; i < kp; i += 16) {
            v16 v = round16(load(x + i) * s);
            if (a->limbs == 2) {
                v16 high = round16(v * (1.0f / 254.0f));
                v = part ? v - high * 254.0f : high;
            } else {
                v = max16(min16(v, all(127.0f)), all(-128.0f));
            }
            i16 q = __builtin_convertvector(v, i16);
            b16 bytes = __builtin_convertvector(q, b16);
            total += q;
            if (T == 1) memcpy(to + i, &bytes, 16);
            else for (int j = 0; j < 4 && i + 4 * j < 4 * a->k4; j++) memcpy(to + (size_t)(i + 4 * j) * (size_t)T, (int8_t *)&bytes + 4 * j, 4);
        }
        for (int i = kp; i < 4 * a->k4; i += 4) memset(to + (size_t)i * (size_t)T, 0, 4);
        a->sum[row] = sum_ofi(total);
    }
}

/* ---------------------------------------------------------------- matrix products ------------------------------- */
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

/* ---------------------------------------------------------------- attention ------------------------------------- */
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
    int D = m->D, Dp = m->Dp, most = seen[0];
    const size_t kblock = heads(m) * (size_t)(64 * D), vblock = heads(m) * (size_t)(64 * Dp);
    float inverse[4];
    for (int i = 1; i < Q; i++) most = most > seen[i] ? most : seen[i];
    for (int j = 0; j < most; j += 64) {
        v16 sum[4][4];
        const float *k = K + (size_t)(j / 64) * kblock;
        for (int i = 0; i < Q; i++) for (int u = 0; u < 4; u++) sum[i][u] = (v16){0};
        for (int d = 0; d < D; d++) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) {
                v16 column = load(k + 16 * (size_t)(u * D + d));
#pragma GCC unroll 4
                for (int i = 0; i < Q; i++) sum[i][u] = fma16(column, all(q[i][d]), sum[i][u]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) store(scores + (size_t)i * (size_t)m->S + j + 16 * u, sum[i][u]);
    }
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < Q; i++) {
        float *s = scores + (size_t)i * (size_t)m->S;
        v16 top = all(-INFINITY), total = {0};
        int whole = seen[i] / 16 * 16;
        for (int j = 0; j < whole; j += 16) top = max16(top, load(s + j));
        if (whole < seen[i]) {
            v16 last = choose(lane < seen[i] - whole, load(s + whole), all(-INFINITY));
            top = max16(top, last);
        }
        float high = max_of(top);
        for (int j = 0; j < whole; j += 16) {
            v16 e = exp16(load(s + j) - high);
            store(s + j, e);
            total += e;
        }
        for (int j = whole; j < most; j += 16) {
            v16 e = choose(lane < seen[i] - j, exp16(load(s + j) - high), (v16){0});
            store(s + j, e);
            total += e;
        }
        inverse[i] = 1.0f / sum_of(total);
    }
    for (int d = 0; d < Dp; d += 64) {
        int n = Dp - d < 64 ? (Dp - d) / 16 : 4;
        v16 sum[4][4];
        for (int i = 0; i < Q; i++) for (int u = 0; u < 4; u++) sum[i][u] = (v16){0};
        for (int block = 0; block < most; block += 64) {
            const float *v = V + (size_t)(block / 64) * vblock + d;
            int end = most - block < 64 ? most - block : 64;
            if (n == 4)
                for (int j = 0; j < end; j++, v += Dp) {
#pragma GCC unroll 4
                    for (int u = 0; u < 4; u++) {
                        v16 value = load(v + 16 * u);
#pragma GCC unroll 4
                        for (int i = 0; i < Q; i++)
                            sum[i][u] = fma16(value, all(scores[(size_t)i * (size_t)m->S + block + j]), sum[i][u]);
                    }
                }
            else
                for (int j = 0; j < end; j++, v += Dp)
                    for (int u = 0; u < n; u++)
                        for (int i = 0; i < Q; i++)
                            sum[i][u] = fma16(load(v + 16 * u), all(scores[(size_t)i * (size_t)m->S + block + j]), sum[i][u]);
        }
        for (int i = 0; i < Q; i++)
            for (int u = 0; u < n; u++) {
                v16 v = sum[i][u] * inverse[i];
                int left = D - d - 16 * u;
                memcpy(out[i] + d + 16 * u, &v, sizeof(float) * (size_t)(left < 16 ? left : 16));
            }
    }
}

static void attend1(const model *m, float *const *q, const int *seen, const float *K, const float *V, float *scores,
                    float *const *out) { attend(m, 1, q, seen, K, V, scores, out); }
static void attend4(const model *m, float *const *q, const int *seen, const float *K, const float *V, float *scores,
                    float *const *out) { attend(m, 4, q, seen, K, V, scores, out); }

/* All queries of tokens [t0, t1) of sequence b that share key head h. */
static void attend_tokens(model *m, scratch *s, int l, int b, int h, int t0, int t1) {
    int group = m->c.n_head / m->c.n_kv_head, D = m->D, waiting = 0, seen[4];
    float *q[4], *out[4];
    const float *K = keys(m, l, b, h), *V = values(m, l, b, h);
    for (int g = 0; g < group; g++)
        for (int t = t0; t < t1; t++) {
            int token = b * m->T + t, head = h * group + g;
            q[waiting] = m->qkv + (size_t)token * (size_t)m->QKV + head * D;
            out[waiting] = m->att + (size_t)token * (size_t)m->Cp + head * D;
            seen[waiting++] = m->from + t + 1;
            if (waiting == 4) {
                attend4(m, q, seen, K, V, s->scores, out);
                waiting = 0;
            }
        }
    for (int i = 0; i < waiting; i++) attend1(m, q + i, seen + i, K, V, s->scores, out + i);
}

static void attention(model *m, int l, int tid, atomic_int *next) {
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
    share mine = begin(units * tiles, true, next, tid, n);
    for (int unit; take(&mine, &unit);) {
        int tile = tiles - 1 - unit / units, t1 = 16 * tile + 16; /* the longest first */
        attend_tokens(m, &m->own[tid], l, unit % units / kv, unit % kv, 16 * tile, t1 < m->T ? t1 : m->T);
    }
}

/* ---------------------------------------------------------------- the step -------------------------------------- */
/* fp32 row of the embedding */
static void embed(const matrix *w, int32_t token, float *to) {
    int r = token % ROWS;
    const uint8_t *p = w->w + (size_t)(token / ROWS) * (size_t)w->groups * (size_t)BYTES[w->kind];
    float scale = w->kind == BF16 ? 1.0f : w->scale[token];
    for (int k = 0; k < w->k; k++) {
        const uint8_t *line = p + (size_t)(k / COLS[w->kind]) * (size_t)BYTES[w->kind];
        int c = k % COLS[w->kind];
        if (w->kind == BF16) {
            uint32_t bits = (uint32_t)line[4 * r + 2 * c] << 16 | (uint32_t)line[4 * r + 2 * c + 1] << 24;
            memcpy(to + k, &bits, 4);
        } else if (w->kind == Q8) {
            to[k] = (float)(line[4 * r + c] - 128) * scale;
        } else {
            int b = 4 * r + c % 4, p4 = c / 4; /* plane p4 of the group */
            int low = line[64 * (p4 / 2) + b] >> (4 * (p4 % 2)) & 15, high = line[128 + b] >> (2 * p4) & 3;
            to[k] = (float)((low | high << 4) - 32) * scale;
        }
    }
}

/* Norms and quantizes all tokens: a single one by every thread for itself, more of them once, with a barrier. */
static activation prepare(model *m, int tid, int tokens, const float *x, int stride, int k, const float *weight,
                          const matrix *w) {
    int n = m->threads.n;
    activation a = tokens == 1 ? m->own[tid].act : m->shared;
    lay_out(&a, tokens, k, w);
    int t = tokens == 1 ? 0 : (int)((int64_t)tokens * tid / n), end = tokens == 1 ? 1 : (int)((int64_t)tokens * (tid + 1) / n);
    for (; t < end; t++)
        quantize(&a, t, x + (size_t)t * (size_t)stride, k, weight, m->eps, w, m->own[tid].act.normed);
    if (tokens > 1) barrier(&m->threads, tid);
    return a;
}

static void step(void *arg, int tid) {
    model *m = arg;
    const shape *c = &m->c;
    pool *threads = &m->threads;
    scratch *s = &m->own[tid];
    int tokens = m->batch * m->T, phase = 0;
    if (tokens > 1) {
        for (int t = (int)((int64_t)tokens * tid / threads->n); t < (int)((int64_t)tokens * (tid + 1) / threads->n); t++)
            embed(&m->wte, m->tokens[(t / m->T) * m->stride + t % m->T], m->x + (size_t)t * (size_t)m->Cp);
        barrier(threads, tid);
    }
    for (int l = 0; l < c->n_layer; l++) {
        layer *w = &m->layers[l];
        activation a = prepare(m, tid, tokens, m->x, m->Cp, c->n_embd, w->attn_norm, &w->q);
        product((const matrix *[]){&w->q, &w->k, &w->v}, 3, &a, s, threads, tid, m->next + 16 * phase++, STORE, 0,
                m->qkv, m->QKV, m->QKV);
        barrier(threads, tid);
        attention(m, l, tid, m->next + 16 * phase++);
        barrier(threads, tid);
        a = prepare(m, tid, tokens, m->att, m->Cp, c->n_embd, w->attn_sub_norm, &w->o);
        product((const matrix *[]){&w->o}, 1, &a, s, threads, tid, m->next + 16 * phase++, ADD, 0, m->x, m->Cp, m->Cp);
        barrier(threads, tid);
        a = prepare(m, tid, tokens, m->x, m->Cp, c->n_embd, w->mlp_norm, &w->gate);
        product((const matrix *[]){&w->gate, &w->up}, 2, &a, s, threads, tid, m->next + 16 * phase++, GATE, c->relu2,
                m->h, m->Fp, m->Fp);
        barrier(threads, tid);
        a = prepare(m, tid, tokens, m->h, m->Fp, c->n_ff, w->mlp_sub_norm, &w->down);
        product((const matrix *[]){&w->down}, 1, &a, s, threads, tid, m->next + 16 * phase++, ADD, 0, m->x, m->Cp, m->Cp);
        barrier(threads, tid);
    }
    if (!m->logits) return;
    const float *last = m->x + (size_t)(m->T - 1) * (size_t)m->Cp;
    activation a = prepare(m, tid, m->batch, last, m->Cp * m->T, c->n_embd, m->norm, &m->head);
    product((const matrix *[]){&m->head}, 1, &a, s, threads, tid, m->next + 16 * phase++, STORE, 0, m->logits,
            c->vocab_size, c->vocab_size);
}

/* ---------------------------------------------------------------- what Python calls ----------------------------- */
const char *bitgpt_isa(void) { return ISA; }

static void free_matrix(matrix *w) { free(w->scale); }

static void free_work(model *m) {
    free(m->x), free(m->qkv), free(m->att), free(m->h);
    m->x = m->qkv = m->att = m->h = NULL;
    activation *a = &m->shared;
    free(a->x), free(a->f), free(a->scale), free(a->sum), free(a->normed);
    *a = (activation){0};
    for (int i = 0; i < m->threads.n; i++) {
        scratch *s = &m->own[i];
        a = &s->act;
        free(a->x), free(a->f), free(a->scale), free(a->sum), free(a->normed);
        free(s->acc), free(s->facc), free(s->expanded), free(s->scores);
        *s = (scratch){0};
    }
    m->reserved = 0;
}

void bitgpt_destroy(model *m) {
    if (!m) return;
    pool_stop(&m->threads);
    free_work(m);
    release(m->kcache, m->kbytes), release(m->vcache, m->vbytes), free(m->next), free(m->norm);
    for (int l = 0; m->layers && l < m->c.n_layer; l++) {
        layer *w = &m->layers[l];
        free(w->attn_norm), free(w->q_norm), free(w->k_norm), free(w->attn_sub_norm), free(w->mlp_norm), free(w->mlp_sub_norm);
        matrix *all[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
        for (int i = 0; i < 7; i++) free_matrix(all[i]);
    }
    free(m->layers);
    if (!m->c.tied) free_matrix(&m->head);
    free_matrix(&m->wte);
    free(m);
}

/* NULL without memory. cos, sin: (block_size, D / 2), kept by the caller as long as the model. */
model *bitgpt_create(const shape *c, float eps, const float *cos, const float *sin) {
    model *m = room(sizeof(model));
    if (!m) return NULL;
    make_tables();
    m->c = *c;
    m->eps = eps, m->cos = cos, m->sin = sin;
    m->D = c->n_embd / c->n_head;
    m->Dp = up_to(m->D, 16);
    m->Cp = up_to(c->n_embd, 16);
    m->Fp = up_to(c->n_ff, 16);
    m->QKV = m->Cp + 2 * up_to(c->n_kv_head * m->D, 16);
    m->S = up_to(c->block_size, 64);
    m->layers = room(sizeof(layer) * (size_t)c->n_layer);
    m->next = room(64 * (size_t)(6 * c->n_layer + 2));
    pool_start(&m->threads, c->threads);
    if (!m->layers || !m->next) { bitgpt_destroy(m); return NULL; }
    return m;
}

/* A matrix by number: 0 wte, 1 lm_head, then q k v o gate up down of the layer. `w` is used in place: the caller keeps
 * it. scale: n floats, or one for all rows. -1 without memory. */
int bitgpt_matrix(model *m, int which, int l, int kind, int n, int k, const uint8_t *w, const float *scale, int scales) {
    layer *y = &m->layers[l];
    matrix *all[] = {&m->wte, &m->head, &y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down}, *to = all[which];
    *to = (matrix){kind, n, k, (n + ROWS - 1) / ROWS, (k + COLS[kind] - 1) / COLS[kind], w, NULL};
    to->scale = room(sizeof(float) * (size_t)(to->panels * ROWS));
    if (!to->scale) return -1;
    for (int i = 0; i < n; i++) to->scale[i] = scale ? scale[scales == 1 ? 0 : i] : 1.0f;
    if (which == 0 && m->c.tied) m->head = *to;
    return 0;
}

/* A norm by number: 0 final, then attn_norm, attn sub_norm, mlp_norm, mlp sub_norm, q_norm, k_norm of the layer. Copied. */
int bitgpt_norm(model *m, int which, int l, int n, const float *weight) {
    layer *y = &m->layers[l];
    float **all[] = {&m->norm, &y->attn_norm, &y->attn_sub_norm, &y->mlp_norm, &y->mlp_sub_norm, &y->q_norm, &y->k_norm};
    float *copy = room(sizeof(float) * (size_t)up_to(n, 16));
    if (!copy) return -1;
    memcpy(copy, weight, sizeof(float) * (size_t)n);
    *all[which] = copy;
    return 0;
}

/* Empties the cache, for `batch` sequences. -1 without memory. */
int bitgpt_reset(model *m, int batch) {
    m->length = 0;
    if (batch == m->batch && m->kcache && m->vcache) return 0;
    release(m->kcache, m->kbytes), release(m->vcache, m->vbytes);
    m->batch = batch;
    size_t rows = heads(m) * (size_t)m->S;
    m->kbytes = rows * (size_t)m->D * sizeof(float), m->vbytes = rows * (size_t)m->Dp * sizeof(float);
    m->kcache = zeros(m->kbytes), m->vcache = zeros(m->vbytes);
    return m->kcache && m->vcache ? 0 : -1;
}

static bool reserve(model *m, int tokens) {
    if (tokens <= m->reserved) return true;
    free_work(m);
    const shape *c = &m->c;
    size_t n = (size_t)tokens;
    int rows = tokens > 2 * m->batch ? tokens : 2 * m->batch, widest = c->n_ff > c->n_embd ? c->n_ff : c->n_embd;
    bool bf16 = !c->ternary || m->head.kind == BF16;
    m->x = room(sizeof(float) * n * (size_t)m->Cp);
    m->qkv = room(sizeof(float) * n * (size_t)m->QKV);
    m->att = room(sizeof(float) * n * (size_t)m->Cp);
    m->h = room(sizeof(float) * n * (size_t)m->Fp);
    bool ok = m->x && m->qkv && m->att && m->h && make_activation(&m->shared, tokens == 1 ? 0 : rows, widest, bf16);
    for (int i = 0; i < m->threads.n; i++) {
        scratch *s = &m->own[i];
        ok = make_activation(&s->act, 2, widest, bf16) && ok;
        s->acc = room(sizeof(int32_t) * 32 * (size_t)(rows + GEMM_TOKENS));
        s->facc = room(sizeof(float) * 32 * (size_t)(rows + FTOKENS));
        s->expanded = room((size_t)(EXPAND_COLS + 80) * ROWS * GEMM_PANELS);
        s->scores = room(sizeof(float) * 4 * (size_t)m->S);
        ok = ok && s->acc && s->facc && s->expanded && s->scores;
    }
    if (ok) m->reserved = tokens;
    return ok;
}

/* tokens (batch, T) after what is in the cache; logits (batch, vocab_size) of the last position. The caller has made
 * sure that tokens are in the vocabulary and length + T <= block_size. -1 without memory. */
int bitgpt_forward(model *m, const int32_t *tokens, int T, float *logits) {
    int most = m->batch > CHUNK ? 1 : CHUNK / m->batch;
    if (!reserve(m, m->batch * (T < most ? T : most))) return -1;
    for (int t = 0; t < T; t += most) {
        m->tokens = tokens + t;
        m->stride = T;
        m->T = T - t < most ? T - t : most;
        m->from = m->length;
        m->logits = t + m->T == T ? logits : NULL;
        memset((void *)m->next, 0, 64 * (size_t)(6 * m->c.n_layer + 2));
        if (m->batch * m->T == 1) embed(&m->wte, tokens[t], m->x);
        pool_run(&m->threads, step, m);
        m->length += m->T;
    }
    return 0;
}

int bitgpt_length(const model *m) { return m->length; }
int bitgpt_threads(const model *m) { return m->threads.n; }

int64_t bitgpt_count_invalid(int kind, const uint8_t *w, int64_t bytes) { return count_invalid(kind, w, bytes); }

/* One matrix times M tokens. For int8 x (M, k): acc (M, n) = the exact sums; for floats, with x NULL: y (M, n) as a layer
 * of the model computes it from xf. For the tests. */
int bitgpt_product(int kind, int n, int k, const uint8_t *packed, const float *scale, int M, const int8_t *x, int32_t *acc,
                   const float *xf, float *y) {
    make_tables();
    matrix w = {kind, n, k, (n + ROWS - 1) / ROWS, (k + COLS[kind] - 1) / COLS[kind], packed, NULL};
    activation a = {0};
    scratch s = {0};
    int kp = up_to(k, 16);
    float *padded = room(sizeof(float) * (size_t)kp);
    w.scale = room(sizeof(float) * (size_t)(w.panels * ROWS));
    s.acc = room(sizeof(int32_t) * 32 * (size_t)(2 * M + GEMM_TOKENS));
    s.facc = room(sizeof(float) * 32 * (size_t)(M + FTOKENS));
    s.expanded = room((size_t)(EXPAND_COLS + 80) * ROWS * GEMM_PANELS);
    bool ok = make_activation(&a, 2 * M, k, kind == BF16) && padded && w.scale && s.acc && s.facc && s.expanded;
    if (ok) {
        for (int i = 0; i < n; i++) w.scale[i] = scale ? scale[i] : 1.0f;
        lay_out(&a, M, k, &w);
        if (x) { /* as quantize lays tokens out, one part only */
            a.limbs = 1, a.rows = M;
            int most = M <= FEW_ROWS ? FEW : GEMM_TOKENS, tiles = (M + most - 1) / most;
            a.T = (M + tiles - 1) / tiles;
        }
        for (int t = 0; t < M; t++) {
            if (!x) {
                memcpy(padded, xf + (size_t)t * (size_t)k, sizeof(float) * (size_t)k);
                quantize(&a, t, padded, k, NULL, 0, &w, a.normed);
                continue;
            }
            int8_t *to = a.x + ((size_t)(t / a.T) * (size_t)a.k4 * (size_t)a.T + (size_t)(t % a.T)) * 4;
            a.sum[t] = 0;
            for (int i = 0; i < k; i++) {
                to[(size_t)(i / 4) * 4 * (size_t)a.T + (size_t)(i % 4)] = x[(size_t)t * (size_t)k + i];
                a.sum[t] += x[(size_t)t * (size_t)k + i];
            }
        }
        for (int p = 0; p < w.panels; p += 2) {
            int second = p + 1 < w.panels;
            pair_product(&w, p, &w, p + second, &a, &s);
            for (int which = 0; which <= second; which++)
                for (int t = 0; t < M; t++) {
                    v16 v = x ? (v16)(loadi(acc_at(s.acc, &a, t, which)) - OFFSET[kind] * a.sum[t])
                              : result(&a, &s, t, which, &w, p + which);
                    int at = ROWS * (p + which), left = n - at < ROWS ? n - at : ROWS;
                    memcpy((x ? (float *)acc : y) + (size_t)t * (size_t)n + at, &v, sizeof(float) * (size_t)left);
                }
        }
    }
    free(a.x), free(a.f), free(a.scale), free(a.sum), free(a.normed);
    free(padded), free(w.scale), free(s.acc), free(s.facc), free(s.expanded);
    return ok ? 0 : -1;
}

/* How fast `threads` threads read `bytes` of memory, in bytes a second: the best of `rounds`. For bench.py. */
typedef struct { const uint8_t *w; size_t bytes; int threads; uint64_t sums[MAX_THREADS][8]; } reading;
static void read_job(void *arg, int tid) {
    reading *r = arg;
    size_t lines = r->bytes / 256, from = lines * (size_t)tid / (size_t)r->threads, to = lines * (size_t)(tid + 1) / (size_t)r->threads;
    i16 s[4] = {{0}, {0}, {0}, {0}};
    for (size_t i = from; i < to; i++)
        for (int u = 0; u < 4; u++) {
            const uint8_t *p = r->w + 256 * i + 64 * (size_t)u;
            __builtin_prefetch(p + 4096);
            s[u] ^= loadi(p);
        }
    r->sums[tid][0] = (uint64_t)(uint32_t)sum_ofi(s[0] ^ s[1] ^ s[2] ^ s[3]);
}

double bitgpt_bandwidth(const uint8_t *w, int64_t bytes, int threads, int rounds) {
    pool *p = room(sizeof(pool));
    reading *r = room(sizeof(reading));
    double best = 0;
    if (p && r) {
        pool_start(p, threads);
        *r = (reading){.w = w, .bytes = (size_t)bytes, .threads = p->n};
        for (int i = 0; i < rounds; i++) {
            struct timespec a, b;
            clock_gettime(CLOCK_MONOTONIC, &a);
            pool_run(p, read_job, r);
            clock_gettime(CLOCK_MONOTONIC, &b);
            double rate = (double)bytes / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
            best = rate > best ? rate : best;
        }
        pool_stop(p);
    }
    free(p), free(r);
    return best;
}
