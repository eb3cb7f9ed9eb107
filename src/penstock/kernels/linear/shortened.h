// bfloat16 weights in 12 bits each, none of them changed.
//
// A product of one row takes as long as its weights take from memory, and of a bfloat16's sixteen bits some five say
// nothing: the exponents of a matrix's weights are close together (DFloat11, arXiv 2504.11651, packs them by Huffman
// codes). Here the lower byte of a number, a bit of its exponent and the mantissa, stays as it is. Its upper byte, the sign and the
// other seven bits of the exponent, becomes four bits: the sign, and which of the panel's seven neighbouring exponents it is,
// or that it is zero. That is a range of 2^14. A number outside, an outlier, lies in a list behind the panel with its place,
// and is multiplied after all others.
#pragma once

#include "panels.h"

namespace penstock::PENSTOCK_ISA {

// Four inputs of all a panel's outputs: the lower bytes of two, of the other two, and of all of them four bits each.
constexpr int64_t kFourBytes = 3 * kVectorBytes;

struct Outlier {
    int32_t input;
    int16_t place;
    bf16 value;
};

// What lies behind the fours of a panel.
struct Outliers {
    uint8_t upper[16];  // bytes that four bits stand for
    int32_t count;
    Outlier each[1];  // up to max_outliers()
};

// More would cost more memory and time than is saved: one of 512 is an eighth of a bit for each weight.
inline int64_t max_outliers(const PackedWeight& weight) { return weight.padded_inputs * kPanel / 512; }

inline Outliers& outliers_of(const PackedWeight& weight, int64_t panel) {
    return *reinterpret_cast<Outliers*>(panel_at(weight, panel) + weight.padded_inputs / 4 * kFourBytes);
}

// Two inputs of a panel, of which each word is what it is in a panel of bfloat16s.
inline __attribute__((always_inline)) void lengthen(const char* four, int which, vbytes upper, vi (&words)[2]) {
    const vi lower = load_bits(four + which * kVectorBytes), bits = load_bits(four + 2 * kVectorBytes);
    interleave((vbytes)lower, look_up(upper, (vbytes)(bits >> which * 4 & 0x0f0f0f0f)), words);
}

// Seven bits of eight, the lowest left out.
constexpr int kExponents = 128;
inline int exponent_of(bf16 x) { return x.bits >> 8 & (kExponents - 1); }

// Chooses a panel's exponents, by how often each occurs.
void begin_panel(const PackedWeight& weight, int64_t panel, const int (&counts)[kExponents]);
// Takes inputs [first, first + num_inputs), both multiples of four, as `pairs` [num_inputs / 2, kPanel] of bfloat16s. Returns
// false if there are more outliers than there is room for.
bool shorten(const PackedWeight& weight, int64_t panel, const int32_t* pairs, int64_t first, int64_t num_inputs);
// Input `input` of output `place`, if it is no outlier.
bf16 lengthened(const PackedWeight& weight, int64_t panel, int64_t place, int64_t input);

}  // namespace penstock::PENSTOCK_ISA
