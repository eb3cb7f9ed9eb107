// Products of weights that are floats.
//
// A vector holds W outputs, and every output is one chain of multiply-adds over the inputs in their order. So a row's
// result is the same whatever other rows are computed beside it, and in whichever tile.
#include "finish.h"
#include "shortened.h"

namespace penstock::PENSTOCK_ISA {
namespace {

// From here on, widening bfloat16 once for all rows is cheaper than once for each tile of them.
constexpr int64_t kWidenFrom = 2 * kMaxRows;
// Activations that stay in the second-level cache, of at least 1 MiB where bfloat16s are multiplied in pairs.
constexpr int64_t kActivationBytes = 512 * 1024;

struct F32Panel {
    const float* weights;
    static F32Panel of(const PackedWeight& weight, int64_t panel) {
        return {reinterpret_cast<const float*>(panel_at(weight, panel))};
    }
    static constexpr int kAtOnce = 1;
    static vf input(const float* x) { return splat(*x); }
    static vf add(vf sums, vf input, vf weights) { return fma(input, weights, sums); }
    F32Panel at(int64_t input) const { return {weights + input * kPanel}; }
    template <int>
    void get(int64_t input, vf (&to)[2]) const {
        to[0] = load(weights + input * kPanel);
        to[1] = load(weights + input * kPanel + W);
    }
};

struct BF16Panel {
    const uint32_t* weights;
    static BF16Panel of(const PackedWeight& weight, int64_t panel) {
        return {reinterpret_cast<const uint32_t*>(panel_at(weight, panel))};
    }
    static constexpr int kAtOnce = 1;
    static vf input(const float* x) { return splat(*x); }
    static vf add(vf sums, vf input, vf weights) { return fma(input, weights, sums); }
    BF16Panel at(int64_t input) const { return {weights + input * W}; }
    template <int>
    void get(int64_t input, vf (&to)[2]) const {
        halves_of(load_bits(weights + input * W), to);
    }
};

// Words of two inputs each, in the activations too: an input is a pair here.
struct PairPanel {
    const uint32_t* weights;
    static PairPanel of(const PackedWeight& weight, int64_t panel) {
        return {reinterpret_cast<const uint32_t*>(panel_at(weight, panel))};
    }
    static constexpr int kAtOnce = 1;
    static vf input(const float* x) { return as_floats(word_at(x)); }
    static vf add(vf sums, vf input, vf weights) { return dot2_bf16(sums, (vi)input, (vi)weights); }
    PairPanel at(int64_t input) const { return {weights + input * kPanel}; }
    template <int>
    void get(int64_t input, vf (&to)[2]) const {
        to[0] = as_floats(load_bits(weights + input * kPanel));
        to[1] = as_floats(load_bits(weights + input * kPanel + W));
    }
};

// Either of these in 12 bits each. Inputs, or pairs of them, come as many at once as four inputs are.
struct ShortenedPanel {
    const char* fours;
    vbytes upper;
    static ShortenedPanel of(const PackedWeight& weight, int64_t panel) {
        return {panel_at(weight, panel), repeated(outliers_of(weight, panel).upper)};
    }
    static constexpr int kAtOnce = kBF16Pairs ? 2 : 4;
    static vf input(const float* x) { return kBF16Pairs ? PairPanel::input(x) : BF16Panel::input(x); }
    static vf add(vf sums, vf input, vf weights) {
        return kBF16Pairs ? PairPanel::add(sums, input, weights) : BF16Panel::add(sums, input, weights);
    }
    ShortenedPanel at(int64_t input) const { return {fours + input / kAtOnce * kFourBytes, upper}; }
    template <int WHICH>
    inline __attribute__((always_inline)) void get(int64_t input, vf (&to)[2]) const {
        vi words[2];
        lengthen(fours + input / kAtOnce * kFourBytes, kBF16Pairs ? WHICH : WHICH / 2, upper, words);
        if (!kBF16Pairs) return halves_of(words[WHICH % 2], to);
        to[0] = as_floats(words[0]);
        to[1] = as_floats(words[1]);
    }
};

// acc[row][half] += one input of each row times its weights: of those at once from `k` on, number WHICH.
template <int WHICH, int ROWS, class Panel>
inline __attribute__((always_inline)) void add_input(vf (&acc)[ROWS][2], const float* x, int64_t x_stride,
                                                     const Panel& panel, int64_t k) {
    vf weights[2];
    panel.template get<WHICH>(k, weights);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        const vf input = Panel::input(x + r * x_stride + WHICH);
        acc[r][0] = Panel::add(acc[r][0], input, weights[0]);
        acc[r][1] = Panel::add(acc[r][1], input, weights[1]);
    }
}

// sums[row] (+)= x[row] * panel over `num_inputs` inputs.
template <int ROWS, class Panel, class Ahead>
__attribute__((noinline)) void tile(const float* x, int64_t x_stride, const Panel& panel, int64_t num_inputs,
                                    bool from_zero, Ahead ahead, float* sums) {
    vf acc[ROWS][2];
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < 2; ++h) acc[r][h] = from_zero ? vf{} : load(sums + r * kPanel + h * W);
    for (int64_t k = 0; k < num_inputs; k += Panel::kAtOnce) {
        for (int i = 0; i < Panel::kAtOnce; ++i) ahead.fetch();
        add_input<0>(acc, x + k, x_stride, panel, k);
        if constexpr (Panel::kAtOnce > 1) add_input<1>(acc, x + k, x_stride, panel, k);
        if constexpr (Panel::kAtOnce > 2) {
            add_input<2>(acc, x + k, x_stride, panel, k);
            add_input<3>(acc, x + k, x_stride, panel, k);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < 2; ++h) store(sums + r * kPanel + h * W, acc[r][h]);
}

template <int ROWS, class... Rest>
void rows_or_fewer(int64_t num_rows, const Rest&... rest) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            tile<ROWS>(rest...);
        } else {
            rows_or_fewer<ROWS - 1>(num_rows, rest...);
        }
    }
}

