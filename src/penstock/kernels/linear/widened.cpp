// Products of codes with activations as they are, in floats.
//
// An output is a sum over groups, in their order, of a scale times one chain of multiply-adds over the group's inputs in
// theirs, of activations and codes less their zeros. So a row's result is the same whatever other rows are computed
// beside it: with few, codes become floats in registers, with many once for all of them.
#include "panels.h"

namespace penstock::PENSTOCK_ISA {
namespace {

typedef int8_t vb __attribute__((vector_size(W * 4)));

// A signed byte becomes a float in two instructions where it is its word's upper one: as this many times itself. Sums
// are finite for activations below 2^88.
constexpr float kUnit = 0x1p24f;

// Rows up to which codes are widened in registers, each time that they are multiplied. 4-bit ones take more of these.
template <Weight KIND>
constexpr int kFewRows = KIND == Weight::kInt8 ? kMaxRows : (NUM_REGISTERS - 8) / 2;

// One panel's codes, word by word. Those of 8 bits are taken less 128, whatever their zeros.
template <Weight KIND>
struct Codes {
    static constexpr int kFours = KIND == Weight::kInt8 ? 1 : 2;
    static constexpr int kInputs = 4 * kFours;  // of a word

    const char* words;
    vb zeros[2];

    // Those of 4 bits; `at` is the group's place among all zeros.
    void begin_group(const PackedWeight& weight, int64_t at) {
        if constexpr (KIND == Weight::kInt8) return;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            vi zero = vi{} + zero_of(KIND);
            if (weight.zeros) zero = zeros_at(weight.zeros + at + h * W);
            zeros[h] = (vb)(zero * 0x01010101);
        }
    }

    // Four inputs of each output.
    struct Four {
        vi codes[2];
        vf widened(int input, int half) const {
            return __builtin_convertvector(upper_byte(codes[half], input), vf);
        }
    };
    Four four(int which) const {
        Four out;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const vi word = load_bits(words + h * W * 4);
            out.codes[h] = KIND == Weight::kInt8 ? word ^ (int32_t)0x80808080u
                                                 : (vi)((vb)(word >> which * 4 & 0x0f0f0f0f) - zeros[h]);
        }
        return out;
    }

    void next() { words += 2 * W * 4; }
};

// acc[row][panel][half] += x[row] * a word of each panel.
template <int ROWS, int PANELS, Weight KIND>
inline __attribute__((always_inline)) void add_word(vf (&acc)[ROWS][PANELS][2], Codes<KIND> (&codes)[PANELS],
                                                    const float* x, int64_t x_stride) {
#pragma GCC unroll 2
    for (int which = 0; which < Codes<KIND>::kFours; ++which) {
        typename Codes<KIND>::Four fours[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) fours[p] = codes[p].four(which);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) {
                const vf first = fours[p].widened(i, 0), second = fours[p].widened(i, 1);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const vf input = splat(x[r * x_stride + which * 4 + i]);
                    acc[r][p][0] = fma(input, first, acc[r][p][0]);
                    acc[r][p][1] = fma(input, second, acc[r][p][1]);
                }
            }
    }
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) codes[p].next();
}

float sum_of(const float* x, int64_t size) {
    vf sums{};
    int64_t k = 0;
    for (; k + W <= size; k += W) sums += load(x + k);
    float total = sum(sums);
    for (; k < size; ++k) total += x[k];
    return total;
}

