#include "shortened.h"

namespace penstock::PENSTOCK_ISA {
namespace {

// Where a byte of a vector comes from: `interleave` takes eight of each sixteen to the first vector of words. In a word two
// inputs of an output, or two outputs of an input.
struct Place {
    int64_t output;
    int64_t input;  // of two
};

Place place_of(int byte) {
    const int vector = byte % 16 / 8, word = byte / 16 * 4 + byte % 8 / 2, half = byte % 2;
    return kBF16Pairs ? Place{vector * W + word, half} : Place{half * W + word, vector};
}

int byte_of(Place place) {
    const int64_t vector = kBF16Pairs ? place.output / W : place.input, half = kBF16Pairs ? place.input : place.output / W;
    const int64_t word = place.output % W;
    return (int)(word / 4 * 16 + vector * 8 + word % 4 * 2 + half);
}

}  // namespace

int64_t shortened_panel_bytes(const PackedWeight& weight) {
    const int64_t bytes = weight.padded_inputs / 4 * kFourBytes + (int64_t)sizeof(Outliers) +
                          max_outliers(weight) * (int64_t)sizeof(Outlier);
    return (bytes + 63) / 64 * 64;
}

void begin_panel(const PackedWeight& weight, int64_t panel, const int (&counts)[kExponents]) {
    // Of ranges that hold as many, the middle one: it is furthest from what the sample does not show on either side.
    int known = 0, most = -1, first = 0, last = 0;
    for (int i = 1; i <= 7; ++i) known += counts[i];
    for (int i = 0; i + 7 < kExponents; ++i) {
        if (known > most) {
            most = known;
            first = last = i;
        } else if (known == most && last == i - 1) {
            last = i;
        }
        known += (i + 8 < kExponents ? counts[i + 8] : 0) - counts[i + 1];
    }
    const int base = (first + last) / 2;
    Outliers& outliers = outliers_of(weight, panel);
    for (int i = 0; i < 16; ++i) outliers.upper[i] = (uint8_t)((i & 7 ? base + (i & 7) : 0) | (i & 8) << 4);
    outliers.count = 0;
}

bool shorten(const PackedWeight& weight, int64_t panel, const int32_t* pairs, int64_t first, int64_t num_inputs) {
    Outliers& outliers = outliers_of(weight, panel);
    const uint8_t base = outliers.upper[1] - 1;
    char* to = panel_at(weight, panel) + first / 4 * kFourBytes;
    for (int64_t k = 0; k < num_inputs; k += 4, to += kFourBytes) {
        vbytes bits{};
        for (int which = 0; which < 2; ++which) {
            const int32_t* const from = pairs + (k / 2 + which) * kPanel;
            vi words[2];
            for (int i = 0; i < 2; ++i) words[i] = word_of_bf16(from, i);
            vbytes lower, upper;
            separate(words, lower, upper);
            const vbytes exponent = upper & 127, index = exponent - base;
            const vbytes in_range = (vbytes)(index >= 1) & (vbytes)(index <= 7), known = in_range | (vbytes)(exponent == 0);
            lower &= known;
            bits |= ((index & in_range) | ((upper & known) >> 4 & 8)) << (uint8_t)(which * 4);
            __builtin_memcpy(to + which * kVectorBytes, &lower, sizeof lower);
            if (!has_zeros(known)) continue;
            for (int i = 0; i < W * 4; ++i) {
                if (known[i]) continue;
                if (outliers.count == max_outliers(weight)) return false;
                const Place place = place_of(i);
                const bf16 value{(uint16_t)(from[place.output] >> place.input * 16)};
                outliers.each[outliers.count++] = {(int32_t)(first + k + which * 2 + place.input), (int16_t)place.output, value};
            }
        }
        __builtin_memcpy(to + 2 * kVectorBytes, &bits, sizeof bits);
    }
    return true;
}

bf16 lengthened(const PackedWeight& weight, int64_t panel, int64_t place, int64_t input) {
    const auto* const four = reinterpret_cast<const uint8_t*>(panel_at(weight, panel)) + input / 4 * kFourBytes;
    const int byte = byte_of({place, input % 2}), which = (int)(input % 4 / 2);
    const int bits = four[2 * kVectorBytes + byte] >> which * 4 & 15;
    return {(uint16_t)(outliers_of(weight, panel).upper[bits] << 8 | four[which * kVectorBytes + byte])};
}

}  // namespace penstock::PENSTOCK_ISA
