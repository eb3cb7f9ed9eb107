// Tokens' vectors.
#include "../linear/shortened.h"

namespace penstock::PENSTOCK_ISA {
namespace {

template <class T>
void widen_row(const T* from, float scale, float* to, int64_t width) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(from + i) * splat(scale));
    for (; i < width; ++i) to[i] = to_float(from[i]) * scale;
}

void lengthen_row(const PackedWeight& from, int64_t row, float scale, float* to) {
    const int64_t panel = row / kPanel, place = row % kPanel;
    for (int64_t k = 0; k < from.num_inputs; ++k) to[k] = to_float(lengthened(from, panel, place, k)) * scale;
    const Outliers& outliers = outliers_of(from, panel);
    for (int i = 0; i < outliers.count; ++i) {
        const Outlier& one = outliers.each[i];
        if (one.place == place) to[one.input] = to_float(one.value) * scale;
    }
}

// The row of floats that was packed into panels.
void unpack_floats(const PackedWeight& from, int64_t row, float scale, float* to) {
    const char* const panel = panel_at(from, row / kPanel);
    const int64_t place = row % kPanel;
    if (from.kind == Weight::kFloat32) {
        const float* const floats = reinterpret_cast<const float*>(panel) + place;
        for (int64_t k = 0; k < from.num_inputs; ++k) to[k] = floats[k * kPanel] * scale;
        return;
    }
    if (from.is_shortened) return lengthen_row(from, row, scale, to);
    // In a word two inputs of an output, or two outputs of an input.
    const bool in_pairs = is_in_pairs(from);
    const bf16* const halves =
        reinterpret_cast<const bf16*>(panel) + (in_pairs ? place * 2 : place % W * 2 + place / W);
    for (int64_t k = 0; k < from.num_inputs; ++k)
        to[k] = to_float(halves[in_pairs ? (k - k % 2) * kPanel + k % 2 : k * kPanel]) * scale;
}

// What the row's codes stand for.
void unpack_codes(const PackedWeight& from, int64_t row, float scale, float* to) {
    const int64_t panel = row / kPanel, place = row % kPanel, inputs_per_word = from.kind == Weight::kInt8 ? 4 : 8;
    const auto* const bytes = reinterpret_cast<const uint8_t*>(panel_at(from, panel)) + place * 4;
    for (int64_t first = 0; first < from.num_inputs; first += from.group) {
        const int64_t at = group_at(from, panel, first) + place;
        const int zero = from.zeros ? from.zeros[at] : zero_of(from.kind);
        for (int64_t k = first; k < min(first + from.group, from.num_inputs); ++k) {
            const int byte = bytes[k / inputs_per_word * kPanel * 4 + k % 4];
            const int code = from.kind == Weight::kInt8 ? byte : byte >> k % 8 / 4 * 4 & 15;
            to[k] = (float)(code - zero) * from.scales[at] * scale;
        }
    }
}

}  // namespace

void embed(const EmbedCall& call, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row) {
        const int64_t token = call.token_ids[row];
        float* const to = call.out + row * call.width;
        if (call.packed) {
            (call.packed->has_codes() ? unpack_codes : unpack_floats)(*call.packed, token, call.scale, to);
        } else if (call.kind == Weight::kFloat32) {
            widen_row(static_cast<const float*>(call.table) + token * call.width, call.scale, to, call.width);
        } else {
            widen_row(static_cast<const bf16*>(call.table) + token * call.width, call.scale, to, call.width);
        }
    }
}

}  // namespace penstock::PENSTOCK_ISA
