// Products of packed weights with rows of activations.
//
// A vector holds W outputs, and every output is one chain of multiply-adds over the inputs in their order. So a row's
// result is the same whatever other rows are computed beside it, and in whichever tile.
#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr int64_t kPanel = 2 * W;
// Two vectors of outputs for each row, two of weights and one of activations have to fit.
constexpr int kMaxRows = (NUM_REGISTERS - 4) / 2;
// A panel's inputs at a time: 16 KiB of float32 weights stay in the first-level cache while all rows pass.
constexpr int64_t kInputs = 4096 / kPanel;
// Rows at a time, whose activations (96 KiB at 256 inputs) stay in the second-level cache while panels pass.
constexpr int64_t kRows = 96;
// From here on, widening bfloat16 or codes once for all rows is cheaper than once for each tile of them.
constexpr int64_t kWidenFrom = 2 * kMaxRows;

struct F32Panel {
    const float* weights;
    F32Panel at(int64_t input) const { return {weights + input * kPanel}; }
    void get(int64_t input, vf& first, vf& second) const {
        first = load(weights + input * kPanel);
        second = load(weights + input * kPanel + W);
    }
};

struct BF16Panel {
    const uint32_t* weights;
    BF16Panel at(int64_t input) const { return {weights + input * W}; }
    void get(int64_t input, vf& first, vf& second) const {
        const vi pairs = load_bits(weights + input * W);
        first = as_floats(pairs << 16);
        second = as_floats(pairs & (int32_t)0xffff0000u);
    }
};

struct Int8Panel {
    const int8_t* codes;
    Int8Panel at(int64_t input) const { return {codes + input * kPanel}; }
    void get(int64_t input, vf& first, vf& second) const {
        first = widened(codes + input * kPanel);
        second = widened(codes + input * kPanel + W);
    }
    // Compilers make no one instruction of a conversion from bytes to words.
    static vf widened(const int8_t* from) {
#if defined(PENSTOCK_AVX512)
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(PENSTOCK_AVX2)
        return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
        vi v;
        for (int i = 0; i < W; ++i) v[i] = from[i];
        return __builtin_convertvector(v, vf);
#endif
    }
};

// sums[row][panel] (+)= x[row] * panel over `num_inputs` inputs.
template <int ROWS, int PANELS, class Panel>
void tile(const float* x, int64_t x_stride, const Panel* panels, int64_t num_inputs, bool from_zero, float* sums,
          int64_t sums_stride) {
    vf acc[ROWS][PANELS][2];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            for (int h = 0; h < 2; ++h)
                acc[r][p][h] = from_zero ? vf{} : load(sums + p * sums_stride + r * kPanel + h * W);
    for (int64_t k = 0; k < num_inputs; ++k) {
        vf weights[PANELS][2];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) panels[p].get(k, weights[p][0], weights[p][1]);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const vf input = splat(x[r * x_stride + k]);
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) {
                acc[r][p][0] = fma(input, weights[p][0], acc[r][p][0]);
                acc[r][p][1] = fma(input, weights[p][1], acc[r][p][1]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            for (int h = 0; h < 2; ++h) store(sums + p * sums_stride + r * kPanel + h * W, acc[r][p][h]);
}

template <int ROWS, int PANELS, class Panel>
void rows_or_fewer(int64_t num_rows, const float* x, int64_t x_stride, const Panel* panels, int64_t num_inputs,
                   bool from_zero, float* sums, int64_t sums_stride) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS) {
            tile<ROWS, PANELS>(x, x_stride, panels, num_inputs, from_zero, sums, sums_stride);
        } else {
            rows_or_fewer<ROWS - 1, PANELS>(num_rows, x, x_stride, panels, num_inputs, from_zero, sums, sums_stride);
        }
    }
}

template <class Panel>
void widen(const Panel& panel, int64_t num_inputs, float* to) {
    for (int64_t k = 0; k < num_inputs; ++k) {
        vf first, second;
        panel.get(k, first, second);
        store(to + k * kPanel, first);
        store(to + k * kPanel + W, second);
    }
}

