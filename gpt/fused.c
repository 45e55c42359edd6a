/* A training step of the model's blocks and head: products, and what stands between them in as few passes over memory as
 * can be; and of Muon, the optimizer of the blocks' matrices.
 *
 * A layer is a stage and a product. The stage (stage.h) takes rows, plain or gated, norms them, and for the ternary twin
 * quantizes them; the product (product.h) multiplies with packed weights and adds to the residual stream what belongs there.
 * A block is four layers (q, k, v; o; gate, up; down) with attention (attention.h) between the first two. What backward
 * needs of a layer is its input, transposed, as it went into the product: one byte a value where it was int8.
 *
 * Rows are tokens, M = batch * length. "Values" are bf16 or fp32, all other floats fp32. Gradients of a ternary product are
 * those of its integer sums, so they carry the factors of its row (scale) and of its column (columns).
 * Threads are OpenMP's, those that torch has already: built without a libgomp of its own (engine/build.py). Gradients of
 * norms are added up thread by thread, so results repeat with the same number of threads. */
#include "attention.h"
#include "loss.h"
#include "muon.h"
#include "stage.h"

enum { QKV, OUT, GATE_UP, DOWN, LAYERS };

typedef struct {
    int bf16, ternary, act, width, hidden, heads, groups, head, length, needed; /* for backward */
    int64_t batch;
    float eps, dropout;
    uint32_t seed;
    char *weights;                 /* packed, layer by layer */
    char *kept[LAYERS], *scratch[3]; /* what each layer leaves for backward; backward */
    int64_t kept_bytes[LAYERS], scratch_bytes[3]; /* that are wanted there */
    const float *cos, *sin;        /* (length, head / 2) */
    const float *x;                /* (M, width) */
    float *out;                    /* forward: (M, width) */
    const float *grad_out;         /* backward: (M, width) */
    float *grad_x;
    const float *norms[LAYERS];    /* (K) of the layer, or NULL */
    float *grad_norms[LAYERS], *grad_weights[LAYERS]; /* backward: (K); (N, K) */
} block;

typedef struct {
    packed weights[LAYERS];
    void *transposed[LAYERS];      /* of each layer (K + HIGH, M), values or int8; NULL: no backward */
    float *rstd[LAYERS], *scale[LAYERS]; /* (M) */
    void *qkv, *y, *gate_up;       /* values (M + HIGH, (heads + 2 groups) head), (M, width), (M, 2 hidden) */
    float *lse, *middle;           /* (batch, heads, length); (M, width), the stream behind attention */
    int32_t *sums;                 /* (M) */
    float *grad_middle;            /* backward: (M, width) */
    void *grads[2];                /* values (M + HIGH, the widest product) */
    int64_t kept_bytes[LAYERS], scratch_bytes[3];
} memory;

ALWAYS drop drop_of(const block *b, uint32_t which) {
    return (drop){(b->seed + which) * 0x85ebca6bu, (uint32_t)(b->dropout * 4294967296.0), 1.0f / (1.0f - b->dropout)};
}
ALWAYS int inputs(const block *b, int i) { return i == DOWN ? b->hidden : b->width; }
ALWAYS int outputs(const block *b, int i) {
    return i == QKV ? (b->heads + 2 * b->groups) * b->head : i == GATE_UP ? 2 * b->hidden : b->width;
}

static memory memory_of(const block *b) {
    const int bf16 = b->bf16, kind = b->ternary ? INT8 : bf16;
    const int64_t M = b->batch * b->length;
    const size_t n = (size_t)M, size = bf16 ? 2 : 4;
    int widest = 0;
    room weights = {b->weights, 0}, kept[LAYERS], scratch[3];
    memory m = {0};
    for (int i = 0; i < LAYERS; i++) {
        kept[i] = (room){b->kept[i], 0};
        m.weights[i] = take_packed(&weights, bf16, b->ternary, outputs(b, i), inputs(b, i));
        if (b->needed) m.transposed[i] = take_rows(kept + i, kind, inputs(b, i), M);
        m.rstd[i] = take(kept + i, 4 * n);
        if (b->ternary) m.scale[i] = take(kept + i, 4 * n);
        widest = outputs(b, i) > widest ? outputs(b, i) : widest;
    }
    m.qkv = take(kept + QKV, (n + HIGH) * (size_t)outputs(b, QKV) * size);
    m.lse = take(kept + QKV, 4 * n * (size_t)b->heads);
    m.sums = take(kept + QKV, 4 * n);
    m.y = take(kept + OUT, n * (size_t)b->width * size);
    m.middle = take(kept + OUT, 4 * n * (size_t)b->width);
    m.gate_up = take(kept + GATE_UP, n * (size_t)outputs(b, GATE_UP) * size);
    for (int i = 0; i < 3; i++) scratch[i] = (room){b->scratch[i], 0};
    m.grad_middle = take(scratch, 4 * n * (size_t)b->width);
    for (int i = 0; i < 2; i++) m.grads[i] = take_rows(scratch + 1 + i, bf16, M, widest);
    for (int i = 0; i < LAYERS; i++) m.kept_bytes[i] = (int64_t)kept[i].size;
    for (int i = 0; i < 3; i++) m.scratch_bytes[i] = (int64_t)scratch[i].size;
    return m;
}

