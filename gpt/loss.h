/* The head: norm, logits, their cross-entropy and its gradients, before the next tokens' logits take the same memory. */
#pragma once
#include "stage.h"

ALWAYS v16 get_some(const char *p, int left, const int bf16) {
    if (left >= 16) return get(p, bf16);
    char bytes[64] = {0};
    memcpy(bytes, p, (size_t)left * (bf16 ? 2 : 4));
    return choose((i16)(lanes() < left), get(bytes, bf16), all(-INFINITY));
}

/* Nats at the target of a row of V logits, which with a weight become their gradient: weight * (softmax - 1 at the target),
 * and zeros as far as `whole`. */
ALWAYS float cross_entropy(const int bf16, char *l, int V, int whole, int64_t target, float weight) {
    if (target < 0 || target >= V) return NAN;
    v16 most = all(-INFINITY), total = {0};
    for (int i = 0; i < V; i += 16) most = max16(most, get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16));
    float top = max_of(most), at_target = get_some(l + (bf16 ? 2 : 4) * target, 1, bf16)[0];
    for (int i = 0; i < V; i += 16) {
        v16 e = exp16(get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16) - top);
        total += i + 16 <= V ? e : choose((i16)(lanes() < V - i), e, all(0.0f));
    }
    float sum = sum_of(total);
    for (int i = 0; weight && i < whole; i += 16) {
        v16 g = {0};
        if (i < V) g = exp16(get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16) - top) * (weight / sum);
        if (target >= i && target < i + 16) g -= choose((i16)(lanes() == (int)(target - i)), all(weight), all(0.0f));
        put(l + (bf16 ? 2 : 4) * i, g, bf16);
    }
    return logf(sum) + top - at_target;
}

typedef struct {
    int bf16, width, vocab, chunk; /* tokens whose logits are in memory at once, a multiple of 16 */
    int64_t M;
    float eps, weight;             /* of a token in the mean; 0: no gradients */
    const float *x, *norm;         /* (M, width), (width) */
    const void *panels, *back;     /* packed (vocab, width) */
    const int64_t *targets;        /* (M) */
    float *losses;                 /* (M) */
    void *rows, *turned;           /* values (M + HIGH, whole lines): scratch; (width + HIGH, M + PAD) */
    float *inverse;                /* (M) */
    void *logits;                  /* values (chunk + HIGH, whole lines): scratch */
    void *grad_rows;               /* values (M, width) */
    float *grad_head;              /* (vocab, width) */
    float *grad_x, *grad_norm;     /* backward: (M, width); (width) */
} head;

ALWAYS stage stage_of_head(const head *h) {
    return (stage){.kind = STREAM, .bf16 = h->bf16, .width = h->width, .n = h->M, .eps = h->eps, .x = h->x, .weight = h->norm,
                   .out = h->rows, .turned = h->turned, .inverse = h->inverse, .grad = h->grad_rows, .grad_x = h->grad_x,
                   .grad_weight = h->grad_norm};
}

static void head_forward(const head *h) {
    int bf16 = h->bf16, whole = words_of(bf16, h->vocab) << bf16, row = words_of(bf16, h->width) << bf16;
    stage s = stage_of_head(h);
    stage_forward(&s);
    for (int64_t a = 0; a < h->M; a += h->chunk) {
        int64_t n = h->M - a < h->chunk ? h->M - a : h->chunk;
        multiply_values(bf16, bf16, (product){.M = n, .N = h->vocab, .K = h->width, .x = AT(h->rows, a * row), .panels = h->panels,
                                              .y = h->logits, .apart = whole});
#pragma omp parallel for schedule(static)
        for (int64_t m = 0; m < n; m++) {
            char *logits = TO(h->logits, m * whole);
            int64_t target = h->targets[a + m];
            h->losses[a + m] = bf16 ? cross_entropy(1, logits, h->vocab, whole, target, h->weight)
                                    : cross_entropy(0, logits, h->vocab, whole, target, h->weight);
        }
        if (!h->weight) continue;
        multiply_values(bf16, bf16, (product){.M = n, .N = h->width, .K = h->vocab, .x = h->logits, .panels = h->back,
                                              .y = TO(h->grad_rows, a * h->width), .apart = h->width});
        gradients(bf16, n, h->vocab, h->width, AT(h->turned, a), h->M + PAD, h->logits, whole, NULL, a > 0, h->grad_head);
    }
}
