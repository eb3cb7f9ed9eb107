// Products of many rows with 8-bit codes, where these are multiplied in 16 bits: widened once for all rows, and two
// inputs at a time by one multiplication.
//
// With inputs x0, x1 and codes w0, w1, less their zeros,
//   x0 w0 + x1 w1 = (x0 + w1) (x1 + w0) - x0 x1 - w0 w1
// (Winograd, "A New Algorithm for Inner Product", 1968). Of the last two terms one belongs to a row alone and one to an
// output alone. What is left is as many instructions as with two products, but three of four are additions, which run
// on every unit, while multiplications crowd on half of them. In integers it is the same sum to the last bit.
#include "codes.h"

#if defined(PENSTOCK_PAIRS)

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr int64_t kPart = kMaxGroup;

// A part of a panel: for every four inputs codes 0 and 2, then codes 1 and 3.
struct Words {
    alignas(64) int16_t codes[kPart * kPanel];
    int32_t products[kPart / kCodeInputs][kPanel];  // of neighbours, for each group
};

// The part of rows of activations that meets it.
struct Rows {
    const char* codes;
    const char* products;
    int64_t stride;
};

// `first` begins a group.
void widen(const PackedWeight& weight, int64_t panel, int64_t first, int64_t num_inputs, Words& to) {
    const char* from = panel_at(weight, panel) + first * kPanel;
    char* codes = reinterpret_cast<char*>(to.codes);
    for (int64_t k = 0, group = 0; k < num_inputs; ++group) {
        vs zeros[2];
        for (int h = 0; h < 2; ++h) {
            vi zero = vi{} + zero_of(Weight::kInt8);
            if (weight.zeros) zero = zeros_at(weight.zeros + group_at(weight, panel, first + k) + h * W);
            zeros[h] = (vs)(zero | zero << 16);
        }
        vi products[2] = {};
        for (const int64_t end = min(k + weight.group, num_inputs); k < end; k += 4) {
            for (int h = 0; h < 2; ++h) {
                const vi four = load_bits(from + h * kVectorBytes);
                const vs even = (vs)(four & 0x00ff00ff) - zeros[h], odd = (vs)((vu)four >> 8) - zeros[h];
                __builtin_memcpy(codes + h * kVectorBytes, &even, sizeof even);
                __builtin_memcpy(codes + (2 + h) * kVectorBytes, &odd, sizeof odd);
                products[h] += dot2_words((vi)even, (vi)odd);
            }
            from += 2 * kVectorBytes;
            codes += 4 * kVectorBytes;
        }
        __builtin_memcpy(to.products[group], products, sizeof products);
    }
}

// sums[row] (+)= x[row] * words over `num_inputs` inputs.
template <int ROWS>
void tile(const Rows& x, const Words& words, const float* scales, int64_t num_inputs, int64_t group_size,
          bool from_zero, float* sums) {
    const char* inputs = x.codes;
    const char* codes = reinterpret_cast<const char*>(words.codes);
    for (int64_t k = 0, group = 0; k < num_inputs; ++group) {
        vi acc[ROWS][2];
        for (int r = 0; r < ROWS; ++r)
            for (int h = 0; h < 2; ++h)
                acc[r][h] = -(word_at(x.products + r * x.stride + group * 4) + load_bits(words.products[group] + h * W));
#pragma GCC unroll 1
        for (const int64_t end = min(k + group_size, num_inputs); k < end; k += 4) {
            const vs even[2] = {(vs)load_bits(codes), (vs)load_bits(codes + kVectorBytes)};
            const vs odd[2] = {(vs)load_bits(codes + 2 * kVectorBytes), (vs)load_bits(codes + 3 * kVectorBytes)};
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const vs x02 = (vs)word_at(inputs + r * x.stride), x13 = (vs)word_at(inputs + r * x.stride + 4);
                acc[r][0] += dot2_words((vi)(x02 + odd[0]), (vi)(x13 + even[0]));
                acc[r][1] += dot2_words((vi)(x02 + odd[1]), (vi)(x13 + even[1]));
            }
            inputs += 8;
            codes += 4 * kVectorBytes;
        }
        const vf scale[2] = {load(scales + group * kPanel), load(scales + group * kPanel + W)};
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                float* const to = sums + r * kPanel + h * W;
                const vf part = __builtin_convertvector(acc[r][h], vf);
                store(to, fma(part, scale[h], from_zero && group == 0 ? vf{} : load(to)));
            }
    }
}

template <int ROWS, class... Rest>
void tile_or_fewer(int64_t num_rows, const Rest&... rest) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            tile<ROWS>(rest...);
        } else {
            tile_or_fewer<ROWS - 1>(num_rows, rest...);
        }
    }
}

}  // namespace

void many_rows_of_words(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel,
                        int64_t end_panel, const float* row_scales, float* sums) {
    const PackedWeight& weight = *call.weight;
    const RowLayout layout(weight);
    const char* const x = reinterpret_cast<const char*>(call.rounded) + first_row * layout.bytes;
    const int64_t part = kPart / weight.group * weight.group;  // whole groups
    Words words;
    for (int64_t first = first_panel; first < end_panel; first += kPanelsAtOnce) {
        const int64_t end = min(first + kPanelsAtOnce, end_panel);
        for (int64_t k = 0; k < weight.padded_inputs; k += part) {
            const int64_t num_inputs = min(part, weight.padded_inputs - k);
            for (int64_t p = first; p < end; ++p) {
                widen(weight, p, k, num_inputs, words);
                const float* const scales = weight.scales + group_at(weight, p, k);
                float* const to = sums + (p - first) * num_rows * kPanel;
                Rows rows{x + k * 2, x + layout.products_at + k / weight.group * 4, layout.bytes};
                for (int64_t r = 0; r < num_rows; r += kWordRows) {
                    tile_or_fewer<kWordRows>(min(kWordRows, num_rows - r), rows, words, scales, num_inputs, weight.group,
                                             k == 0, to + r * kPanel);
                    rows.codes += kWordRows * layout.bytes;
                    rows.products += kWordRows * layout.bytes;
                }
            }
        }
        for (int64_t p = first; p < end; ++p)
            finish(call, p, first_row, num_rows, sums + (p - first) * num_rows * kPanel, row_scales);
    }
}

}  // namespace penstock::PENSTOCK_ISA

#endif
