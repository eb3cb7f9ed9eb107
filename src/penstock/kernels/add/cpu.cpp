#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {

// x += scale * y
void add(float* x, const float* y, float scale, int64_t first, int64_t end) {
    int64_t i = first;
    for (; i + W <= end; i += W) store(x + i, load(x + i) + load(y + i) * splat(scale));
    for (; i < end; ++i) x[i] += y[i] * scale;
}

}  // namespace penstock::PENSTOCK_ISA
