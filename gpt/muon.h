/* Muon's step of some matrices: momentum, then five steps of Newton and Schulz towards U V^T of what is U S V^T, then decay.
 * https://kellerjordan.github.io/posts/muon/ A thread takes a whole matrix through all of them, which stays in its caches. */
#pragma once
#include "product.h"

typedef struct {
    int bf16, count;                 /* of matrices, fp32 */
    const int *rows, *columns;       /* of each, multiples of 16 */
    float *const *weights, *const *momenta;
    const float *const *grads;
    float momentum, rate, decay;
} muon;

typedef struct { /* scratch memory: the smaller side of a matrix is N, the other one K */
    char *turned, *x;      /* values of a tall matrix as it is; (N + HIGH, K) */
    char *gram, *steps;    /* values (N + HIGH, N): x x^T; what x is multiplied with */
    char *panels;
} workspace;

ALWAYS size_t matrix_bytes(const int bf16, int rows, int columns) {
    return (size_t)((rows + HIGH) * apart(bf16, columns)) * (bf16 ? 2 : 4);
}

/* y = share * residual + by * x times panels, which is symmetric (N, N): computed on and right of the diagonal, and mirrored. */
ALWAYS void symmetric(const int bf16, product p, const char *x) {
    int64_t row = apart(bf16, p.K), away = p.away;
    int high = HIGH * (p.N / (8 * HIGH)); /* the more rows at a time, the more is computed left of it */
    high = high < HIGH ? HIGH : high < TOGETHER ? high : TOGETHER / HIGH * HIGH;
    for (int m = 0; m < p.N; m += high) {
        p.first = m / 32 * 2;
        multiply_rows(bf16, bf16, &p, m, p.N - m < high ? p.N - m : high, AT(x, m * row));
    }
    for (int m = 0; m + 32 < p.N; m += 32)
        turn_rows(bf16, 32, p.N - m - 32, AT(p.y, m * away + m + 32), away, TO(p.y, (m + 32) * away + m), away);
}

/* Rows of x (N, K) as panels */
ALWAYS void pack_all(const int bf16, int N, int K, const char *x, char *panels) {
    int words = words_of(bf16, K);
    for (int n = 0; n < N; n += 16)
        pack_rows(words, AT(x, n * apart(bf16, K)), 4 * (apart(bf16, K) >> bf16), panels + (size_t)n * (size_t)words * 4);
}

/* x (N, K), N <= K, of norm 1 -> near U V^T: singular values end between 0.7 and 1.2. */
ALWAYS void orthogonalize(const int bf16, int N, int K, const workspace *b) {
    const int64_t wide = apart(bf16, K), narrow = apart(bf16, N);
    for (int i = 0; i < 5; i++) {
        pack_all(bf16, N, K, b->x, b->panels);
        symmetric(bf16, (product){.N = N, .K = K, .panels = b->panels, .y = b->gram, .away = narrow}, b->x);
        pack_all(bf16, N, N, b->gram, b->panels);
        symmetric(bf16, (product){.N = N, .K = N, .panels = b->panels, .residual = b->gram, .share = -4.7750f, .by = 2.0315f,
                                  .y = b->steps, .away = narrow}, b->gram);
        pack_columns(bf16, K / 16, N, words_of(bf16, N), b->x, wide, b->panels, words_of(bf16, N));
        product p = {.N = K, .K = N, .panels = b->panels, .residual = b->x, .share = 3.4445f, .by = 1.0f, .y = b->x, .away = wide};
        for (int m = 0; m < N; m += TOGETHER)
            multiply_rows(bf16, bf16, &p, m, N - m < TOGETHER ? N - m : TOGETHER, AT(b->steps, m * narrow));
    }
}

/* Matrix i. */
ALWAYS void muon_step(const int bf16, const muon *s, int i, const workspace *b) {
    const int rows = s->rows[i], columns = s->columns[i], tall = rows > columns, N = tall ? columns : rows, K = tall ? rows : columns;
    float *w = s->weights[i], *momentum = s->momenta[i];
    const float *grad = s->grads[i];
    vf squares[WAYS] = {{0}};
    for (int64_t j = 0; j < (int64_t)rows * columns; j += 16)
        EACH_WAY(u) {
            vf g = load(grad + j + LANES * u), m = load(momentum + j + LANES * u);
            m += (1.0f - s->momentum) * (g - m);
            store(momentum + j + LANES * u, m);
            g += s->momentum * (m - g); /* Nesterov's */
            squares[u] = fmav(g, g, squares[u]);
        }
    float norm = sqrtf(sum_of(squares)), inverse = 1.0f / (norm > 1e-7f ? norm : 1e-7f);
    memset(b->x, 0, matrix_bytes(bf16, N, K));
    memset(b->gram, 0, matrix_bytes(bf16, N, N));
    memset(b->steps, 0, matrix_bytes(bf16, N, N));
    char *as_it_is = tall ? b->turned : b->x;
    const int64_t away = apart(bf16, columns);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c += LANES) {
            vf g = load(grad + (int64_t)r * columns + c), m = load(momentum + (int64_t)r * columns + c);
            put(TO(as_it_is, r * away + c), (g + s->momentum * (m - g)) * inverse, bf16);
        }
    if (tall) turn_rows(bf16, rows, columns, b->turned, away, b->x, apart(bf16, K));
    orthogonalize(bf16, N, K, b);
    if (tall) turn_rows(bf16, N, K, b->x, apart(bf16, K), b->turned, away);
    float kept = 1.0f - s->rate * s->decay, rate = s->rate * (tall ? sqrtf((float)rows / (float)columns) : 1.0f);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c += LANES) {
            float *at = w + (int64_t)r * columns + c;
            store(at, load(at) * kept - rate * get(AT(as_it_is, r * away + c), bf16));
        }
}

void fused_muon(const muon *s) {
    const int bf16 = s->bf16;
    size_t turned = 64, x = 64, square = 64, panels = 64; /* the most that a matrix takes */
    for (int i = 0; i < s->count; i++) {
        int rows = s->rows[i], columns = s->columns[i], N = rows < columns ? rows : columns, K = rows < columns ? columns : rows;
        size_t of[] = {matrix_bytes(bf16, rows, columns), matrix_bytes(bf16, N, K), matrix_bytes(bf16, N, N)};
        size_t sides[] = {(size_t)N * (size_t)words_of(bf16, K) * 4, (size_t)K * (size_t)words_of(bf16, N) * 4};
        if (of[0] > turned) turned = of[0];
        if (of[1] > x) x = of[1];
        if (of[2] > square) square = of[2];
        for (int j = 0; j < 2; j++) if (sides[j] > panels) panels = sides[j];
    }
#pragma omp parallel
    {
        workspace b = {aligned_alloc(64, turned), aligned_alloc(64, x), aligned_alloc(64, square), aligned_alloc(64, square),
                   aligned_alloc(64, panels)};
        tiles before = begin_tiles();
#pragma omp for schedule(dynamic)
        for (int i = 0; i < s->count; i++)
            if (bf16) muon_step(1, s, i, &b);
            else muon_step(0, s, i, &b);
        end_tiles(before);
        free(b.turned), free(b.x), free(b.gram), free(b.steps), free(b.panels);
    }
}
