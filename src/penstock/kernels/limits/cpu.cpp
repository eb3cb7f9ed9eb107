// What this processor can do at most, to measure everything else against.
#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {

// Adds up `size` floats, so that each has to be read.
float read_all(const float* from, int64_t size) {
    vf sums[8] = {};
    int64_t i = 0;
    for (; i + 8 * W <= size; i += 8 * W)
        for (int j = 0; j < 8; ++j) sums[j] += load(from + i + j * W);
    for (int j = 1; j < 8; ++j) sums[0] += sums[j];
    float total = sum(sums[0]);
    for (; i < size; ++i) total += from[i];
    return total;
}

// Chains of fused multiply-adds that do not wait for each other, in registers; leaves what came out at `out` [W] and
// returns how many floating-point operations it took.
int64_t multiply_add(int64_t num_rounds, float* out) {
    constexpr int kChains = 10;  // two units that take four or five cycles each
    vf chains[kChains];
    for (int j = 0; j < kChains; ++j) chains[j] = splat((float)j);
    const vf factor = splat(out[0]), term = splat(out[1]);
    for (int64_t i = 0; i < num_rounds; ++i)
        for (int j = 0; j < kChains; ++j) chains[j] = fma(chains[j], factor, term);
    for (int j = 1; j < kChains; ++j) chains[0] += chains[j];
    out[0] = sum(chains[0]);
    return num_rounds * kChains * W * 2;
}

// The same with bytes, in the fewest instructions this instruction set has for sums of their products.
int64_t multiply_add_bytes(int64_t num_rounds, float* out) {
    constexpr int kChains = 10;
#if defined(PENSTOCK_AVX2) || defined(PENSTOCK_AVX512)
    constexpr int64_t kProductsEach = W * 4;
#else
    constexpr int64_t kProductsEach = W;
#endif
    vi chains[kChains];
    for (int j = 0; j < kChains; ++j) chains[j] = vi{} + j;
    const vi codes = vi{} + (int32_t)out[0], activations = vi{} + (int32_t)out[1];
    for (int64_t i = 0; i < num_rounds; ++i)
        for (int j = 0; j < kChains; ++j) {
#if defined(PENSTOCK_VNNI)
            chains[j] = dot4(chains[j], codes, activations);
#elif defined(PENSTOCK_AVX2) || defined(PENSTOCK_AVX512)
            // The chain is a factor, so that no product can be taken out of the loop.
            chains[j] = (vi)((vs)codes + dot2_bytes(chains[j], activations));
#else
            chains[j] = chains[j] * activations + codes;
#endif
        }
    vi all = chains[0];
    for (int j = 1; j < kChains; ++j) all ^= chains[j];
    out[0] = sum(__builtin_convertvector(all, vf));  // taking single elements of a chain would keep it in memory
    return num_rounds * kChains * kProductsEach * 2;
}

}  // namespace penstock::PENSTOCK_ISA
