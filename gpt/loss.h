/* The head: norm, logits, their cross-entropy and its gradients, chunk by chunk in the same memory. */
#pragma once
#include "stage.h"

ALWAYS vf get_some(const char *p, int left, const int bf16) {
    if (left >= LANES) return get(p, bf16);
    if (LANES < 16 && left <= 0) return splat(-INFINITY);
    char bytes[64] = {0};
    memcpy(bytes, p, (size_t)left * (bf16 ? 2 : 4));
    return blend((vi)(lanes() < left), get(bytes, bf16), splat(-INFINITY));
}

/* Nats at the target of a row of V logits, which with a weight become their gradient: weight * (softmax - 1 at the
 * target), and zeros as far as `whole`. */
ALWAYS float cross_entropy(const int bf16, char *l, int V, int whole, int64_t target, float weight) {
    if (target < 0 || target >= V) return NAN;
    vf most[WAYS], total[WAYS] = {{0}};
    EACH_WAY(u) most[u] = splat(-INFINITY);
    for (int i = 0; i < V; i += 16)
        EACH_WAY(u) most[u] = maxv(most[u], get_some(TO(l, i + LANES * u), V - i - LANES * u, bf16));
    float top = max_of(most), at_target = get_some(TO(l, target), 1, bf16)[0];
    for (int i = 0; i < V; i += 16)
        EACH_WAY(u) {
            int left = V - i - LANES * u;
            vf x = get_some(TO(l, i + LANES * u), left, bf16) - top;
            vf e = blend((vi)(x == x), expv(x), x); /* NaN stays NaN */
            total[u] += left >= LANES ? e : blend((vi)(lanes() < left), e, splat(0.0f));
        }
    float sum = sum_of(total);
    for (int i = 0; weight && i < whole; i += LANES) {
        vf g = {0};
        if (i < V) g = expv(get_some(TO(l, i), V - i, bf16) - top) * (weight / sum);
        if (target >= i && target < i + LANES)
            g -= blend((vi)(lanes() == (int)(target - i)), splat(weight), splat(0.0f));
        put(TO(l, i), g, bf16);
    }
    return logf(sum) + top - at_target;
}

typedef struct {
    int bf16, width, vocab, chunk; /* tokens whose logits are in memory at once, a multiple of 32 */
    int64_t M;
    float eps, weight;             /* of a token in the mean; 0: no gradients */
    char *weights;                 /* packed (vocab, width) */
    char *scratch;
    int64_t scratch_bytes;         /* that are wanted there by forward */
    const float *x, *norm;         /* (M, width), (width) */
    const int64_t *targets;        /* (M) */
    float *losses, *rstd;          /* (M) */
    void *grad_rows;               /* values (M, width) */
    float *grad_head;              /* (vocab, width) */
    float *grad_x, *grad_norm;     /* backward: (M, width); (width) */
} head;

typedef struct {
    packed weights;
    void *transposed;              /* values (width + HIGH, M) */
    void *logits;                  /* values (chunk + HIGH, vocab in whole lines) */
    size_t scratch;                /* bytes of both */
} head_memory;

ALWAYS head_memory memory_of_head(const head *h) {
    arena weights = {h->weights, 0}, scratch = {h->scratch, 0};
    head_memory m = {.weights = alloc_packed(&weights, h->bf16, 0, h->vocab, h->width)};
    if (h->weight) m.transposed = alloc_rows(&scratch, h->bf16, h->width, h->M);
    m.logits = alloc_rows(&scratch, h->bf16, h->chunk, h->vocab);
    m.scratch = scratch.size;
    return m;
}

void fused_head_bytes(head *h) { h->scratch_bytes = (int64_t)memory_of_head(h).scratch; }

ALWAYS stage stage_of_head(const head *h, void *transposed) {
    return (stage){.kind = STREAM, .bf16 = h->bf16, .width = h->width, .n = h->M, .eps = h->eps, .x = h->x,
                   .weight = h->norm, .transposed = transposed, .rstd = h->rstd, .grad_x = h->grad_x,
                   .grad_weight = h->grad_norm};
}

/* Of rows m ... m + rows - 1 logits, losses, and gradients into the memory of the logits. */
ALWAYS void head_rows(const int bf16, const head *h, const head_memory *in, int64_t first, int64_t m, int rows,
                      const char *x) {
    int whole = words_of(bf16, h->vocab) << bf16;
    int64_t row = row_stride(bf16, h->vocab);
    product p = {.N = h->vocab, .K = h->width, .panels = in->weights.panels, .y = in->logits, .away = row};
    multiply_rows(bf16, bf16, &p, m - first, rows, x);
    for (int64_t i = m; i < m + rows; i++)
        h->losses[i] = cross_entropy(bf16, TO(in->logits, (i - first) * row), h->vocab, whole, h->targets[i],
                                     h->weight);
    if (!h->weight) return;
    product back = {.N = h->width, .K = h->vocab, .panels = in->weights.back, .away = h->width};
    back.y = TO(h->grad_rows, first * h->width);
    multiply_rows(bf16, bf16, &back, m - first, rows, TO(in->logits, (m - first) * row));
}

void fused_head_forward(const head *h) {
    int bf16 = h->bf16;
    const head_memory in = memory_of_head(h);
    stage s = stage_of_head(h, in.transposed);
    for (int64_t first = 0; first < h->M; first += h->chunk) {
        int64_t n = h->M - first < h->chunk ? h->M - first : h->chunk;
        double start = omp_get_wtime();
#pragma omp parallel
        {
            size_t row = (size_t)(row_stride(bf16, h->width) * (4 >> bf16));
            char *x = buffer_of(row * (TOGETHER + HIGH));
            float *buffer = buffer_of(4 * row);
            tiles before = begin_tiles();
            EACH_ROWS(n) {
                stage_forward(&s, first + m, (int)rows, x, buffer);
                if (bf16) head_rows(1, h, &in, first, first + m, (int)rows, x);
                else head_rows(0, h, &in, first, first + m, (int)rows, x);
            }
            end_tiles(before);
            free(x), free(buffer);
        }
        since(LOSS, start);
        if (h->weight)
            gradients(bf16, bf16, n, h->vocab, h->width, AT(in.transposed, first), row_stride(bf16, h->M), in.logits,
                      row_stride(bf16, h->vocab), NULL, first > 0, h->grad_head);
    }
}

void fused_head_backward(const head *h) {
    stage s = stage_of_head(h, NULL);
    int threads = omp_get_max_threads();
    double start = omp_get_wtime();
    size_t width = (size_t)h->width;
    float *parts = zeros_of(sizeof(float) * (size_t)threads * width);
#pragma omp parallel
    {
        float *buffer = buffer_of(4 * width);
        EACH_ROWS(s.n)
            stage_backward(&s, m, (int)rows, (char *)h->grad_rows + (size_t)m * width * (h->bf16 ? 2 : 4),
                           parts + (size_t)omp_get_thread_num() * width, buffer);
        free(buffer);
    }
    add_up(&s, threads, parts);
    free(parts);
    since(LOSS, start);
}
