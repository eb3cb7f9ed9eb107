// Products of codes with activations rounded to 8 bits, in integers.
//
// An output is a sum over groups, in their order, of a scale times an integer that is exact. So a row's result is the
// same whatever other rows are computed beside it.
#include "codes.h"

namespace penstock::PENSTOCK_ISA {
namespace {

// acc[row][panel][half] += codes of kCodeInputs inputs times activations, of which `x` has the first row's.
template <int ROWS, int PANELS>
void add_int8(vi (&acc)[ROWS][PANELS][2], const char* const* codes, const char* x, int64_t row_bytes) {
#pragma GCC unroll 1
    for (int quad = 0; quad < kCodeInputs / 4; ++quad) {
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const vi first = load_bits(codes[p] + quad * 2 * kVectorBytes);
            const vi second = load_bits(codes[p] + (quad * 2 + 1) * kVectorBytes);
#if defined(PENSTOCK_PAIRS)
            const vi even[2] = {first & 0x00ff00ff, second & 0x00ff00ff};
            const vi odd[2] = {(vi)((vu)first >> 8), (vi)((vu)second >> 8)};
#endif
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                vi(&sums)[2] = acc[r][p];
#if defined(PENSTOCK_PAIRS)
                const vi x02 = word_at(x + r * row_bytes + quad * 8), x13 = word_at(x + r * row_bytes + quad * 8 + 4);
                sums[0] += dot2_words(even[0], x02);
                sums[1] += dot2_words(even[1], x02);
                sums[0] += dot2_words(odd[0], x13);
                sums[1] += dot2_words(odd[1], x13);
#else
                const vi x0123 = word_at(x + r * row_bytes + quad * 4);
                sums[0] = dot4(sums[0], first, x0123);
                sums[1] = dot4(sums[1], second, x0123);
#endif
            }
        }
    }
}

template <int ROWS, int PANELS>
void add_int4(vi (&acc)[ROWS][PANELS][2], const char* const* codes, const char* x, int64_t row_bytes) {
#if defined(PENSTOCK_PAIRS)
    // Eight products of a 4-bit code and an 8-bit one stay within 16 bits.
    vs parts[ROWS][PANELS][2] = {};
#endif
#pragma GCC unroll 1
    for (int eight = 0; eight < kCodeInputs / 8; ++eight) {
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const vi first = load_bits(codes[p] + eight * 2 * kVectorBytes);
            const vi second = load_bits(codes[p] + (eight * 2 + 1) * kVectorBytes);
            const vi low[2] = {first & 0x0f0f0f0f, second & 0x0f0f0f0f};
            const vi high[2] = {(first >> 4) & 0x0f0f0f0f, (second >> 4) & 0x0f0f0f0f};
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const vi x0123 = word_at(x + r * row_bytes + eight * 8);
                const vi x4567 = word_at(x + r * row_bytes + eight * 8 + 4);
#if defined(PENSTOCK_PAIRS)
                vs(&sums)[2] = parts[r][p];
                sums[0] += dot2_bytes(low[0], x0123);
                sums[1] += dot2_bytes(low[1], x0123);
                sums[0] += dot2_bytes(high[0], x4567);
                sums[1] += dot2_bytes(high[1], x4567);
#else
                vi(&sums)[2] = acc[r][p];
                sums[0] = dot4(sums[0], low[0], x0123);
                sums[1] = dot4(sums[1], low[1], x0123);
                sums[0] = dot4(sums[0], high[0], x4567);
                sums[1] = dot4(sums[1], high[1], x4567);
#endif
            }
        }
    }
#if defined(PENSTOCK_PAIRS)
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            for (int h = 0; h < 2; ++h) acc[r][p][h] += dot2_words((vi)parts[r][p][h], vi{} + 0x00010001);
#endif
}

// sums[row][panel] (+)= x[row] * panel over inputs [first, end), which begin with a group.
template <int ROWS, int PANELS, Weight KIND>
void tile(const LinearCall& call, int64_t first_row, int64_t first_panel, int64_t first, int64_t end, float* sums,
          int64_t sums_stride) {
    const PackedWeight& weight = *call.weight;
    const RowLayout layout(weight);
    const char* const x = reinterpret_cast<const char*>(call.rounded) + first_row * layout.bytes;
    const char* codes[PANELS];
    constexpr int64_t kBytesPer32 = kCodeInputs * kPanel / (KIND == Weight::kInt8 ? 1 : 2);
    for (int p = 0; p < PANELS; ++p)
        codes[p] = panel_at(weight, first_panel + p) + first / kCodeInputs * kBytesPer32;
    const int64_t num_groups = weight.num_groups();
    int64_t group = first / weight.group;
    for (int64_t k = first; k < end; ++group) {
        vi acc[ROWS][PANELS][2] = {};
        for (const int64_t group_end = min(k + weight.group, end); k < group_end; k += kCodeInputs) {
            if constexpr (KIND == Weight::kInt8) {
                add_int8<ROWS, PANELS>(acc, codes, x + k * layout.code_bytes, layout.bytes);
            } else {
                add_int4<ROWS, PANELS>(acc, codes, x + k * layout.code_bytes, layout.bytes);
            }
            for (int p = 0; p < PANELS; ++p) codes[p] += kBytesPer32;
        }
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const int64_t at = ((first_panel + p) * num_groups + group) * kPanel;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                int32_t row_sum;
                __builtin_memcpy(&row_sum, x + r * layout.bytes + layout.sums_at + group * 4, 4);
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    vi off = vi{} + row_sum * zero_of(KIND);
                    if (weight.zeros) off = zeros_at(weight.zeros + at + h * W) * row_sum;
                    const vf part = __builtin_convertvector(acc[r][p][h] - off, vf);
                    float* const to = sums + p * sums_stride + r * kPanel + h * W;
                    store(to, fma(part, load(weight.scales + at + h * W), group == 0 ? vf{} : load(to)));
                }
            }
        }
    }
}