// sums[row] (+)= what a group of a panel adds, `acc` being what was added up of its `num_inputs` inputs; `at` is its place
// among all scales.
template <int ROWS, int PANELS, Weight KIND>
inline __attribute__((always_inline)) void end_group(const PackedWeight& weight, const vf (&acc)[ROWS][PANELS][2], int p,
                                                     int64_t at, const float* x, int64_t x_stride, int64_t num_inputs,
                                                     bool is_first, float* sums) {
    vf scales[2];
    scales_at<KIND>(weight, at, scales);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        const vf scale = scales[h] * splat(1.0f / kUnit);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            vf part = acc[r][p][h];
            if (KIND == Weight::kInt8 && weight.zeros) {
                const vi offset = 128 - zeros_at(weight.zeros + at + h * W);
                part = fma(__builtin_convertvector(offset, vf) * kUnit, splat(sum_of(x + r * x_stride, num_inputs)), part);
            }
            float* const to = sums + r * kPanel + h * W;
            store(to, fma(part, scale, is_first ? vf{} : load(to)));
        }
    }
}

// sums[panel][row] = x[row] * panel.
template <int ROWS, int PANELS, Weight KIND>
void tile(const LinearCall& call, int64_t first_row, int64_t first_panel, float* sums) {
    const PackedWeight& weight = *call.weight;
    const float* const x = call.x + first_row * call.x_stride;
    const int64_t x_stride = call.x_stride, K = weight.num_inputs, num_groups = weight.num_groups();
    Codes<KIND> codes[PANELS];
    for (int p = 0; p < PANELS; ++p) codes[p].words = panel_at(weight, first_panel + p);
    for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t first = group * weight.group, end = min(first + weight.group, K);
        const int64_t place = (first_panel * num_groups + group) * kPanel;
        vf acc[ROWS][PANELS][2] = {};
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) codes[p].begin_group(weight, place + p * num_groups * kPanel);
        int64_t k = first;
#pragma GCC unroll 1
        for (; k + Codes<KIND>::kInputs <= end; k += Codes<KIND>::kInputs) add_word(acc, codes, x + k, x_stride);
        if (k < end) {  // codes go on, with zeros; activations do not
            float last[ROWS][Codes<KIND>::kInputs] = {};
            for (int r = 0; r < ROWS; ++r)
                for (int64_t i = 0; k + i < end; ++i) last[r][i] = x[r * x_stride + k + i];
            add_word(acc, codes, last[0], Codes<KIND>::kInputs);
        }
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p)
            end_group<ROWS, PANELS, KIND>(weight, acc, p, place + p * num_groups * kPanel, x + first, x_stride, end - first,
                                          group == 0, sums + p * ROWS * kPanel);
    }
}

// Few rows: the weights' way from memory is what takes time, and several panels at once keep enough in flight.
template <int ROWS, int PANELS, Weight KIND>
void few_rows(const LinearCall& call, int64_t first_row, int64_t first_panel, int64_t end_panel, float* sums) {
    int64_t p = first_panel;
    for (; p + PANELS <= end_panel; p += PANELS) {
        tile<ROWS, PANELS, KIND>(call, first_row, p, sums);
        for (int i = 0; i < PANELS; ++i) finish(call, p + i, first_row, ROWS, sums + i * ROWS * kPanel, nullptr);
    }
    if constexpr (PANELS > 1) few_rows<ROWS, PANELS / 2, KIND>(call, first_row, p, end_panel, sums);
}

template <int ROWS, Weight KIND>
void few_rows_or_fewer(int64_t num_rows, const LinearCall& call, int64_t first_row, int64_t first_panel,
                       int64_t end_panel, float* sums) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            few_rows<ROWS, ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1, KIND>(call, first_row, first_panel, end_panel, sums);
        } else {
            few_rows_or_fewer<ROWS - 1, KIND>(num_rows, call, first_row, first_panel, end_panel, sums);
        }
    }
}

// Inputs [first, end) of a panel, whole groups, as floats [kInputs, kPanel] for each word.
template <Weight KIND>
void widen(const PackedWeight& weight, int64_t panel, int64_t first, int64_t end, float* to) {
    constexpr int kInputs = Codes<KIND>::kInputs;
    Codes<KIND> codes;
    codes.words = panel_at(weight, panel) + first / kInputs * 2 * W * 4;
    for (int64_t k = first, at = group_at(weight, panel, first); k < end; at += kPanel) {
        codes.begin_group(weight, at);
        for (const int64_t until = min(k + weight.group, end); k < until; k += kInputs, codes.next())
#pragma GCC unroll 2
            for (int which = 0; which < Codes<KIND>::kFours; ++which) {
                const auto four = codes.four(which);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; ++h, to += W) store(to, four.widened(i, h));
            }
    }
}