// What a panel's sums become: with scale, bias, gate and addition, at their place in `out`.
void finish(const LinearCall& call, int64_t panel, int64_t first_row, int64_t num_rows, const float* sums) {
    const PackedWeight& weight = *call.weight;
    const int64_t width = weight.gated ? W : kPanel;
    const int64_t first = panel * width;
    const int64_t num_outputs = min(width, weight.num_outputs - first);
    for (int64_t r = 0; r < num_rows; ++r) {
        vf halves[2] = {load(sums + r * kPanel), load(sums + r * kPanel + W)};
        if (weight.scales) {
            halves[0] *= load(weight.scales + panel * kPanel);
            halves[1] *= load(weight.scales + panel * kPanel + W);
        }
        if (weight.bias) {
            halves[0] += load(weight.bias + panel * kPanel);
            halves[1] += load(weight.bias + panel * kPanel + W);
        }
        if (weight.gated) halves[0] = silu(halves[0]) * halves[1];
        float* out = call.out + (first_row + r) * call.out_stride + first;
        const float* added = call.added ? call.added + (first_row + r) * call.out_stride + first : nullptr;
        if (num_outputs == width) {
            if (added) {
                halves[0] += load(added);
                if (!weight.gated) halves[1] += load(added + W);
            }
            store(out, halves[0]);
            if (!weight.gated) store(out + W, halves[1]);
        } else {
            float values[kPanel];
            store(values, halves[0]);
            store(values + W, halves[1]);
            for (int64_t n = 0; n < num_outputs; ++n) out[n] = values[n] + (added ? added[n] : 0.0f);
        }
    }
}

template <class Panel>
Panel panel_of(const PackedWeight& weight, int64_t panel);

template <>
F32Panel panel_of(const PackedWeight& weight, int64_t panel) {
    return {static_cast<const float*>(weight.panels) + panel * weight.num_inputs * kPanel};
}

template <>
BF16Panel panel_of(const PackedWeight& weight, int64_t panel) {
    return {static_cast<const uint32_t*>(weight.panels) + panel * weight.num_inputs * W};
}

template <>
Int8Panel panel_of(const PackedWeight& weight, int64_t panel) {
    return {static_cast<const int8_t*>(weight.panels) + panel * weight.num_inputs * kPanel};
}

// Few rows: the weights' way from memory is what takes time, and several panels at once keep enough in flight.
template <int ROWS, int PANELS, class Panel>
void few_rows(const LinearCall& call, int64_t first_row, int64_t first_panel, int64_t end_panel, float* sums) {
    const int64_t K = call.weight->num_inputs;
    const float* x = call.x + first_row * call.x_stride;
    int64_t p = first_panel;
    for (; p + PANELS <= end_panel; p += PANELS) {
        Panel panels[PANELS];
        for (int i = 0; i < PANELS; ++i) panels[i] = panel_of<Panel>(*call.weight, p + i);
        tile<ROWS, PANELS>(x, call.x_stride, panels, K, true, sums, ROWS * kPanel);
        for (int i = 0; i < PANELS; ++i) finish(call, p + i, first_row, ROWS, sums + i * ROWS * kPanel);
    }
    for (; p < end_panel; ++p) {
        const Panel panel = panel_of<Panel>(*call.weight, p);
        tile<ROWS, 1>(x, call.x_stride, &panel, K, true, sums, ROWS * kPanel);
        finish(call, p, first_row, ROWS, sums);
    }
}

template <class Panel>
void many_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
               float* scratch) {
    const int64_t K = call.weight->num_inputs;
    float* const sums = scratch;
    float* const widened = scratch + kRows * kPanel;
    const float* const x = call.x + first_row * call.x_stride;
    for (int64_t p = first_panel; p < end_panel; ++p) {
        const Panel panel = panel_of<Panel>(*call.weight, p);
        for (int64_t k = 0; k < K; k += kInputs) {
            const int64_t num_inputs = min(kInputs, K - k);
            const auto all_rows = [&](auto part) {
                for (int64_t r = 0; r < num_rows; r += kMaxRows)
                    rows_or_fewer<kMaxRows, 1>(min(kMaxRows, num_rows - r), x + r * call.x_stride + k, call.x_stride,
                                               &part, num_inputs, k == 0, sums + r * kPanel, 0);
            };
            if constexpr (!__is_same(Panel, F32Panel)) {
                if (num_rows >= kWidenFrom) {
                    widen(panel.at(k), num_inputs, widened);
                    all_rows(F32Panel{widened});
                    continue;
                }
            }
            all_rows(panel.at(k));
        }
        finish(call, p, first_row, num_rows, sums);
    }
}

