// From matrices as they come to panels, once at load; and back from codes to floats.
#include "panels.h"

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest, ties to even

// The source's rows, one of which is at each place of a panel.
struct Rows {
    const WeightSource* from;
    int64_t num_inputs;
    int64_t source_row[kPanel];  // -1 where the panel is wider than the matrix
    bool is_up[kPanel];

    float at(int64_t place, int64_t k) const {
        if (source_row[place] < 0) return 0.0f;
        const void* const matrix = is_up[place] ? from->up : from->weight;
        const int64_t element = source_row[place] * num_inputs + k;
        return from->kind == Weight::kFloat32 ? static_cast<const float*>(matrix)[element]
                                              : to_float(static_cast<const bf16*>(matrix)[element]);
    }
};

// One code of a panel, into memory that was zero.
void put_code(const PackedWeight& to, char* panel, int64_t place, int64_t k, uint8_t code) {
    if (to.kind == Weight::kInt8) {
        panel[(k / 4 * kPanel + place) * 4 + k % 4] = static_cast<char>(code);
    } else {
        char& both = panel[(k / 8 * kPanel + place) * 4 + k % 4];
        both = static_cast<char>(both | code << (k / 4 % 2 * 4));
    }
}

// Rounds x / scale to a code's integer, as far as there are codes.
vf rounded(vf x, vf inverse, float lowest, float greatest) {
    const vf n = (x * inverse + kMagic) - kMagic;
    const vf bounded = n > splat(lowest) ? n : splat(lowest);  // so is what is not a number
    return bounded < splat(greatest) ? bounded : splat(greatest);
}

vf magnitude(vf x) { return x < vf{} ? -x : x; }

vf inverse_of(vf scale) { return magnitude(scale) > kLeast ? 1.0f / scale : vf{}; }

// The scale of one group, W outputs at a time: x is [num_inputs, kPanel] from the first of them on.
vf scale_of(Weight kind, const float* x, int64_t num_inputs) {
    vf extreme{};
    for (int64_t k = 0; k < num_inputs; ++k) {
        const vf value = load(x + k * kPanel);
        extreme = magnitude(value) > magnitude(extreme) ? value : extreme;
    }
    if (kind == Weight::kInt8) return magnitude(extreme) / 127.0f;
    // There is one more code below zero than above, so the extreme goes there. Cutting it off, or leaving codes unused,
    // may serve the others better: of these scales the one with the least squared error is taken.
    vf best_scale{}, least = splat(__builtin_inff());
    for (int i = 0; i < 16; ++i) {
        const vf scale = extreme / (-6.5f - 0.25f * (float)i), inverse = inverse_of(scale);
        vf error{};
        for (int64_t k = 0; k < num_inputs; ++k) {
            const vf value = load(x + k * kPanel);
            const vf off = value - rounded(value, inverse, -8.0f, 7.0f) * scale;
            error = fma(off, off, error);
        }
        best_scale = error < least ? scale : best_scale;
        least = error < least ? error : least;
    }
    return best_scale;
}

void quantize_panel(const PackedWeight& to, const Rows& rows, int64_t panel) {
    char* const out = panel_at(to, panel);
    const float lowest = to.kind == Weight::kInt8 ? -127.0f : -8.0f;
    const float greatest = to.kind == Weight::kInt8 ? 127.0f : 7.0f;
    const vf zero = splat((float)zero_of(to.kind));
    alignas(64) float x[kMaxGroup * kPanel];
    for (int64_t first = 0; first < to.padded_inputs; first += to.group) {
        const int64_t num_inputs = min(to.group, to.padded_inputs - first);
        for (int64_t i = 0; i < kPanel; ++i)
            for (int64_t k = 0; k < num_inputs; ++k)
                x[k * kPanel + i] = first + k < to.num_inputs ? rows.at(i, first + k) : 0.0f;
        for (int64_t half = 0; half < kPanel; half += W) {
            const vf scale = scale_of(to.kind, x + half, num_inputs), inverse = inverse_of(scale);
            store(to.scales + group_at(to, panel, first) + half, scale);
            for (int64_t k = 0; k < num_inputs; ++k) {
                float codes[W];
                store(codes, rounded(load(x + k * kPanel + half), inverse, lowest, greatest) + zero);
                for (int64_t i = 0; i < W; ++i) put_code(to, out, half + i, first + k, (uint8_t)codes[i]);
            }
        }
    }
}