// Inputs of a panel as floats.
void widen(const BF16Panel& panel, int64_t num_inputs, float* to) {
    for (int64_t k = 0; k < num_inputs; ++k, to += kPanel) {
        vf weights[2];
        panel.get<0>(k, weights);
        store(to, weights[0]);
        store(to + W, weights[1]);
    }
}

void widen(const ShortenedPanel& panel, int64_t num_inputs, float* to) {
    for (int64_t k = 0; k < num_inputs; k += 4)
        for (int which = 0; which < 2; ++which) {
            vi words[2];
            lengthen(panel.fours + k / 4 * kFourBytes, which, panel.upper, words);
            for (int i = 0; i < 2; ++i, to += kPanel) {
                vf weights[2];
                halves_of(words[i], weights);
                store(to, weights[0]);
                store(to + W, weights[1]);
            }
        }
}

int64_t num_inputs_of(const PackedWeight& weight) {
    return is_in_pairs(weight) ? weight.padded_inputs / 2 : weight.num_inputs;
}

// Inputs of a panel that all rows are multiplied by before the next: what one tile takes is not needed again, and pairs
// of them, a few bytes for each instruction, come from the second-level cache as fast. There the rows' own have to stay.
int64_t part_of(const PackedWeight& weight, int64_t num_rows) {
    const int64_t K = num_inputs_of(weight);
    if (num_rows <= kMaxRows) return K;
    return is_in_pairs(weight) ? min(K, kActivationBytes / 4 / num_rows / 2 * 2) : kFloatInputs;
}

template <class Panel, class Ahead>
void all_rows(const Panel& panel, Ahead ahead, const float* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
              bool from_zero, float* sums) {
    const int64_t each = ceil_div(num_rows, num_tiles(num_rows));
    for (int64_t r = 0; r < num_rows; r += each, ahead.pass(num_inputs))
        rows_or_fewer<kMaxRows>(min(each, num_rows - r), x + r * x_stride, x_stride, panel, num_inputs, from_zero,
                                ahead, sums + r * kPanel);
}

