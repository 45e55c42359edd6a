/* Cross-entropy and its gradient, a row of logits at a time. */
#pragma once
#include "values.h"

ALWAYS v16 get_some(const char *p, int left, const int bf16) {
    if (left >= 16) return get(p, bf16);
    char bytes[64] = {0};
    memcpy(bytes, p, (size_t)left * (bf16 ? 2 : 4));
    return choose((i16)(lanes() < left), get(bytes, bf16), all(-INFINITY));
}

ALWAYS float cross_entropy_row(const int bf16, char *l, int V, int64_t target, float weight) {
    if (target < 0 || target >= V) return NAN;
    v16 most = all(-INFINITY), total = {0};
    for (int i = 0; i < V; i += 16) most = max16(most, get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16));
    float top = max_of(most), at_target = get_some(l + (bf16 ? 2 : 4) * target, 1, bf16)[0];
    for (int i = 0; i < V; i += 16) {
        v16 e = exp16(get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16) - top);
        total += i + 16 <= V ? e : choose((i16)(lanes() < V - i), e, all(0.0f));
    }
    float sum = sum_of(total);
    if (weight) { /* the gradient: softmax, less 1 at the target */
        float each = weight / sum;
        for (int i = 0; i < V; i += 16) {
            v16 g = exp16(get_some(l + (bf16 ? 2 : 4) * i, V - i, bf16) - top) * each;
            if (target >= i && target < i + 16) g -= choose((i16)(lanes() == (int)(target - i)), all(weight), all(0.0f));
            if (i + 16 <= V) { put(l + (bf16 ? 2 : 4) * i, g, bf16); continue; }
            char bytes[64];
            put(bytes, g, bf16);
            memcpy(l + (bf16 ? 2 : 4) * i, bytes, (size_t)(V - i) * (bf16 ? 2 : 4));
        }
    }
    return logf(sum) + top - at_target;
}

/* losses (n) of logits (n, V), which with a weight become their gradients: weight * (softmax - 1 at the target). */
void fused_cross_entropy(int bf16, int64_t n, int V, void *logits, const int64_t *targets, float weight, float *losses) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < n; m++)
        losses[m] = bf16 ? cross_entropy_row(1, TO(logits, m * V), V, targets[m], weight)
                         : cross_entropy_row(0, TO(logits, m * V), V, targets[m], weight);
}
