// Activations as products of codes take them: rounded to 8 bits, a row at a time.
#include "codes.h"

namespace penstock::PENSTOCK_ISA {

int64_t row_bytes_for_codes(const PackedWeight& weight) { return RowLayout(weight).bytes; }

namespace {

// How values become codes: at their row's own scale.
struct ByOwnScale {
    vf inverse;

    vi operator()(vf value) const { return nearest(value * inverse); }

    // Of numbers below 2^22, ties to even.
    static vi nearest(vf value) {
#if defined(PENSTOCK_512_BITS)
        return (vi)_mm512_cvtps_epi32((__m512)value);
#else
        const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds
        return (vi)(value + magic) - (vi)magic;
#endif
    }
};

// At one that was found beforehand, outside of whose range they are clamped.
struct ByGivenScale {
    vf scale;
    vf zero;

    vi operator()(vf value) const {
        const vf above = max(value / scale + zero, splat(-128.0f));
        return ByOwnScale::nearest(above > 127.0f ? splat(127.0f) : above);
    }
};

// The greatest magnitude of a row, with infinity above all numbers and what is not a number above that: magnitudes
// compare like the integers their bits are.
float greatest_magnitude(const float* x, int64_t size) {
    constexpr int kAtOnce = 4;
    vi greatest[kAtOnce] = {};
    int64_t k = 0;
    for (; k + kAtOnce * W <= size; k += kAtOnce * W)
        for (int j = 0; j < kAtOnce; ++j) greatest[j] = max(greatest[j], load_bits(x + k + j * W) & 0x7fffffff);
    for (int j = 1; j < kAtOnce; ++j) greatest[0] = max(greatest[0], greatest[j]);
    int32_t top = highest(greatest[0]);
    for (; k < size; ++k) {
        int32_t bits;
        __builtin_memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float magnitude;
    __builtin_memcpy(&magnitude, &top, sizeof magnitude);
    return magnitude;
}

// One row's codes, and what is added up of them.
template <bool AS_WORDS, class Rounding>
void round_row(const PackedWeight& weight, const RowLayout& layout, const Rounding& rounded, const float* x,
               uint8_t* out) {
    constexpr int kVectors = kCodeInputs / W;
    for (int64_t k = 0, group = 0; k < weight.padded_inputs; ++group) {
        vi sums{}, products{};
        const int64_t end = min(k + weight.group, weight.padded_inputs);
#if defined(PENSTOCK_512_BITS) && defined(PENSTOCK_VNNI)
        // A whole vector of codes takes fewer instructions than halves of one do.
        for (; k + 4 * W <= min(end, weight.num_inputs); k += 4 * W) {
            vi codes[4];
            for (int j = 0; j < 4; ++j) codes[j] = rounded(load(x + k + j * W));
            const vi bytes = in_bytes(codes);
            __builtin_memcpy(out + k, &bytes, sizeof bytes);
            sums = dot4(sums, vi{} + 0x01010101, bytes);
        }
#endif
        for (; k < end; k += kCodeInputs) {
            vi codes[kVectors];
            const int64_t left = weight.num_inputs - k;
            if (left >= kCodeInputs) {
                for (int j = 0; j < kVectors; ++j) codes[j] = rounded(load(x + k + j * W));
            } else {  // what pads inputs is no value, whatever the zero
                float values[kCodeInputs] = {};
                __builtin_memcpy(values, x + k, left * sizeof(float));
                for (int j = 0; j < kVectors; ++j) {
                    vi is_value;
                    for (int i = 0; i < W; ++i) is_value[i] = j * W + i < left ? -1 : 0;
                    codes[j] = rounded(load(values + j * W)) & is_value;
                }
            }
            for (int j = 0; j < kVectors; ++j) sums += codes[j];
            if constexpr (AS_WORDS) {
                for (int j = 0; j < kVectors; j += 2) {
                    const vi pairs = in_pairs(codes[j], codes[j + 1]);
                    __builtin_memcpy(out + (k + j * W) * 2, &pairs, sizeof pairs);
                    // Beside inputs 0 and 2 their neighbours, beside those zeros.
                    typedef uint64_t vl __attribute__((vector_size(W * 4)));
                    products += dot2_words(pairs, (vi)((vl)pairs >> 32));
                }
            } else {
                put_bytes(codes, out + k);
            }
        }
        const int32_t start = -sum(sums) * (weight.zeros ? 1 : zero_of(weight.kind));
        const int32_t group_products = sum(products);
        __builtin_memcpy(out + layout.sums_at + group * 4, &start, 4);
        if (AS_WORDS) __builtin_memcpy(out + layout.products_at + group * 4, &group_products, 4);
    }
}

template <class Rounding>
void round_row_to(const PackedWeight& weight, const RowLayout& layout, const Rounding& rounded, const float* x,
                  uint8_t* out) {
    if constexpr (kPairs) {
        if (layout.code_bytes == 2) return round_row<true>(weight, layout, rounded, x, out);
    }
    round_row<false>(weight, layout, rounded, x, out);
}

}  // namespace

void round_for_codes(const LinearCall& call, int64_t first_row, int64_t end_row) {
    const PackedWeight weight = *call.weight;  // a copy, because what is stored might be anything, for all that compilers know
    const RowLayout layout(weight);
    for (int64_t row = first_row; row < end_row; ++row) {
        const float* const x = call.x + row * call.x_stride;
        uint8_t* const out = call.rounded + row * layout.bytes;
        const float top = greatest_magnitude(x, weight.num_inputs);
        float scale = weight.input_scale != 0.0f ? weight.input_scale : top / 127.0f;
        if (!(top < __builtin_inff())) {
            scale = __builtin_nanf("");  // and so is every product, whatever the codes
            __builtin_memset(out, 0, layout.scale_at);
        } else if (weight.input_scale != 0.0f) {
            round_row_to(weight, layout, ByGivenScale{splat(scale), splat(weight.input_zero)}, x, out);
        } else {
            round_row_to(weight, layout, ByOwnScale{splat(top > kLeast ? 127.0f / top : 0.0f)}, x, out);
        }
        __builtin_memcpy(out + layout.scale_at, &scale, sizeof scale);
    }
}

}  // namespace penstock::PENSTOCK_ISA
