/* Muon's step of some matrices: momentum, five Newton-Schulz steps from U S V^T towards U V^T, decay.
 * https://kellerjordan.github.io/posts/muon/ A thread takes a whole matrix through all of it, in its own caches. */
#pragma once
#include "matmul.h"

typedef struct {
    int bf16, count;                      /* of matrices, fp32 */
    const int *rows, *columns;            /* of each, multiples of 16 */
    float *const *weights, *const *momenta;
    const float *const *grads;
    float momentum, rate, decay;
} muon;

/* A matrix at work: N its smaller side, K the other one, `tall` where its rows are K. All in values. */
typedef struct {
    int N, K, tall;
    char *plain, *x;                      /* a tall one as it is (K, N); (N + HIGH, K) */
    char *gram, *step;                    /* (N + HIGH, N): x x^T; what x is multiplied with */
    char *panels;
} work;

ALWAYS size_t matrix_bytes(const int bf16, int rows, int columns) {
    return (size_t)((rows + HIGH) * row_stride(bf16, columns)) * (bf16 ? 2 : 4);
}

/* y = share * residual + by * x times panels, symmetric (N, N): computed on and right of the diagonal, and mirrored. */
ALWAYS void symmetric(const int bf16, product p, const char *x) {
    int64_t row = row_stride(bf16, p.K), away = p.away;
    int high = HIGH * (p.N / (8 * HIGH)); /* the more rows at a time, the more is computed left of it */
    high = high < HIGH ? HIGH : high < TOGETHER ? high : TOGETHER / HIGH * HIGH;
    for (int m = 0; m < p.N; m += high) {
        p.first = m / 32 * 2;
        multiply_rows(bf16, bf16, &p, m, p.N - m < high ? p.N - m : high, AT(x, m * row));
    }
    for (int m = 0; m + 32 < p.N; m += 32)
        transpose_rows(bf16, 32, p.N - m - 32, AT(p.y, m * away + m + 32), away, TO(p.y, (m + 32) * away + m), away);
}

/* Rows of x (N, K) as panels */
ALWAYS void pack_all(const int bf16, int N, int K, const char *x, char *panels) {
    int words = words_of(bf16, K);
    int64_t row = row_stride(bf16, K);
    for (int n = 0; n < N; n += 16)
        pack_rows(words, AT(x, n * row), 4 * (row >> bf16), panels + 4 * (size_t)n * (size_t)words);
}

/* x of norm 1 -> near U V^T: singular values end between 0.7 and 1.2. */
ALWAYS void orthogonalize(const int bf16, const work *b) {
    const int N = b->N, K = b->K;
    const int64_t wide = row_stride(bf16, K), narrow = row_stride(bf16, N);
    const product gram = {.N = N, .K = K, .panels = b->panels, .y = b->gram, .away = narrow};
    const product step = {.N = N, .K = N, .panels = b->panels, .y = b->step, .away = narrow,
                          .residual = b->gram, .share = -4.7750f, .by = 2.0315f};
    const product next = {.N = K, .K = N, .panels = b->panels, .y = b->x, .away = wide,
                          .residual = b->x, .share = 3.4445f, .by = 1.0f};
    for (int i = 0; i < 5; i++) {
        pack_all(bf16, N, K, b->x, b->panels);
        symmetric(bf16, gram, b->x);
        pack_all(bf16, N, N, b->gram, b->panels);
        symmetric(bf16, step, b->gram);
        pack_columns(bf16, K / 16, N, words_of(bf16, N), b->x, wide, b->panels, words_of(bf16, N));
        for (int m = 0; m < N; m += TOGETHER)
            multiply_rows(bf16, bf16, &next, m, N - m < TOGETHER ? N - m : TOGETHER, AT(b->step, m * narrow));
    }
}

/* Nesterov's: the gradient and what it will have made of the momentum */
ALWAYS vf ahead(const muon *s, int i, int64_t j) {
    vf grad = load(s->grads[i] + j);
    return grad + s->momentum * (load(s->momenta[i] + j) - grad);
}

/* Matrix i. */
ALWAYS void muon_step(const int bf16, const muon *s, int i, const work *b) {
    const int rows = s->rows[i], columns = s->columns[i];
    const int64_t all = (int64_t)rows * columns, row = row_stride(bf16, columns), wide = row_stride(bf16, b->K);
    vf squares[WAYS] = {{0}};
    for (int64_t j = 0; j < all; j += 16)
        EACH_WAY(u) {
            float *momentum = s->momenta[i] + j + LANES * u;
            vf m = load(momentum), grad = load(s->grads[i] + j + LANES * u);
            store(momentum, m + (1.0f - s->momentum) * (grad - m));
            vf g = ahead(s, i, j + LANES * u);
            squares[u] = fmav(g, g, squares[u]);
        }
    float norm = sqrtf(sum_of(squares)), inverse = 1.0f / (norm > 1e-7f ? norm : 1e-7f);
    memset(b->x, 0, matrix_bytes(bf16, b->N, b->K));
    memset(b->gram, 0, matrix_bytes(bf16, b->N, b->N));
    memset(b->step, 0, matrix_bytes(bf16, b->N, b->N));
    char *plain = b->tall ? b->plain : b->x;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c += LANES)
            put(TO(plain, r * row + c), ahead(s, i, (int64_t)r * columns + c) * inverse, bf16);
    if (b->tall) transpose_rows(bf16, rows, columns, plain, row, b->x, wide);
    orthogonalize(bf16, b);
    if (b->tall) transpose_rows(bf16, columns, rows, b->x, wide, plain, row);
    float kept = 1.0f - s->rate * s->decay, rate = s->rate * (b->tall ? sqrtf((float)rows / (float)columns) : 1.0f);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c += LANES) {
            float *w = s->weights[i] + (int64_t)r * columns + c;
            store(w, load(w) * kept - rate * get(AT(plain, r * row + c), bf16));
        }
}

ALWAYS size_t more_of(size_t a, size_t b) { return a > b ? a : b; }

void fused_muon(const muon *s) {
    const int bf16 = s->bf16;
    size_t plain = 64, x = 64, square = 64, panels = 64; /* the most that a matrix takes */
    for (int i = 0; i < s->count; i++) {
        int rows = s->rows[i], columns = s->columns[i], N = rows < columns ? rows : columns, K = rows + columns - N;
        plain = more_of(plain, matrix_bytes(bf16, rows, columns));
        x = more_of(x, matrix_bytes(bf16, N, K));
        square = more_of(square, matrix_bytes(bf16, N, N));
        panels = more_of(panels, 4 * (size_t)N * (size_t)words_of(bf16, K));
        panels = more_of(panels, 4 * (size_t)K * (size_t)words_of(bf16, N));
    }
#pragma omp parallel
    {
        work b = {.plain = buffer_of(plain), .x = buffer_of(x), .gram = buffer_of(square),
                  .step = buffer_of(square), .panels = buffer_of(panels)};
        tiles before = begin_tiles();
#pragma omp for schedule(dynamic)
        for (int i = 0; i < s->count; i++) {
            b.tall = s->rows[i] > s->columns[i];
            b.N = b.tall ? s->columns[i] : s->rows[i], b.K = b.tall ? s->rows[i] : s->columns[i];
            if (bf16) muon_step(1, s, i, &b);
            else muon_step(0, s, i, &b);
        }
        end_tiles(before);
        free(b.plain), free(b.x), free(b.gram), free(b.step), free(b.panels);
    }
}
