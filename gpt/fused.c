/* A training step of the model's blocks and head: products, and what stands between them in as few passes over memory
 * as can be; and of Muon, the optimizer of the blocks' matrices.
 *
 * A layer is a stage and a product. The stage (stage.h) takes rows, plain or gated, norms them, and for the
 * ternary twin quantizes them; the product (matmul.h) multiplies with packed weights and adds to the residual
 * stream what belongs there. A block is four layers (q, k, v; o; gate, up; down) with attention (flash.h)
 * between the first two. What backward needs of a layer is its input, transposed, as it went into the product: one
 * byte a value where it was int8.
 *
 * Rows are tokens, M = batch * length. "Values" are bf16 or fp32, all other floats fp32. Gradients of a ternary product
 * are those of its integer sums, so they carry the factors of its row (scale) and of its column (columns).
 * Threads are OpenMP's, those that torch has already: built without a libgomp of its own (kernels/build.py). Gradients
 * of norms are added up thread by thread, so results repeat with the same number of threads. */
#include "flash.h"
#include "loss.h"
#include "muon.h"
#include "stage.h"

enum { QKV, OUT, GATE_UP, DOWN, LAYERS };

typedef struct {
    int bf16, ternary, act, n_embd, n_ff, n_head, n_kv_head, head_dim, length, needed; /* for backward */
    int64_t batch;
    float eps, dropout;
    uint32_t seed;
    char *weights;                 /* packed, layer by layer */
    char *saved[LAYERS], *scratch[3]; /* what each layer leaves for backward; backward */
    int64_t saved_bytes[LAYERS], scratch_bytes[3]; /* that are wanted there */
    const float *cos, *sin;        /* (length, head_dim / 2) */
    const float *x;                /* (M, n_embd) */
    float *out;                    /* forward: (M, n_embd) */
    const float *grad_out;         /* backward: (M, n_embd) */
    float *grad_x;
    const float *norms[LAYERS];    /* (K) of the layer, or NULL */
    float *grad_norms[LAYERS], *grad_weights[LAYERS]; /* backward: (K); (N, K) */
} block;

typedef struct {
    packed weights[LAYERS];
    void *transposed[LAYERS];      /* of each layer (K + HIGH, M), values or int8; NULL: no backward */
    float *rstd[LAYERS], *scale[LAYERS]; /* (M) */
    void *qkv, *y, *gate_up;       /* values (M + HIGH, (n_head + 2 n_kv_head) head_dim), (M, n_embd), (M, 2 n_ff) */
    float *lse, *middle;           /* (batch, n_head, length); (M, n_embd), the stream behind attention */
    int32_t *sums;                 /* (M) */
    float *grad_middle;            /* backward: (M, n_embd) */
    void *grads[2];                /* values (M + HIGH, the widest product) */
    int64_t saved_bytes[LAYERS], scratch_bytes[3];
} memory;

ALWAYS drop drop_of(const block *b, uint32_t which) {
    return (drop){(b->seed + which) * 0x85ebca6bu, (uint32_t)(b->dropout * 4294967296.0), 1.0f / (1.0f - b->dropout)};
}
ALWAYS int inputs(const block *b, int i) { return i == DOWN ? b->n_ff : b->n_embd; }
ALWAYS int outputs(const block *b, int i) {
    return i == QKV ? (b->n_head + 2 * b->n_kv_head) * b->head_dim : i == GATE_UP ? 2 * b->n_ff : b->n_embd;
}

static memory memory_of(const block *b) {
    const int bf16 = b->bf16, kind = b->ternary ? INT8 : bf16;
    const int64_t M = b->batch * b->length;
    const size_t n = (size_t)M, size = bf16 ? 2 : 4;
    int widest = 0;
    arena weights = {b->weights, 0}, saved[LAYERS], scratch[3];
    memory m = {0};
    for (int i = 0; i < LAYERS; i++) {
        saved[i] = (arena){b->saved[i], 0};
        m.weights[i] = alloc_packed(&weights, bf16, b->ternary, outputs(b, i), inputs(b, i));
        if (b->needed) m.transposed[i] = alloc_rows(saved + i, kind, inputs(b, i), M);
        m.rstd[i] = arena_alloc(saved + i, 4 * n);
        if (b->ternary) m.scale[i] = arena_alloc(saved + i, 4 * n);
        widest = outputs(b, i) > widest ? outputs(b, i) : widest;
    }
    m.qkv = arena_alloc(saved + QKV, (n + HIGH) * (size_t)outputs(b, QKV) * size);
    m.lse = arena_alloc(saved + QKV, 4 * n * (size_t)b->n_head);
    m.sums = arena_alloc(saved + QKV, 4 * n);
    m.y = arena_alloc(saved + OUT, n * (size_t)b->n_embd * size);
    m.middle = arena_alloc(saved + OUT, 4 * n * (size_t)b->n_embd);
    m.gate_up = arena_alloc(saved + GATE_UP, n * (size_t)outputs(b, GATE_UP) * size);
    for (int i = 0; i < 3; i++) scratch[i] = (arena){b->scratch[i], 0};
    m.grad_middle = arena_alloc(scratch, 4 * n * (size_t)b->n_embd);
    for (int i = 0; i < 2; i++) m.grads[i] = alloc_rows(scratch + 1 + i, bf16, M, widest);
    for (int i = 0; i < LAYERS; i++) m.saved_bytes[i] = (int64_t)saved[i].size;
    for (int i = 0; i < 3; i++) m.scratch_bytes[i] = (int64_t)scratch[i].size;
    return m;
}

