/* Tokens made ready for a matrix product: normed, quantized to int8, laid out in tiles.
 * Neighbours: model.h (the structs), product.h (what comes next). */
#pragma once
#include "model.h"

static void free_activation(activation *a) {
    free(a->x), free(a->f), free(a->scale), free(a->sum);
    *a = (activation){0};
}

static bool make_activation(activation *a, int rows, int k, bool floats) {
    size_t kp = (size_t)round_up(round_up(k, 80), 64);
    rows += MOST_TOKENS; /* the last tile may be cut short */
    free_activation(a);
    a->x = alloc_zeroed((size_t)rows * kp);
    a->f = alloc_zeroed(floats ? sizeof(float) * (size_t)rows * kp : 0);
    a->scale = alloc_zeroed(sizeof(float) * (size_t)rows);
    a->sum = alloc_zeroed(sizeof(int32_t) * (size_t)rows);
    return a->x && a->f && a->scale && a->sum;
}

static void lay_out(activation *a, int tokens, int limbs, int k, const matrix *w) {
    int rows = tokens * limbs, most = w->kind == BF16 ? FTOKENS : rows <= FEW_ROWS ? FEW : GEMM_TOKENS;
    bool amx = has_tiles && w->kind != BF16 && rows > FEW_ROWS;
    a->tokens = tokens, a->limbs = limbs, a->rows = rows;
    a->tiles = (rows + most - 1) / most;
    a->T = amx ? 16 : (rows + a->tiles - 1) / a->tiles;
    a->tiles = (rows + a->T - 1) / a->T;
    a->W = amx ? 64 : 4;
    a->k = round_up(round_up(k, 80), a->W);
}

/* Where tile i begins from a column on (a multiple of W); a row; and where column i (of 4) of a row lies from there. */
static int8_t *tile_at(const activation *a, int i, int column) {
    return a->x + ((size_t)i * (size_t)a->k + (size_t)column) * (size_t)a->T;
}
static int8_t *row_at(const activation *a, int row) { return tile_at(a, row / a->T, 0) + row % a->T * a->W; }
ALWAYS size_t column_at(const activation *a, int i) {
    return (size_t)(i & -a->W) * (size_t)a->T + (size_t)(i & (a->W - 1));
}

static int limbs_for(const matrix *w) { return w->kind == Q8 || w->kind == Q6 ? 2 : 1; }

/* Computed anew wherever it is wanted: kept, it would be one more row of memory to write and to evict. */
ALWAYS vf normed(const float *x, const float *weight, float inverse, int i) {
    return weight ? load(x + i) * inverse * load(weight + i) : load(x + i);
}

/* Token t of `a` from x (k floats, padded with zeros to 16): RMSNorm where there is a weight, then int8.
 * s = 127 / max|x|.clamp(1e-5), x_i8 = round(x * s).clamp(-128, 127), x_scale = 1 / s: arXiv 2310.11453, eq. 4,
 * in the order of operations of transformers' BitLinear. The head's two parts are the same with 127 * 254. */
static void quantize(activation *a, int t, const float *x, int k, const float *weight, float eps, const matrix *w) {
    int kp = round_up(k, 16), T = a->T;
    float inverse = weight ? 1.0f / sqrtf(sum_squares(x, kp) / (float)k + eps) : 1.0f;
    if (w->kind == BF16) {
        float *to = a->f + (size_t)(t / T) * (size_t)a->k * (size_t)T + t % T;
        for (int i = 0; i < a->k; i += LANES) {
            vf v = i < kp ? normed(x, weight, inverse, i) : (vf){0};
            for (int j = 0; j < LANES && i + j < a->k; j++) to[(size_t)(i + j) * (size_t)T] = v[j];
        }
        return;
    }
    vf most[WAYS] = {{0}};
    for (int i = 0; i < kp; i += LANES) most[0] = maxv(most[0], absv(normed(x, weight, inverse, i)));
    float top = max_of(most);
    if (top < 1e-5f) top = 1e-5f;
    float s = 1.0f / top * (a->limbs == 2 ? 127.0f * 254.0f : 127.0f); /* torch divides a number by a tensor so */
    a->scale[t] = 1.0f / s;
    for (int part = 0; part < a->limbs; part++) {
        int row = t * a->limbs + part;
        int8_t *to = row_at(a, row);
        vi total = {0};
        for (int i = 0; i < kp; i += LANES) {
            vf v = roundv(normed(x, weight, inverse, i) * s);
            if (a->limbs == 2) {
                vf high = roundv(v * (1.0f / 254.0f));
                v = part ? v - high * 254.0f : high;
            } else {
                v = maxv(minv(v, splat(127.0f)), splat(-128.0f));
            }
            vi q = toint(v);
            vb bytes = tobytes(q);
            total += q;
            if (T == 1 || a->W >= LANES) memcpy(to + column_at(a, i), &bytes, LANES);
            else for (int j = 0; j < LANES; j += 4) memcpy(to + column_at(a, i + j), (int8_t *)&bytes + j, 4);
        }
        for (int i = kp; i < a->k; i += 4) memset(to + column_at(a, i), 0, 4);
        a->sum[row] = sum_ofi(total);
    }
}
