/* What stands between the matrix products of a training step, in as few passes over memory as can be.
 *
 * Every product of the model (q, k, v; o; gate, up; down) has the same things before it: the row that goes in is a sum
 * (residual stream + what the last block added), a plain one (attention's output) or a gated one (act(gate) * up); it
 * is normed; and for the ternary twin it is quantized. `stage_forward` does all of that in one pass, `stage_backward`
 * the way back (stage.h). Attention has its rotation and softmax here, the loss its softmax. The products are left to
 * torch, but for int8 by trits (../bitgpt/ternary.h).
 *
 * Rows are tokens. "Value" arrays are bf16 or fp32, all others fp32. A product's values may carry one scale a row
 * (x_scale of a ternary layer), and their gradients are then those of the integer sums: times the scale of the row and
 * of the column (w_scale). Threads are OpenMP's, those that torch has already: built without a libgomp of its own
 * (fused.py). One thread computes a row, and gradients of norms are added up thread by thread, so results repeat with
 * the same number of threads. */
#include "stage.h"
#include "attention.h"
#include "loss.h"
#include "../bitgpt/ternary.h"

/* bf16 (K, N) -> fp32 (N, K), a row divided by `columns` where they are given: the gradient of a weight. */
void fused_weight_grad(int K, int64_t N, const uint16_t *from, const float *columns, float *to) {
#pragma omp parallel for schedule(static)
    for (int64_t n0 = 0; n0 < N; n0 += 32)
        for (int k0 = 0; k0 < K; k0 += 32) {
            h32 tile[32];
            int64_t wide = N - n0 < 32 ? N - n0 : 32;
            int high = K - k0 < 32 ? K - k0 : 32;
            for (int k = 0; k < high; k++) memcpy(&tile[k], from + (k0 + k) * N + n0, 2 * (size_t)wide);
            turn(tile);
            for (int n = 0; n < wide; n++)
                for (int k = 0; k < high; k += 16) {
                    v16 v = get((char *)&tile[n] + 2 * k, 1);
                    store(to + (n0 + n) * K + k0 + k, columns ? v * (1.0f / columns[n0 + n]) : v);
                }
        }
}
