// Products of codes with activations rounded to 8 bits, in integers.
//
// An output is a sum over groups, in their order, of a scale times an integer that is exact. So a row's result is the
// same whatever other rows are computed beside it.
#include "codes.h"

namespace penstock::PENSTOCK_ISA {
namespace {

// Codes of 4 bits take four vectors and a mask, and two rows more would be kept in memory.
template <Weight KIND>
constexpr int kTileRows = kMaxRows - (KIND == Weight::kInt4 && NUM_REGISTERS == 32 ? 2 : 0);

// Codes of a step of the loops over them.
constexpr int64_t kStepBytes = 2 * kVectorBytes;

// acc[row][half] += codes of kCodeInputs inputs times activations, of which `x` has the first row's.
template <int ROWS, class Ahead>
inline __attribute__((always_inline)) void add_int8(vi (&acc)[ROWS][2], const char* codes, const char* x,
                                                    int64_t row_bytes, Ahead& ahead) {
#pragma GCC unroll 1
    for (int quad = 0; quad < kCodeInputs / 4; ++quad) {
        ahead.fetch();
        const vi first = load_bits(codes + quad * 2 * kVectorBytes);
        const vi second = load_bits(codes + (quad * 2 + 1) * kVectorBytes);
#if defined(PENSTOCK_PAIRS)
        const vi even[2] = {first & 0x00ff00ff, second & 0x00ff00ff};
        const vi odd[2] = {(vi)((vu)first >> 8), (vi)((vu)second >> 8)};
#endif
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
#if defined(PENSTOCK_PAIRS)
            const vi x02 = word_at(x + r * row_bytes + quad * 8), x13 = word_at(x + r * row_bytes + quad * 8 + 4);
            acc[r][0] += dot2_words(even[0], x02);
            acc[r][1] += dot2_words(even[1], x02);
            acc[r][0] += dot2_words(odd[0], x13);
            acc[r][1] += dot2_words(odd[1], x13);
#else
            const vi x0123 = word_at(x + r * row_bytes + quad * 4);
            acc[r][0] = dot4(acc[r][0], first, x0123);
            acc[r][1] = dot4(acc[r][1], second, x0123);
#endif
        }
    }
}

template <int ROWS, class Ahead>
inline __attribute__((always_inline)) void add_int4(vi (&acc)[ROWS][2], const char* codes, const char* x,
                                                    int64_t row_bytes, Ahead& ahead) {
#if defined(PENSTOCK_PAIRS)
    // Eight products of a 4-bit code and an 8-bit one stay within 16 bits.
    vs parts[ROWS][2] = {};
#endif
#pragma GCC unroll 1
    for (int eight = 0; eight < kCodeInputs / 8; ++eight) {
        ahead.fetch();
        const vi first = load_bits(codes + eight * 2 * kVectorBytes);
        const vi second = load_bits(codes + (eight * 2 + 1) * kVectorBytes);
        const vi low[2] = {first & 0x0f0f0f0f, second & 0x0f0f0f0f};
        const vi high[2] = {(first >> 4) & 0x0f0f0f0f, (second >> 4) & 0x0f0f0f0f};
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const vi x0123 = word_at(x + r * row_bytes + eight * 8);
            const vi x4567 = word_at(x + r * row_bytes + eight * 8 + 4);
#if defined(PENSTOCK_PAIRS)
            parts[r][0] += dot2_bytes(low[0], x0123);
            parts[r][1] += dot2_bytes(low[1], x0123);
            parts[r][0] += dot2_bytes(high[0], x4567);
            parts[r][1] += dot2_bytes(high[1], x4567);
#else
            acc[r][0] = dot4(acc[r][0], low[0], x0123);
            acc[r][1] = dot4(acc[r][1], low[1], x0123);
            acc[r][0] = dot4(acc[r][0], high[0], x4567);
            acc[r][1] = dot4(acc[r][1], high[1], x4567);
#endif
        }
    }
#if defined(PENSTOCK_PAIRS)
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < 2; ++h) acc[r][h] += dot2_words((vi)parts[r][h], vi{} + 0x00010001);
#endif
}

