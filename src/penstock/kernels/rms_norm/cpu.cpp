#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {

// Writes weight * x / sqrt(mean(x^2) + eps) for one row; `out` may be `x`.
void rms_norm_row(const float* x, const float* weight, float* out, int64_t width, float eps) {
    vf squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
        for (int j = 0; j < 4; ++j) {
            const vf v = load(x + i + j * W);
            squares[j] = fma(v, v, squares[j]);
        }
    for (; i + W <= width; i += W) {
        const vf v = load(x + i);
        squares[0] = fma(v, v, squares[0]);
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < width; ++i) total += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf(total / (float)width + eps);
    for (i = 0; i + W <= width; i += W) store(out + i, load(x + i) * splat(scale) * load(weight + i));
    for (; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

void rms_norm(const NormCall& call, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row)
        rms_norm_row(call.x + row * call.x_stride, call.weight, call.out + row * call.out_stride, call.width, call.eps);
}

}  // namespace penstock::PENSTOCK_ISA
