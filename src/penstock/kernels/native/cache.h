// How keys and values lie within a block of the cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

constexpr int64_t kTokensOfTile = 16;  // that are computed side by side

// Whether bfloat16s lie as instructions take them, two and two: keys [N, G, D / 2, P, 2], neighbours of a key, and values
// [N, G, P / 2, D, 2], an element of neighbouring tokens. Not where rows would end within a vector, or tiles of tokens within a block.
inline bool is_in_pairs(const CacheView& cache) {
    return kBF16Pairs && cache.kind == Cache::kBFloat16 && cache.head_dim % kTokensOfTile == 0 &&
           cache.block_size % kTokensOfTile == 0;
}

}  // namespace penstock::PENSTOCK_ISA
