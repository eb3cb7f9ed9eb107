// What this processor can do at most, to measure everything else against.
#include "../native/kernels.h"
#include "../native/simd.h"
#include "../native/tiles.h"

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

#if defined(PENSTOCK_AMX)
namespace {

// Products of tiles that hold zeros; with some rounds less, because each is that much more.
template <Columns OF>
int64_t multiply_tiles_in_place(int64_t num_rounds, float* out) {
    num_rounds = ceil_div(num_rounds, 16);
    shape_for_product(kTileRows, kTileRows, kTileBytes);
    for (int64_t i = 0; i < num_rounds; ++i) {
        tile_dot<OF, 0, kRowTile, kColumnTile>();
        tile_dot<OF, 1, kRowTile, kColumnTile + 1>();
        tile_dot<OF, 2, kRowTile + 1, kColumnTile>();
        tile_dot<OF, 3, kRowTile + 1, kColumnTile + 1>();
    }
    tile_store<0>(out, 0);
    release_tiles();
    return num_rounds * 4 * kTileRows * kTileRows * (OF == Columns::kBFloat16 ? kTileBytes / 2 : kTileBytes) * 2;
}

}  // namespace
#endif

// The same with pairs of bfloat16s, where there are instructions for them.
int64_t multiply_add_pairs(int64_t num_rounds, float* out) {
#if defined(PENSTOCK_AMX)
    return multiply_tiles_in_place<Columns::kBFloat16>(num_rounds, out);
#elif defined(PENSTOCK_BF16)
    constexpr int kChains = 10;
    vf chains[kChains];
    for (int j = 0; j < kChains; ++j) chains[j] = splat((float)j);
    const vi x = word_at(out), y = word_at(out + 1);
    for (int64_t i = 0; i < num_rounds; ++i)
        for (int j = 0; j < kChains; ++j) chains[j] = dot2_bf16(chains[j], x, y);
    for (int j = 1; j < kChains; ++j) chains[0] += chains[j];
    out[0] = sum(chains[0]);
    return num_rounds * kChains * W * 4;
#else
    return multiply_add(num_rounds, out);
#endif
}

// The same with bytes, in the fewest instructions this instruction set has for sums of their products.
int64_t multiply_add_bytes(int64_t num_rounds, float* out) {
#if defined(PENSTOCK_AMX)
    return multiply_tiles_in_place<Columns::kUnsigned>(num_rounds, out);
#else
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
#endif
}

}  // namespace penstock::PENSTOCK_ISA