void fused_block_bytes(block *b) {
    memory in = memory_of(b);
    memcpy(b->kept_bytes, in.kept_bytes, sizeof in.kept_bytes);
    memcpy(b->scratch_bytes, in.scratch_bytes, sizeof in.scratch_bytes);
}

ALWAYS stage stage_of(const block *b, const memory *in, int i) {
    const void *from[] = {b->x, in->y, in->middle, in->gate_up};
    const int kinds[] = {STREAM, PLAIN, STREAM, GATED};
    return (stage){.kind = kinds[i], .bf16 = b->bf16, .act = b->act, .width = inputs(b, i), .n = b->batch * b->length,
                   .eps = b->eps, .x = from[i], .weight = b->norms[i], .transposed = in->transposed[i], .rstd = in->rstd[i],
                   .scale = in->scale[i], .sums = in->sums, .grad_weight = b->grad_norms[i]};
}

static void forward(const block *b, const memory *in, int i, const float *residual, void *y) {
    const packed *w = in->weights + i;
    stage s = stage_of(b, in, i);
    product p = {.N = outputs(b, i), .K = s.width, .panels = w->panels, .rows = s.scale, .columns = w->columns,
                 .sums = in->sums, .residual = residual, .drop = drop_of(b, (uint32_t)i), .y = y, .away = outputs(b, i)};
    layer_forward(&s, &p);
}

/* From the gradient of the layer's product to that of its input: of what layer `before` multiplied (-1: there is none), with
 * its factors; and for rows of the residual stream grad_x, to which `also` is added. */
static void backward(const block *b, const memory *in, int i, const void *grad, int before, const float *also,
                     float *grad_x, void *grad_y) {
    const packed *w = in->weights + i;
    stage s = stage_of(b, in, i);
    int N = outputs(b, i), kind = b->ternary ? INT8 : b->bf16;
    gradients(kind, b->bf16, s.n, N, s.width, s.transposed, row_stride(kind, s.n), grad, row_stride(b->bf16, N), w->columns, 0,
              b->grad_weights[i]);
    s.also = also, s.grad_x = grad_x, s.grad_y = grad_y;
    s.away = row_stride(b->bf16, i == OUT ? b->width : outputs(b, (i + 3) % LAYERS));
    if (before >= 0) s.rows = in->scale[before], s.columns = in->weights[before].columns;
    if (i == GATE_UP) s.drop = drop_of(b, OUT);
    layer_backward(&s, N, w->back, grad);
}

static attention attention_of(const block *b, const memory *in) {
    return (attention){.bf16 = b->bf16, .B = b->batch, .T = b->length, .H = b->heads, .G = b->groups, .D = b->head,
                       .cos = b->cos, .sin = b->sin, .qkv = in->qkv, .y = in->y, .lse = in->lse, .drop = drop_of(b, LAYERS)};
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
    stage s = {.kind = STREAM, .bf16 = b->bf16, .width = b->width, .n = b->batch * b->length, .x = b->grad_out,
               .drop = drop_of(b, DOWN), .grad_y = in.grads[0], .away = row_stride(b->bf16, b->width),
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

/* And the sums (n, N) of a ternary product with such rows, which have some more behind them that may be read, times what the
 * trits are worth. weights: packed, with `back` in fp32 */
void fused_multiply(int n, int N, int K, const int8_t *x, const int32_t *sums, char *weights, float *y) {
    room r = {weights, 0};
    packed w = take_packed(&r, 0, 1, N, K);
    product p = {.N = N, .K = K, .panels = w.panels, .columns = w.columns, .sums = sums, .y = y, .away = N};
    tiles before = begin_tiles();
    multiply_rows(INT8, 0, &p, 0, n, (const char *)x);
    end_tiles(before);
}