void fused_block_bytes(block *b) {
    memory in = memory_of(b);
    memcpy(b->saved_bytes, in.saved_bytes, sizeof in.saved_bytes);
    memcpy(b->scratch_bytes, in.scratch_bytes, sizeof in.scratch_bytes);
}

ALWAYS stage stage_of(const block *b, const memory *in, int i) {
    const void *from[] = {b->x, in->y, in->middle, in->gate_up};
    const int kinds[] = {STREAM, PLAIN, STREAM, GATED};
    return (stage){.kind = kinds[i], .bf16 = b->bf16, .act = b->act, .width = inputs(b, i), .n = b->batch * b->length,
                   .eps = b->eps, .x = from[i], .weight = b->norms[i], .transposed = in->transposed[i],
                   .rstd = in->rstd[i], .scale = in->scale[i], .sums = in->sums, .grad_weight = b->grad_norms[i]};
}

static void forward(const block *b, const memory *in, int i, const float *residual, void *y) {
    const packed *w = in->weights + i;
    stage s = stage_of(b, in, i);
    product p = {.N = outputs(b, i), .K = s.width, .panels = w->panels, .rows = s.scale, .columns = w->columns,
                 .sums = in->sums, .residual = residual, .drop = drop_of(b, (uint32_t)i),
                 .y = y, .away = outputs(b, i)};
    layer_forward(&s, &p);
}

/* Backward of layer i: the gradient of its weights, and that of its input. A row of the residual stream gets its
 * own in grad_x, plus `also`; what layer `before` made (-1: attention, which has no factors) gets it in grad_y,
 * times that layer's factors. */
static void backward(const block *b, const memory *in, int i, const void *grad, int before, const float *also,
                     float *grad_x, void *grad_y) {
    const packed *w = in->weights + i;
    stage s = stage_of(b, in, i);
    int N = outputs(b, i), kind = b->ternary ? INT8 : b->bf16;
    gradients(kind, b->bf16, s.n, N, s.width, s.transposed, row_stride(kind, s.n), grad, row_stride(b->bf16, N),
              w->columns, 0, b->grad_weights[i]);
    s.also = also, s.grad_x = grad_x, s.grad_y = grad_y;
    s.away = row_stride(b->bf16, i == OUT ? b->n_embd : outputs(b, (i + 3) % LAYERS));
    if (before >= 0) s.rows = in->scale[before], s.columns = in->weights[before].columns;
    if (i == GATE_UP) s.drop = drop_of(b, OUT);
    layer_backward(&s, N, w->back, grad);
}

static attention attention_of(const block *b, const memory *in) {
    return (attention){.bf16 = b->bf16, .B = b->batch, .T = b->length, .H = b->n_head, .G = b->n_kv_head,
                       .D = b->head_dim, .cos = b->cos, .sin = b->sin, .qkv = in->qkv, .y = in->y, .lse = in->lse,
                       .drop = drop_of(b, LAYERS)};
}

void fused_block_forward(const block *b) {
    const memory in = memory_of(b);
    forward(b, &in, QKV, NULL, in.qkv);
    attention a = attention_of(b, &in);
    attention_forward(&a);
    forward(b, &in, OUT, b->x, in.middle);
    forward(b, &in, GATE_UP, NULL, in.gate_up);
    forward(b, &in, DOWN, in.middle, b->out);
}

void fused_block_backward(const block *b) {
    const memory in = memory_of(b);
    stage s = {.kind = STREAM, .bf16 = b->bf16, .width = b->n_embd, .n = b->batch * b->length, .x = b->grad_out,
               .drop = drop_of(b, DOWN), .grad_y = in.grads[0], .away = row_stride(b->bf16, b->n_embd),
               .rows = in.scale[DOWN], .columns = in.weights[DOWN].columns};
    stage_values(&s);
    backward(b, &in, DOWN, in.grads[0], GATE_UP, NULL, NULL, in.grads[1]);
    backward(b, &in, GATE_UP, in.grads[1], OUT, b->grad_out, in.grad_middle, in.grads[0]);
    backward(b, &in, OUT, in.grads[0], -1, NULL, NULL, in.grads[1]);
    attention a = attention_of(b, &in);
    a.grad_y = in.grads[1], a.grad_qkv = in.grads[0], a.rows = in.scale[QKV], a.columns = in.weights[QKV].columns;
    attention_backward(&a);
    backward(b, &in, QKV, in.grads[0], -1, in.grad_middle, b->grad_x, NULL);
}

/* For the tests: a stage that does nothing but quantize rows x (n, width), of at most TOGETHER. */
void fused_quantize(int n, int width, const float *x, int8_t *out, float *scale, int32_t *sums) {
    stage s = {.kind = STREAM, .width = width, .n = n, .x = x, .scale = scale, .sums = sums};
    float *buffer = buffer_of(4 * (size_t)width);
    stage_forward(&s, 0, n, (char *)out, buffer);
    free(buffer);
}

/* And the sums (n, N) of a ternary product with such rows, which have some more behind them that may be read, times
 * what the trits are worth. weights: packed, with `back` in fp32 */
void fused_multiply(int n, int N, int K, const int8_t *x, const int32_t *sums, char *weights, float *y) {
    arena a = {weights, 0};
    packed w = alloc_packed(&a, 0, 1, N, K);
    product p = {.N = N, .K = K, .panels = w.panels, .columns = w.columns, .sums = sums, .y = y, .away = N};
    tiles before = begin_tiles();
    multiply_rows(INT8, 0, &p, 0, n, (const char *)x);
    end_tiles(before);
}

/* Of the structs that fused.py fills in, which looks whether it has the same fields. */
const int64_t fused_sizes[] = {sizeof(matrix), sizeof(packing), sizeof(block), sizeof(head), sizeof(muon)};
