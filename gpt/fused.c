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
    const float *norm;     /* (K), or NULL */
    const void *panels;    /* packed weights (N, K), values or trits; and `back`, values (K, N) */
    const void *back;
    const float *columns;  /* (N): the scale of a column's trits; NULL: values */
    void *transposed;          /* (K + HIGH, M), NULL: no backward */
    float *rstd, *scale;        /* (M) */
    float *grad_norm, *grad_weight;  /* (K); (N, K) */
} layer;

typedef struct {
    int bf16, act, width, hidden, heads, groups, head, length;
    int64_t batch;
    float eps, dropout;
    uint32_t seed;
    layer layers[LAYERS];
    const float *cos, *sin;        /* (length, head / 2) */
    const float *x;                /* (M, width) */
    void *qkv, *y, *gate_up;       /* values (M + HIGH, (heads + 2 groups) head), (M, width), (M, 2 hidden) */
    float *lse, *middle, *out;    /* (batch, heads, length); the stream behind attention, and behind the block */
    int32_t *sums;                 /* (M): scratch */
    const float *grad_out;         /* backward: (M, width) */
    float *grad_middle, *grad_x;
    void *grads[2];                /* values (M + HIGH, the widest product): scratch */
} block;

ALWAYS drop drop_of(const block *b, uint32_t which) {
    return (drop){(b->seed + which) * 0x85ebca6bu, (uint32_t)(b->dropout * 4294967296.0), 1.0f / (1.0f - b->dropout)};
}
ALWAYS int inputs(const block *b, int i) { return i == DOWN ? b->hidden : b->width; }
ALWAYS int outputs(const block *b, int i) {
    return i == QKV ? (b->heads + 2 * b->groups) * b->head : i == GATE_UP ? 2 * b->hidden : b->width;
}

ALWAYS stage stage_of(const block *b, int i) {
    const layer *l = b->layers + i;
    const void *from[] = {b->x, b->y, b->middle, b->gate_up};
    const int kinds[] = {STREAM, PLAIN, STREAM, GATED};
    return (stage){.kind = kinds[i], .bf16 = b->bf16, .act = b->act, .width = inputs(b, i), .n = b->batch * b->length,
                   .eps = b->eps, .x = from[i], .weight = l->norm, .transposed = l->transposed, .rstd = l->rstd,
                   .scale = l->columns ? l->scale : NULL, .sums = b->sums, .grad_weight = l->grad_norm};
}

static void forward(const block *b, int i, const float *residual, void *y) {
    const layer *l = b->layers + i;
    stage s = stage_of(b, i);
    product p = {.N = outputs(b, i), .K = s.width, .panels = l->panels, .rows = s.scale, .columns = l->columns,
                 .sums = b->sums, .residual = residual, .drop = drop_of(b, (uint32_t)i), .y = y, .away = outputs(b, i)};
    layer_forward(&s, &p);
}

/* From the gradient of the layer's product to that of its input: of what `before` multiplied, with its factors; and for rows
 * of the residual stream grad_x, to which `also` is added. */
static void backward(const block *b, int i, const void *grad, const layer *before, const float *also, float *grad_x,
                     void *grad_y) {
    const layer *l = b->layers + i;
    stage s = stage_of(b, i);
    int N = outputs(b, i), kind = l->columns ? INT8 : b->bf16;
    gradients(kind, b->bf16, s.n, N, s.width, l->transposed, row_stride(kind, s.n), grad,
              row_stride(b->bf16, N), l->columns, 0, l->grad_weight);
    s.also = also, s.grad_x = grad_x, s.grad_y = grad_y;
    s.away = row_stride(b->bf16, i == OUT ? b->width : outputs(b, (i + 3) % LAYERS));
    if (before && before->columns) s.rows = before->scale, s.columns = before->columns;
    if (i == GATE_UP) s.drop = drop_of(b, OUT);
    layer_backward(&s, N, l->back, grad);
}

static attention attention_of(const block *b) {
    return (attention){.bf16 = b->bf16, .B = b->batch, .T = b->length, .H = b->heads, .G = b->groups, .D = b->head,
                       .cos = b->cos, .sin = b->sin, .qkv = b->qkv, .y = b->y, .lse = b->lse, .drop = drop_of(b, LAYERS)};
}

void fused_block_forward(const block *b) {
    forward(b, QKV, NULL, b->qkv);
    attention a = attention_of(b);
    attention_forward(&a);
    forward(b, OUT, b->x, b->middle);
    forward(b, GATE_UP, NULL, b->gate_up);
    forward(b, DOWN, b->middle, b->out);
}

void fused_block_backward(const block *b) {
    const layer *l = b->layers;
    stage s = {.kind = STREAM, .bf16 = b->bf16, .width = b->width, .n = b->batch * b->length, .x = b->grad_out,
               .drop = drop_of(b, DOWN), .grad_y = b->grads[0], .away = row_stride(b->bf16, b->width)};
    if (l[DOWN].columns) s.rows = l[DOWN].scale, s.columns = l[DOWN].columns;
    stage_values(&s);
    backward(b, DOWN, b->grads[0], l + GATE_UP, NULL, NULL, b->grads[1]);
    backward(b, GATE_UP, b->grads[1], l + OUT, b->grad_out, b->grad_middle, b->grads[0]);
    backward(b, OUT, b->grads[0], NULL, NULL, NULL, b->grads[1]);
    attention a = attention_of(b);
    a.grad_y = b->grads[1], a.grad_qkv = b->grads[0];
    if (l[QKV].columns) a.rows = l[QKV].scale, a.columns = l[QKV].columns;
    attention_backward(&a);
    backward(b, QKV, b->grads[0], NULL, b->grad_middle, b->grad_x, NULL);
}

/* For the tests: a stage that does nothing but quantize rows x (n, width), of at most TOGETHER. */
void fused_quantize(int n, int width, const float *x, int8_t *out, float *scale, int32_t *sums) {
    stage s = {.kind = STREAM, .width = width, .n = n, .x = x, .scale = scale, .sums = sums};
    float *buffer = malloc(4 * (size_t)width);
    stage_forward(&s, 0, n, (char *)out, buffer);
    free(buffer);
}

/* And the sums (n, N) of a ternary product with such rows, which have some more behind them that may be read. */
void fused_multiply(int n, int N, int K, const int8_t *x, const int32_t *sums, const void *panels, float *y) {
    product p = {.N = N, .K = K, .panels = panels, .sums = sums, .y = y, .away = N};
    tiles before = begin_tiles();
    multiply_rows(INT8, 0, &p, 0, n, (const char *)x);
    end_tiles(before);
}