void copy_codes(const PackedWeight& to, const Rows& rows, int64_t panel) {
    const WeightSource& from = *rows.from;
    char* const out = panel_at(to, panel);
    const int64_t num_groups = to.num_groups();
    for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t row = rows.source_row[i];
        const auto* codes = static_cast<const uint8_t*>(rows.is_up[i] ? from.up : from.weight);
        const float* scales = rows.is_up[i] ? from.up_scales : from.scales;
        const uint8_t* zeros = rows.is_up[i] ? from.up_zeros : from.zeros;
        for (int64_t k = 0; k < to.padded_inputs; ++k) {
            const int64_t group = row * num_groups + k / to.group;
            const uint8_t zero = row >= 0 && zeros ? zeros[group] : (uint8_t)zero_of(to.kind);
            const bool is_padding = row < 0 || k >= to.num_inputs;
            put_code(to, out, i, k, is_padding ? zero : codes[row * to.num_inputs + k]);
            if (k % to.group == 0) {
                const int64_t place = group_at(to, panel, k) + i;
                to.scales[place] = row < 0 ? 0.0f : scales[group];
                if (to.zeros) to.zeros[place] = zero;
            }
        }
    }
}

}  // namespace

void pack_panel(const PackedWeight& to, const WeightSource& from, int64_t panel) {
    const int64_t K = to.num_inputs;
    Rows rows{&from, K, {}, {}};
    for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t row = to.gated ? panel * W + i % W : panel * kPanel + i;
        rows.source_row[i] = row < to.num_outputs ? row : -1;
        rows.is_up[i] = to.gated && i >= W;
    }
    if (to.has_codes()) {
        __builtin_memset(panel_at(to, panel), 0, panel_bytes(to));
        from.kind == to.kind ? copy_codes(to, rows, panel) : quantize_panel(to, rows, panel);
    } else if (to.kind == Weight::kFloat32) {
        float* const out = reinterpret_cast<float*>(panel_at(to, panel));
        for (int64_t k = 0; k < K; ++k)
            for (int64_t i = 0; i < kPanel; ++i) out[k * kPanel + i] = rows.at(i, k);
    } else {
        uint32_t* const out = reinterpret_cast<uint32_t*>(panel_at(to, panel));
        const auto bits = [&](int64_t i, int64_t k) -> uint32_t {
            if (rows.source_row[i] < 0) return 0;
            const auto* matrix = static_cast<const bf16*>(rows.is_up[i] ? from.up : from.weight);
            return matrix[rows.source_row[i] * K + k].bits;
        };
        for (int64_t k = 0; k < K; ++k)
            for (int64_t i = 0; i < W; ++i) out[k * W + i] = bits(i, k) | bits(i + W, k) << 16;
    }
}

void widen_codes(const PackedWeight& weight, int64_t panel, int64_t first, int64_t num_inputs, float* to) {
    const bool is_int8 = weight.kind == Weight::kInt8;
    const char* const codes = panel_at(weight, panel);
    for (int64_t k = first; k < first + num_inputs; ++k, to += kPanel) {
        const char* const words = codes + (is_int8 ? k / 4 : k / 8) * kPanel * 4;
        const int shift = (int)(k % 4 * 8 + (is_int8 ? 0 : k / 4 % 2 * 4));
        const int64_t group = group_at(weight, panel, k);
        for (int64_t half = 0; half < kPanel; half += W) {
            const vi code = (load_bits(words + half * 4) >> shift) & (is_int8 ? 255 : 15);
            vi zero = vi{} + zero_of(weight.kind);
            if (weight.zeros)
                for (int i = 0; i < W; ++i) zero[i] = weight.zeros[group + half + i];
            store(to + half, __builtin_convertvector(code - zero, vf) * load(weight.scales + group + half));
        }
    }
}

}  // namespace penstock::PENSTOCK_ISA