void up_to_128_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
                    float* scratch) {
    const PackedWeight& weight = *call.weight;
    const int64_t K = num_inputs_of(weight);
    const int64_t part = part_of(weight, num_rows);
    float* const sums = scratch;
    float* const widened = scratch + kRows * kPanel;
    const int64_t input_bytes = panel_bytes(weight) / K;
    for (int64_t p = first_panel; p < end_panel; ++p) {
        for (int64_t k = 0; k < K; k += part) {
            const int64_t num_inputs = min(part, K - k);
            const float* const x = call.x + first_row * call.x_stride + k;
            const auto with = [&](auto panel) {
                const auto beside = [&](auto ahead) {
                    all_rows(panel, ahead, x, call.x_stride, num_rows, num_inputs, k == 0, sums);
                };
                if (num_rows <= kMaxRows) return beside(LittleLater{panel_at(weight, p) + k * input_bytes});
                // Tiles by a part of a panel fetch the next one, which lies behind it.
                beside(NextPart{panel_at(weight, p) + (k + part) * input_bytes,
                                ceil_div(input_bytes, num_tiles(num_rows))});
            };
            if (weight.kind == Weight::kFloat32) {
                with(F32Panel::of(weight, p).at(k));
            } else if (weight.is_shortened && (kBF16Pairs || num_rows < kWidenFrom)) {
                with(ShortenedPanel::of(weight, p).at(k));
            } else if (is_in_pairs(weight)) {
                with(PairPanel::of(weight, p).at(k));
            } else if (num_rows < kWidenFrom) {
                with(BF16Panel::of(weight, p).at(k));
            } else {
                if (weight.is_shortened) {
                    widen(ShortenedPanel::of(weight, p).at(k), num_inputs, widened);
                } else {
                    widen(BF16Panel::of(weight, p).at(k), num_inputs, widened);
                }
                with(F32Panel{widened});
            }
        }
        complete(call, p, first_row, num_rows, sums);
        finish(call, p, first_row, num_rows, sums, nullptr);
    }
}

}  // namespace

void complete(const LinearCall& call, int64_t panel, int64_t first_row, int64_t num_rows, float* sums) {
    if (!call.weight->is_shortened) return;
    const Outliers& outliers = outliers_of(*call.weight, panel);
    const float* const x = call.x + first_row * call.x_stride;
    for (int i = 0; i < outliers.count; ++i) {
        const Outlier& one = outliers.each[i];
        for (int64_t r = 0; r < num_rows; ++r) {
            const float* const row = x + r * call.x_stride;
            const float input = kBF16Pairs ? to_float(reinterpret_cast<const bf16*>(row)[one.input]) : row[one.input];
            sums[r * kPanel + one.place] += input * to_float(one.value);
        }
    }
}

int64_t rounded_row_bytes(const PackedWeight& weight) {
    if (weight.int8_activations) return row_bytes_for_codes(weight);
    return is_in_pairs(weight) ? (weight.padded_inputs * 2 + 63) / 64 * 64 : 0;
}

void round_activations(const LinearCall& call, int64_t first_row, int64_t end_row) {
    if (call.weight->int8_activations) return round_for_codes(call, first_row, end_row);
    const int64_t K = call.weight->num_inputs, row_bytes = rounded_row_bytes(*call.weight);
    for (int64_t row = first_row; row < end_row; ++row) {
        bf16* const out = reinterpret_cast<bf16*>(call.rounded + row * row_bytes);
        for (int64_t k = 0; k < K; ++k) out[k] = to_bf16(call.x[row * call.x_stride + k]);
        for (int64_t k = K; k < row_bytes / 2; ++k) out[k] = {0};
    }
}

int64_t linear_scratch_floats() { return kScratchFloats; }

int64_t most_rows(const PackedWeight& weight) {
    return kTiles && (weight.int8_activations || is_in_pairs(weight)) ? most_tile_rows(weight) : kRows;
}

void finish(const LinearCall& call, int64_t panel, int64_t first_row, int64_t num_rows, const float* sums,
            const float* row_scales) {
    const Finish finish_row(call, panel);
    for (int64_t r = 0; r < num_rows; ++r) {
        vf halves[2] = {load(sums + r * kPanel), load(sums + r * kPanel + W)};
        if (row_scales) {
            halves[0] *= splat(row_scales[r]);
            halves[1] *= splat(row_scales[r]);
        }
        finish_row(halves, first_row + r);
    }
}

void linear(const LinearCall& given, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
            float* scratch) {
    if (given.weight->int8_activations)
        return linear_of_codes(given, first_row, end_row, first_panel, end_panel, scratch);
    if (given.weight->has_codes())
        return linear_of_widened_codes(given, first_row, end_row, first_panel, end_panel, scratch);
    LinearCall call = given;
    if (is_in_pairs(*call.weight)) {
        call.x = reinterpret_cast<const float*>(call.rounded);
        call.x_stride = rounded_row_bytes(*call.weight) / 4;
    }
    if (kTiles && is_in_pairs(*call.weight))
        return linear_through_tiles(call, first_row, end_row, first_panel, end_panel, scratch);
    up_to_128_rows(call, first_row, end_row - first_row, first_panel, end_panel, scratch);
}

}  // namespace penstock::PENSTOCK_ISA
