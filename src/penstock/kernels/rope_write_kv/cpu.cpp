// What stands between the projection to queries, keys and values and attention: norms of heads where a family has
// them, rotation, and the way into the cache.
#include "../native/cache.h"

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

// A key's or value's way into the cache, its elements `stride` apart.
template <class T>
void write_head(const float* head, int64_t D, T* to, int64_t stride, float*, int64_t) {
    for (int64_t d = 0; d < D; ++d) put(to + d * stride, head[d]);
}

// In codes of 8 bits: one stands for the greatest magnitude by 127. What is not finite makes the scale not a number, so
// that a fault upstream shows as it does in other caches.
void write_head(const float* head, int64_t D, int8_t* to, int64_t stride, float* scales, int64_t place) {
    float greatest = 0.0f, nothing = 0.0f;
    for (int64_t d = 0; d < D; ++d) {
        const float magnitude = __builtin_fabsf(head[d]);
        greatest = magnitude > greatest ? magnitude : greatest;
        nothing += head[d] * 0.0f;
    }
    const float scale = greatest / 127.0f + nothing;
    scales[place] = scale;
    if (!(scale > 0.0f)) {
        for (int64_t d = 0; d < D; ++d) to[d * stride] = 0;
        return;
    }
    for (int64_t d = 0; d < D; d += W) {
        const int64_t width = min(W, D - d);
        float x[W] = {};
        __builtin_memcpy(x, head + d, width * sizeof(float));
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even. A scale next to zero has too few bits to keep
        // its own codes within 127.
        vf codes = (load(x) / splat(scale) + 12582912.0f) - 12582912.0f;
        codes = codes > splat(127.0f) ? splat(127.0f) : max(codes, splat(-127.0f));
        store(x, codes);
        for (int64_t i = 0; i < width; ++i) to[(d + i) * stride] = (int8_t)x[i];
    }
}

template <class T>
void rope_write(const RopeCall& call, int64_t first_token, int64_t end_token) {
    const CacheView& cache = *call.cache;
    const int64_t H = call.num_heads, G = cache.num_kv_heads, D = cache.head_dim, P = cache.block_size;
    const bool in_pairs = is_in_pairs(cache);
    for (int64_t t = first_token; t < end_token; ++t) {
        float* const heads = call.qkv + t * (H + 2 * G) * D;
        for (int64_t h = 0; h < H + G; ++h) {
            const float* norm = h < H ? call.q_norm : call.k_norm;
            if (norm) rms_norm_row(heads + h * D, norm, heads + h * D, D, call.eps);
            rotate(heads + h * D, call.cos + t * D, call.sin + t * D, D);
        }
        const int64_t block = call.slots[t] / P, offset = call.slots[t] % P;
        for (int64_t g = 0; g < G; ++g) {
            const int64_t head = block * G + g, place = head * P + offset;
            const float *const key = heads + (H + g) * D, *const value = heads + (H + G + g) * D;
            if (__is_same(T, bf16) && in_pairs) {
                bf16* const k = static_cast<bf16*>(cache.k) + (head * P * D + 2 * offset);
                bf16* const v = static_cast<bf16*>(cache.v) + (place / 2 * 2 * D + offset % 2);
                for (int64_t d = 0; d < D; ++d) put(k + (d / 2 * 2 * P + d % 2), key[d]);
                for (int64_t d = 0; d < D; ++d) put(v + 2 * d, value[d]);
            } else {
                write_head(key, D, static_cast<T*>(cache.k) + head * D * P + offset, P, cache.k_scales, place);
                write_head(value, D, static_cast<T*>(cache.v) + place * D, 1, cache.v_scales, place);
            }
        }
    }
}

}  // namespace

void rope_write_kv(const RopeCall& call, int64_t first_token, int64_t end_token) {
    switch (call.cache->kind) {
        case Cache::kFloat32:
            return rope_write<float>(call, first_token, end_token);
        case Cache::kBFloat16:
            return rope_write<bf16>(call, first_token, end_token);
        case Cache::kInt8:
            return rope_write<int8_t>(call, first_token, end_token);
    }
}

}  // namespace penstock::PENSTOCK_ISA