// sums[row] (+)= x[row] * a widened panel over inputs [first, end), of which `group` begins.
template <int ROWS, Weight KIND>
void tile_of_widened(const LinearCall& call, int64_t first_row, int64_t panel, const float* widened, int64_t first,
                     int64_t end, int64_t group, int64_t num_groups, float* sums) {
    const PackedWeight& weight = *call.weight;
    const float* const x = call.x + first_row * call.x_stride;
    const int64_t x_stride = call.x_stride, group_size = weight.group;
    for (int64_t k = first; k < end; ++group) {
        const int64_t begin = k;
        vf acc[ROWS][1][2] = {};
        for (const int64_t until = min(k + group_size, end); k < until; ++k, widened += kPanel) {
            const vf weights[2] = {load(widened), load(widened + W)};
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const vf input = splat(x[r * x_stride + k]);
                acc[r][0][0] = fma(input, weights[0], acc[r][0][0]);
                acc[r][0][1] = fma(input, weights[1], acc[r][0][1]);
            }
        }
        end_group<ROWS, 1, KIND>(weight, acc, 0, (panel * num_groups + group) * kPanel, x + begin, x_stride, k - begin,
                                 group == 0, sums);
    }
}

template <int ROWS, Weight KIND, class... Rest>
void tile_or_fewer(int64_t num_rows, const Rest&... rest) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            tile_of_widened<ROWS, KIND>(rest...);
        } else {
            tile_or_fewer<ROWS - 1, KIND>(num_rows, rest...);
        }
    }
}

template <Weight KIND>
void many_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
               float* scratch) {
    const PackedWeight& weight = *call.weight;
    const int64_t K = weight.num_inputs, num_groups = weight.num_groups();
    // A part is whole groups.
    const int64_t groups_each = weight.group >= kFloatInputs ? 1 : kFloatInputs / weight.group;
    const int64_t part = groups_each * weight.group;
    float* const sums = scratch;
    float* const widened = scratch + kRows * kPanel;
    static_assert(kScratchFloats - kRows * kPanel >= kMaxGroup * kPanel);
    for (int64_t p = first_panel; p < end_panel; ++p) {
        for (int64_t k = 0, group = 0; k < K; k += part, group += groups_each) {
            const int64_t end = min(k + part, K);
            widen<KIND>(weight, p, k, end, widened);
            for (int64_t r = 0; r < num_rows; r += kMaxRows)
                tile_or_fewer<kMaxRows, KIND>(min(kMaxRows, num_rows - r), call, first_row + r, p, widened, k, end, group,
                                              num_groups, sums + r * kPanel);
        }
        finish(call, p, first_row, num_rows, sums, nullptr);
    }
}

template <Weight KIND>
void up_to_128_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
                    float* scratch) {
    if (num_rows <= kFewRows<KIND>) {
        few_rows_or_fewer<kFewRows<KIND>, KIND>(num_rows, call, first_row, first_panel, end_panel, scratch);
    } else {
        many_rows<KIND>(call, first_row, num_rows, first_panel, end_panel, scratch);
    }
}

}  // namespace

void linear_of_widened_codes(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel,
                             int64_t end_panel, float* scratch) {
    if (call.weight->kind == Weight::kInt8) {
        up_to_128_rows<Weight::kInt8>(call, first_row, end_row - first_row, first_panel, end_panel, scratch);
    } else {
        up_to_128_rows<Weight::kInt4>(call, first_row, end_row - first_row, first_panel, end_panel, scratch);
    }
}

}  // namespace penstock::PENSTOCK_ISA