template <int ROWS, Weight KIND>
void rows_or_fewer(int64_t num_rows, const LinearCall& call, int64_t first_row, int64_t panel, int64_t first,
                   int64_t end, float* sums) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            tile<ROWS, 1, KIND>(call, first_row, panel, first, end, sums, 0);
        } else {
            rows_or_fewer<ROWS - 1, KIND>(num_rows, call, first_row, panel, first, end, sums);
        }
    }
}

void row_scales_of(const LinearCall& call, int64_t first_row, int64_t num_rows, float* to) {
    const RowLayout layout(*call.weight);
    for (int64_t r = 0; r < num_rows; ++r)
        __builtin_memcpy(to + r, call.rounded + (first_row + r) * layout.bytes + layout.scale_at, 4);
}

// Few rows: the weights' way from memory is what takes time, and several panels at once keep enough in flight.
template <int ROWS, int PANELS, Weight KIND>
void few_rows(const LinearCall& call, int64_t first_row, int64_t first_panel, int64_t end_panel, float* sums) {
    const int64_t K = call.weight->padded_inputs;
    float row_scales[ROWS];
    row_scales_of(call, first_row, ROWS, row_scales);
    int64_t p = first_panel;
    for (; p + PANELS <= end_panel; p += PANELS) {
        tile<ROWS, PANELS, KIND>(call, first_row, p, 0, K, sums, ROWS * kPanel);
        for (int i = 0; i < PANELS; ++i) finish(call, p + i, first_row, ROWS, sums + i * ROWS * kPanel, row_scales);
    }
    for (; p < end_panel; ++p) {
        tile<ROWS, 1, KIND>(call, first_row, p, 0, K, sums, 0);
        finish(call, p, first_row, ROWS, sums, row_scales);
    }
}

template <Weight KIND>
void many_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
               float* sums) {
    const PackedWeight& weight = *call.weight;
    constexpr int64_t kInputs = kPanelBytes / kPanel * (KIND == Weight::kInt8 ? 1 : 2);
    // A part is whole groups.
    const int64_t part = weight.group >= kInputs ? weight.group : kInputs / weight.group * weight.group;
    float row_scales[kRows];
    row_scales_of(call, first_row, num_rows, row_scales);
#if defined(PENSTOCK_PAIRS)
    if (KIND == Weight::kInt8 && num_rows >= kWordsFrom)
        return many_rows_of_words(call, first_row, num_rows, first_panel, end_panel, row_scales, sums);
#endif
    for (int64_t p = first_panel; p < end_panel; ++p) {
        for (int64_t k = 0; k < weight.padded_inputs; k += part)
            for (int64_t r = 0; r < num_rows; r += kMaxRows)
                rows_or_fewer<kMaxRows, KIND>(min(kMaxRows, num_rows - r), call, first_row + r, p, k,
                                              min(k + part, weight.padded_inputs), sums + r * kPanel);
        finish(call, p, first_row, num_rows, sums, row_scales);
    }
}

template <Weight KIND>
void linear_of(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
               float* scratch) {
    for (int64_t row = first_row; row < end_row; row += kRows) {
        const int64_t num_rows = min(kRows, end_row - row);
        switch (num_rows) {
            case 1:
                few_rows<1, 4, KIND>(call, row, first_panel, end_panel, scratch);
                break;
            case 2:
                few_rows<2, 2, KIND>(call, row, first_panel, end_panel, scratch);
                break;
            default:
                many_rows<KIND>(call, row, num_rows, first_panel, end_panel, scratch);
        }
    }
}

}  // namespace

void linear_of_codes(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
                     float* scratch) {
    if (call.weight->kind == Weight::kInt8) {
        linear_of<Weight::kInt8>(call, first_row, end_row, first_panel, end_panel, scratch);
    } else {
        linear_of<Weight::kInt4>(call, first_row, end_row, first_panel, end_panel, scratch);
    }
}

}  // namespace penstock::PENSTOCK_ISA
