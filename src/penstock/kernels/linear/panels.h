// What every way to multiply by a packed weight shares.
#pragma once

#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {

constexpr int64_t kPanel = 2 * W;
constexpr int64_t kVectorBytes = W * 4;
// Rows of a tile: two vectors of outputs for each, two of weights and one of activations have to fit. Codes take up to
// four vectors; that a few sums are kept in memory then costs less than fewer rows do.
constexpr int kMaxRows = (NUM_REGISTERS - 4) / 2;
// Rows at a time, whose activations (128 KiB at 256 inputs) stay in the second-level cache while panels pass.
constexpr int64_t kRows = 128;
// So many panels take a part of the rows' inputs, while it is in that cache, before the next part comes.
constexpr int64_t kPanelsAtOnce = 4;
// Bytes of a panel at a time, which stay in the first-level cache while all rows pass.
constexpr int64_t kPanelBytes = 16384;
// So many inputs, widened to floats.
constexpr int64_t kFloatInputs = kPanelBytes / 4 / kPanel;
constexpr int64_t kScratchFloats = (kPanelsAtOnce * kRows + kFloatInputs) * kPanel;

#if defined(PENSTOCK_AVX2) || defined(PENSTOCK_AVX512)
constexpr bool kShortens = true;
#else
constexpr bool kShortens = false;  // it takes more instructions there than memory it saves
#endif

inline bool is_in_pairs(const PackedWeight& weight) { return kBF16Pairs && weight.kind == Weight::kBFloat16; }

// One vector of the two that two inputs of a panel of bfloat16s take, of `pairs` [kPanel] of them: in a word two inputs of an
// output, or two outputs of an input.
inline vi word_of_bf16(const int32_t* pairs, int which) {
    if (kBF16Pairs) return load_bits(pairs + which * W);
    const vi first = load_bits(pairs), second = load_bits(pairs + W);
    return which == 0 ? (first & 0xffff) | second << 16 : (first >> 16 & 0xffff) | (second & (int32_t)0xffff0000u);
}

// Words of two bfloat16s, of outputs half a panel apart, as floats.
inline __attribute__((always_inline)) void halves_of(vi words, vf (&to)[2]) {
    to[0] = as_floats(words << 16);
    to[1] = as_floats(words & (int32_t)0xffff0000u);
}

// What is smaller is taken for zero where it would be divided by.
constexpr float kLeast = 1e-30f;

// Rows are shared out among as few tiles as can be, evenly.
inline int64_t num_tiles(int64_t num_rows, int64_t most = kMaxRows) { return ceil_div(num_rows, most); }

#if defined(PENSTOCK_AMX)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

// What one tile alone reads a little later, in steps of two vectors. Cores that have tiles read a stream faster if asked for it
// to the second-level cache; others lost by any distance (docs/decisions/0012).
struct LittleLater {
    const char* from;
    void fetch() {
        if (!kTiles) return;
        for (int64_t at = 0; at < 2 * kVectorBytes; at += 64) __builtin_prefetch(from + 4096 + at, 0, 2);
        from += 2 * kVectorBytes;
    }
    static void pass(int64_t) {}
};

// What comes from memory while tiles multiply by a part of a panel: the next part, of which each tile fetches
// `each_step` bytes in each of its steps. A line at a time between products, or they wait for room to fetch; where
// vectors are shorter than a line that takes too many instructions, and it comes after each tile.
struct NextPart {
    const char* from;
    int64_t each_step;
    void fetch() {
        if (kVectorBytes != 64) return;
        __builtin_prefetch(from, 0, 2);
        from += each_step;
    }
    void pass(int64_t num_steps) {
        const char* const end = from + num_steps * each_step;
        if (kVectorBytes == 64) from = end;
        for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
    }
};

int64_t shortened_panel_bytes(const PackedWeight& weight);

inline int64_t panel_bytes(const PackedWeight& weight) {
    if (weight.is_shortened) return shortened_panel_bytes(weight);
    constexpr int64_t kBits[] = {32, 16, 8, 4};
    return weight.padded_inputs * kPanel * kBits[static_cast<int>(weight.kind)] / 8;
}

inline char* panel_at(const PackedWeight& weight, int64_t panel) {
    return static_cast<char*>(weight.panels) + panel * panel_bytes(weight);
}

// Scales, or zeros, of the group that `input` is in, for all outputs of a panel.
inline int64_t group_at(const PackedWeight& weight, int64_t panel, int64_t input) {
    return (panel * weight.num_groups() + input / weight.group) * kPanel;
}

// Scales of a group, of which `group_at` is `at`. Only rounding to 4 bits here makes short ones.
template <Weight KIND>
inline __attribute__((always_inline)) void scales_at(const PackedWeight& weight, int64_t at, vf (&to)[2]) {
    if (KIND == Weight::kInt4 && weight.has_short_scales) {
        halves_of(load_bits(weight.scales + at / 2), to);
    } else {
        to[0] = load(weight.scales + at);
        to[1] = load(weight.scales + at + W);
    }
}

inline vi zeros_at(const uint8_t* from) {
    vi zeros;
    for (int i = 0; i < W; ++i) zeros[i] = from[i];
    return zeros;
}

inline int zero_of(Weight kind) { return kind == Weight::kInt8 ? 128 : 8; }

// Finishes a panel's sums [num_rows, kPanel], as `finish.h` has it. `row_scales` may be null.
void finish(const LinearCall& call, int64_t panel, int64_t first_row, int64_t num_rows, const float* sums,
            const float* row_scales);

// Activations as codes take them: bytes of a row in `LinearCall::rounded`, and how they come there.
int64_t rounded_row_bytes(const PackedWeight& weight);
int64_t row_bytes_for_codes(const PackedWeight& weight);
void round_for_codes(const LinearCall& call, int64_t first_row, int64_t end_row);

// Adds what panels of shortened weights leave out, of which there is little: sums[row] += x[row] * outliers.
void complete(const LinearCall& call, int64_t panel, int64_t first_row, int64_t num_rows, float* sums);

// So many rows of activations rounded to 8 bits, or more, go through tiles where there are some. Codes of 4 bits have to be widened
// for them.
constexpr int64_t code_rows_from(Weight kind) { return kind == Weight::kInt8 ? 6 : 10; }

// Rows through tiles at a time.
constexpr int64_t kMostTileRows = 512;
// How many of them stay in the second-level cache.
int64_t most_tile_rows(const PackedWeight& weight);
// Rows [first_row, end_row) by panels [first_panel, end_panel) through tiles; `scratch` has room for kScratchFloats.
void linear_through_tiles(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel,
                          int64_t end_panel, float* scratch);

// Rows [first_row, end_row) by panels [first_panel, end_panel) of codes, activations rounded to 8 bits and as they are;
// `scratch` has room for kScratchFloats.
void linear_of_codes(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
                     float* scratch);
void linear_of_widened_codes(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel,
                             int64_t end_panel, float* scratch);

}  // namespace penstock::PENSTOCK_ISA