template <class Panel>
void linear_of(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
               float* scratch) {
    for (int64_t row = first_row; row < end_row; row += kRows) {
        const int64_t num_rows = min(kRows, end_row - row);
        switch (num_rows) {
            case 1:
                few_rows<1, 4, Panel>(call, row, first_panel, end_panel, scratch);
                break;
            case 2:
                few_rows<2, 2, Panel>(call, row, first_panel, end_panel, scratch);
                break;
            default:
                many_rows<Panel>(call, row, num_rows, first_panel, end_panel, scratch);
        }
    }
}

}  // namespace

int64_t linear_scratch_floats() { return kRows * kPanel + kInputs * kPanel; }

void linear(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
            float* scratch) {
    switch (call.weight->kind) {
        case Weight::kFloat32:
            return linear_of<F32Panel>(call, first_row, end_row, first_panel, end_panel, scratch);
        case Weight::kBFloat16:
            return linear_of<BF16Panel>(call, first_row, end_row, first_panel, end_panel, scratch);
        case Weight::kInt8:
            return linear_of<Int8Panel>(call, first_row, end_row, first_panel, end_panel, scratch);
    }
}

namespace {

// The rows of a source matrix, one of which is at each place of a panel.
struct Rows {
    const void* of[kPanel];  // null where the panel is wider than the matrix
    Weight kind;

    float at(int64_t place, int64_t k) const {
        if (!of[place]) return 0.0f;
        return kind == Weight::kFloat32 ? static_cast<const float*>(of[place])[k]
                                        : to_float(static_cast<const bf16*>(of[place])[k]);
    }
};

void quantize_panel(const PackedWeight& to, const Rows& rows, int64_t panel) {
    const int64_t K = to.num_inputs;
    int8_t* const out = static_cast<int8_t*>(to.panels) + panel * K * kPanel;
    for (int64_t i = 0; i < kPanel; ++i) {
        float greatest = 0.0f;
        for (int64_t k = 0; k < K; ++k) {
            const float magnitude = __builtin_fabsf(rows.at(i, k));
            greatest = magnitude > greatest ? magnitude : greatest;
        }
        const float scale = greatest / 127.0f;
        to.scales[panel * kPanel + i] = scale;
        const float divisor = scale > 0.0f ? scale : 1.0f;
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        for (int64_t k = 0; k < K; ++k)
            out[k * kPanel + i] = (int8_t)((rows.at(i, k) / divisor + 12582912.0f) - 12582912.0f);
    }
}

}  // namespace

void pack_panel(const PackedWeight& to, const void* weight, const void* up, Weight from, int64_t panel) {
    const int64_t K = to.num_inputs, row_bytes = K * (from == Weight::kFloat32 ? 4 : 2);
    Rows rows{{}, from};
    for (int64_t i = 0; i < kPanel; ++i) {
        const void* const source = to.gated && i >= W ? up : weight;
        const int64_t row = to.gated ? panel * W + i % W : panel * kPanel + i;
        rows.of[i] = row < to.num_outputs ? static_cast<const char*>(source) + row * row_bytes : nullptr;
    }
    switch (to.kind) {
        case Weight::kFloat32: {
            float* const out = static_cast<float*>(to.panels) + panel * K * kPanel;
            for (int64_t k = 0; k < K; ++k)
                for (int64_t i = 0; i < kPanel; ++i) out[k * kPanel + i] = rows.at(i, k);
            break;
        }
        case Weight::kBFloat16: {
            uint32_t* const out = static_cast<uint32_t*>(to.panels) + panel * K * W;
            const auto bits = [&](int64_t i, int64_t k) -> uint32_t {
                return rows.of[i] ? static_cast<const bf16*>(rows.of[i])[k].bits : 0;
            };
            for (int64_t k = 0; k < K; ++k)
                for (int64_t i = 0; i < W; ++i) out[k * W + i] = bits(i, k) | bits(i + W, k) << 16;
            break;
        }
        case Weight::kInt8:
            quantize_panel(to, rows, panel);
    }
}

}  // namespace penstock::PENSTOCK_ISA
