/* Reads matrices and tokens from standard input, multiplies them, writes the results: what run_on_arm.py runs in qemu.
 * In: int32 kind, n, k, m, bytes; the packed matrix, n scales, m x k int8. Out: the instruction set in 16 bytes; for
 * each matrix int32 (m, n), the exact sums, and fp32 (m, n), the layer's result for the same tokens as floats. */
#include <stdio.h>
#include "../engine/cpu.c"

int main(void) {
    int32_t c[5];
    char name[16] = {0};
    memcpy(name, bitgpt_isa(), strlen(bitgpt_isa()));
    fwrite(name, 1, 16, stdout);
    while (fread(c, 4, 5, stdin) == 5) {
        int n = c[1], k = c[2], m = c[3];
        uint8_t *w = malloc((size_t)c[4]);
        float *scale = malloc(4 * (size_t)n), *xf = malloc(4 * (size_t)(m * k)), *y = malloc(4 * (size_t)(m * n));
        int8_t *x = malloc((size_t)(m * k));
        int32_t *acc = malloc(4 * (size_t)(m * n));
        if (fread(w, 1, (size_t)c[4], stdin) != (size_t)c[4] || fread(scale, 4, (size_t)n, stdin) != (size_t)n ||
            fread(x, 1, (size_t)(m * k), stdin) != (size_t)(m * k)) return 1;
        for (int i = 0; i < m * k; i++) xf[i] = x[i];
        if (bitgpt_product(c[0], n, k, w, NULL, m, x, acc, NULL, NULL)) return 1;
        if (bitgpt_product(c[0], n, k, w, scale, m, NULL, NULL, xf, y)) return 1;
        fwrite(acc, 4, (size_t)(m * n), stdout);
        fwrite(y, 4, (size_t)(m * n), stdout);
        free(w), free(scale), free(xf), free(y), free(x), free(acc);
    }
    return 0;
}