// sums[row] (+)= x[row] * panel over inputs [first, end), which begin with a group.
template <int ROWS, Weight KIND, class Ahead>
__attribute__((noinline)) void tile(const LinearCall& call, int64_t first_row, int64_t panel, int64_t first,
                                    int64_t end, Ahead ahead, float* sums) {
    const PackedWeight& weight = *call.weight;
    const RowLayout layout(weight);
    const int64_t group_size = weight.group, row_bytes = layout.bytes;
    const char* const row = reinterpret_cast<const char*>(call.rounded) + first_row * row_bytes;
    const char* x = row + first * layout.code_bytes;
    const char* starts = row + layout.sums_at + first / group_size * 4;
    constexpr int64_t kBytesPer32 = kCodeInputs * kPanel / (KIND == Weight::kInt8 ? 1 : 2);
    const char* codes = panel_at(weight, panel) + first / kCodeInputs * kBytesPer32;
    int64_t at = group_at(weight, panel, first);
    const uint8_t* zeros = weight.zeros ? weight.zeros + at : nullptr;
    if (first == 0) __builtin_memset(sums, 0, ROWS * kPanel * sizeof(float));
    for (int64_t k = first; k < end; starts += 4, at += kPanel) {
        vi acc[ROWS][2];
        if (zeros) {
            const vi zero[2] = {zeros_at(zeros), zeros_at(zeros + W)};
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                for (int h = 0; h < 2; ++h) acc[r][h] = zero[h] * word_at(starts + r * row_bytes);
            zeros += kPanel;
        } else {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                for (int h = 0; h < 2; ++h) acc[r][h] = word_at(starts + r * row_bytes);
        }
        for (const int64_t group_end = min(k + group_size, end); k < group_end; k += kCodeInputs) {
            if constexpr (KIND == Weight::kInt8) {
                add_int8<ROWS>(acc, codes, x, row_bytes, ahead);
            } else {
                add_int4<ROWS>(acc, codes, x, row_bytes, ahead);
            }
            x += kCodeInputs * layout.code_bytes;
            codes += kBytesPer32;
        }
        // Or GCC keeps all sums in registers that it does not have, and stores each twice.
        asm volatile("" : : : "memory");
        vf scale[2];
        scales_at<KIND>(weight, at, scale);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            for (int h = 0; h < 2; ++h) {
                float* const to = sums + r * kPanel + h * W;
                store(to, fma(__builtin_convertvector(acc[r][h], vf), scale[h], load(to)));
            }
    }
}

template <int ROWS, Weight KIND, class... Rest>
void rows_or_fewer(int64_t num_rows, const Rest&... rest) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            tile<ROWS, KIND>(rest...);
        } else {
            rows_or_fewer<ROWS - 1, KIND>(num_rows, rest...);
        }
    }
}

// One panel after another: a row waits for weights to come from memory, and they come fastest in one stream.
template <Weight KIND>
void up_to_128_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
                    float* sums) {
    const PackedWeight& weight = *call.weight;
    const RowLayout layout(weight);
    constexpr int64_t kInputs = kPanelBytes / kPanel * (KIND == Weight::kInt8 ? 1 : 2);
    // A part is whole groups.
    const int64_t part = weight.group >= kInputs ? weight.group : kInputs / weight.group * weight.group;
    float row_scales[kRows];
    for (int64_t r = 0; r < num_rows; ++r)
        __builtin_memcpy(row_scales + r, call.rounded + (first_row + r) * layout.bytes + layout.scale_at, 4);
#if defined(PENSTOCK_PAIRS)
    if (KIND == Weight::kInt8 && num_rows >= kWordsFrom)
        return many_rows_of_words(call, first_row, num_rows, first_panel, end_panel, row_scales, sums);
#endif
    const int64_t tiles = num_tiles(num_rows, kTileRows<KIND>), each = ceil_div(num_rows, tiles);
    for (int64_t p = first_panel; p < end_panel; ++p) {
        for (int64_t k = 0; k < weight.padded_inputs; k += part) {
            const int64_t end = min(k + part, weight.padded_inputs);
            const auto beside = [&](auto ahead) {
                for (int64_t r = 0; r < num_rows; r += each, ahead.pass((end - k) * kPanelBytes / kInputs / kStepBytes))
                    rows_or_fewer<kTileRows<KIND>, KIND>(min(each, num_rows - r), call, first_row + r, p, k, end, ahead,
                                                         sums + r * kPanel);
            };
            if (tiles == 1) {
                beside(LittleLater{panel_at(weight, p) + k * kPanelBytes / kInputs});
            } else {
                beside(NextPart{panel_at(weight, p) + end * kPanelBytes / kInputs, ceil_div(kStepBytes, tiles)});
            }
        }
        finish(call, p, first_row, num_rows, sums, row_scales);
    }
}

}  // namespace

void linear_of_codes(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
                     float* scratch) {
    if (kTiles && end_row - first_row >= code_rows_from(call.weight->kind))
        return linear_through_tiles(call, first_row, end_row, first_panel, end_panel, scratch);
    if (call.weight->kind == Weight::kInt8) {
        up_to_128_rows<Weight::kInt8>(call, first_row, end_row - first_row, first_panel, end_panel, scratch);
    } else {
        up_to_128_rows<Weight::kInt4>(call, first_row, end_row - first_row, first_panel, end_panel, scratch);
    }
}

}  // namespace penstock::PENSTOCK_ISA
