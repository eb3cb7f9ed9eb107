// What stands between the projection to queries, keys and values and attention: norms of heads where a family has
// them, rotation, and the way into the cache.
#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {

void rms_norm_row(const float* x, const float* weight, float* out, int64_t width, float eps);

namespace {

void rotate(float* head, const float* cos, const float* sin, int64_t width) {
    const int64_t half = width / 2;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const vf first = load(head + i), second = load(head + half + i);
        store(head + i, fma(second, load(sin + i), first * load(cos + i)));
        store(head + half + i, fma(first, load(sin + half + i), second * load(cos + half + i)));
    }
    for (; i < half; ++i) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cos[i] + second * sin[i];
        head[half + i] = second * cos[half + i] + first * sin[half + i];
    }
}

template <class T>
void rope_write(const RopeCall& call, int64_t first_token, int64_t end_token) {
    const CacheView& cache = *call.cache;
    const int64_t H = call.num_heads, G = cache.num_kv_heads, D = cache.head_dim, P = cache.block_size;
    for (int64_t t = first_token; t < end_token; ++t) {
        float* const heads = call.qkv + t * (H + 2 * G) * D;
        for (int64_t h = 0; h < H + G; ++h) {
            const float* norm = h < H ? call.q_norm : call.k_norm;
            if (norm) rms_norm_row(heads + h * D, norm, heads + h * D, D, call.eps);
            rotate(heads + h * D, call.cos + t * D, call.sin + t * D, D);
        }
        const int64_t block = call.slots[t] / P, offset = call.slots[t] % P;
        for (int64_t g = 0; g < G; ++g) {
            const float* const key = heads + (H + g) * D;
            const float* const value = heads + (H + G + g) * D;
            T* const keys = static_cast<T*>(cache.k) + (block * G + g) * D * P + offset;
            T* const values = static_cast<T*>(cache.v) + ((block * G + g) * P + offset) * D;
            for (int64_t d = 0; d < D; ++d) put(keys + d * P, key[d]);
            for (int64_t d = 0; d < D; ++d) put(values + d, value[d]);
        }
    }
}

}  // namespace

void rope_write_kv(const RopeCall& call, int64_t first_token, int64_t end_token) {
    if (call.cache->kind == Cache::kFloat32)
        rope_write<float>(call, first_token, end_token);
    else
        rope_write<bf16>(call, first_token, end_token);
}

}  // namespace penstock::PENSTOCK_ISA
