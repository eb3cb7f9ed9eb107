#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {
namespace {

// The sum of f(vector) over a row; `alone` is f of a single element.
template <class F, class G>
float total(const float* x, int64_t width, F&& f, G&& alone) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
        for (int j = 0; j < 4; ++j) sums[j] += f(load(x + i + j * W));
    for (; i + W <= width; i += W) sums[0] += f(load(x + i));
    float all = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < width; ++i) all += alone(x[i]);
    return all;
}

void layer_norm_row(const float* x, const float* weight, const float* bias, float* out, int64_t width, float eps) {
    const float mean = total(x, width, [](vf v) { return v; }, [](float v) { return v; }) / (float)width;
    const auto square = [mean](auto v) { return (v - mean) * (v - mean); };
    const float scale = 1.0f / __builtin_sqrtf(total(x, width, square, square) / (float)width + eps);
    int64_t i = 0;
    for (; i + W <= width; i += W)
        store(out + i, fma((load(x + i) - mean) * splat(scale), load(weight + i), load(bias + i)));
    for (; i < width; ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

}  // namespace

void layer_norm(const NormCall& call, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row)
        layer_norm_row(call.x + row * call.x_stride, call.weight, call.bias, call.out + row * call.out_stride,
                       call.width, call.eps);
}

}  // namespace penstock::PENSTOCK_ISA
