#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {
namespace {

template <class T>
void widen_row(const T* from, float scale, float* to, int64_t width) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(from + i) * splat(scale));
    for (; i < width; ++i) to[i] = to_float(from[i]) * scale;
}

}  // namespace

void embed(const EmbedCall& call, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row) {
        const int64_t from = call.token_ids[row] * call.width;
        float* const to = call.out + row * call.width;
        if (call.kind == Weight::kFloat32) {
            widen_row(static_cast<const float*>(call.table) + from, call.scale, to, call.width);
        } else {
            widen_row(static_cast<const bf16*>(call.table) + from, call.scale, to, call.width);
        }
    }
}

}  // namespace penstock::PENSTOCK_ISA
