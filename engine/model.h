/* A model in memory: matrices, layers, caches, the scratch memory of each thread.
 *
 * Layouts: residual stream and everything fp32 is [token][padded width]; int8 activations are tiles [k/W][T][W] for
 * gemm (integers.h); keys are [position/64][head][4][D][16], so that a vector holds 16 positions; values
 * are [position/64][head][64][D], both fp32, or bf16 by the pair (attention.h).
 * Neighbours: activation.h, product.h, attention.h, which work on it, and cpu.c, which makes and runs it. */
#pragma once
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include "../kernels/floats.h"
#include "../kernels/integers.h"
#include "pool.h"

#define CHUNK 512          /* tokens that go through the layers together, at most */
#define EXPAND_COLS 1280   /* columns of two panels that are expanded at a time: 40 KB of the 48 of the L1 cache */
#define FTOKENS 6          /* tokens a tile of the fp32 matrix product */
#define SUMS 64            /* rows times pairs of panels whose sums wait to be scaled: 8 KB */
#define QUERIES (LANES == 16 ? 6 : 4) /* of one head's attention at once: their sums stay in registers */
#define TOGETHER 24         /* queries, a multiple of QUERIES, that share a block of keys while it is in the L1 cache */
#define SPAN 512            /* positions whose softmax is taken by itself, a multiple of 64 */
#define APART (SPAN + 16)   /* from one query's scores to the next; powers of two would share lines of the cache */
#define TAIL 16             /* numbers behind a query's weighted values: the sum of the weights, the largest score */
#define FEW_ROWS (2 * FEW) /* up to here a panel is cheaper to decode twice than to expand */

typedef struct {
    int kind, n, k, panels, groups;
    const uint8_t *w;
    float *scale;  /* 16 a panel, zero beyond n, or 16 equal ones for all panels */
    int step;      /* from a panel's scales to the next one's: 16 or 0 */
} matrix;

/* Quantized tokens. rows: int8 rows, one a token, or two (high and low part, 15 bits together) for the head; k columns,
 * padded. W: columns side by side in a row: 4, or 64 for tiles of AMX. */
typedef struct {
    int tokens, limbs, rows, T, tiles, k, W;
    int8_t *x;      /* [tile][k / W][T][W] */
    float *f;       /* [tile][k][T], for bf16 weights instead of x */
    float *scale;   /* per token: what one step of x is worth */
    int32_t *sum;   /* per row: sum of x */
    enum prefetch how; /* weights are asked for while x is multiplied */
} activation;

typedef struct {
    float *attn_norm, *q_norm, *k_norm, *attn_sub_norm, *mlp_norm, *mlp_sub_norm;
    matrix q, k, v, o, gate, up, down;
} layer;

typedef struct {
    activation act;
    int32_t *acc;     /* [pairs of panels][rows][2][16] */
    float *facc;
    uint8_t *expanded;
    float *scores;    /* [TOGETHER][APART] */
    float *rows, *more; /* [TOGETHER][width of values + TAIL] */
    float *block;     /* 64 keys or values of a head, [64][width] */
} scratch;

/* Which way of asking for weights decodes fastest: the least seconds that a token took, of a few tries each. */
typedef struct { int tries; double least[N_PREFETCH]; } tuning;

typedef struct { void *p; size_t bytes; } region;

typedef struct {
    int n_layer, n_head, n_kv_head, n_embd, n_ff, block_size, vocab_size, relu2, tied, ternary, kv_bf16,
        threads;
} shape;

typedef struct {
    shape c;
    int D, Cp, Fp, QKV, S;      /* head width; padded widths; q, k, v together; padded positions */
    float eps;
    const float *cos, *sin;     /* (block_size, D / 2) */
    layer *layers;
    matrix wte, head;
    float *norm;
    pool threads;
    scratch own[MAX_THREADS];
    activation shared;
    int batch, length, reserved, reserved_rows;
    tuning tunings[FEW_ROWS + 1]; /* by tokens of a step */
    region cache[2];            /* keys, values: [S / 64][layer][sequence][kv head][64][width], fp32 or bf16 */
    region parts;               /* of a single token: [sequence][kv head][span][query][width of values + TAIL] */
    region done;                /* how many spans of it are there: [sequence][kv head] */
    int width[2];               /* D; D padded to 16, or by the pair to 32 */
    float *x, *qkv, *att, *h;
    /* the job */
    const int64_t *tokens;
    int T, stride, from;        /* positions of this chunk, tokens a sequence in `tokens`, first position */
    enum prefetch how;
    int all_logits;             /* whether all of them have logits, or the last */
    float *logits;
} model;

static void *alloc_zeroed(size_t bytes) {
    void *p = NULL;
    bytes = (bytes + 127) / 64 * 64;
    if (posix_memalign(&p, 64, bytes)) return NULL;
    memset(p, 0, bytes);
    return p;
}

static void release(region *r) {
    if (r->p) munmap(r->p, r->bytes);
    *r = (region){0};
}

/* Zeros in large pages, of which those that are never touched take no memory. */
static bool grow(region *r, size_t bytes) {
    if (bytes <= r->bytes) return true; /* kept: new pages cost L 3.5 ms of its first token */
    release(r);
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return false;
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    *r = (region){p, bytes};
    return true;
}

static int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
