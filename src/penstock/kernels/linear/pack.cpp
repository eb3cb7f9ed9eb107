// From matrices as they come to panels, once at load.
#include "shortened.h"

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest, ties to even

// The source's rows, one of which is at each place of a panel.
struct Rows {
    const WeightSource* from;
    int64_t num_inputs;
    int64_t source_row[kPanel];  // of `matrix`; -1 where the panel is wider than the matrix
    const void* matrix[kPanel];
    bool is_up[kPanel];

    template <class T>
    const T* at(int64_t place) const {
        return static_cast<const T*>(matrix[place]) + source_row[place] * num_inputs;
    }
};

template <int... I>
struct Ints {};
// Ints<0, 1, .., N - 1>
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
    using Type = Ints<I...>;
};

// Swaps the H wide blocks off the diagonal of the 2H wide ones that rows `a` and `b`, H apart, go through.
template <int H, int... I>
void swap_blocks(vf& a, vf& b, Ints<I...>) {
    const vf upper = __builtin_shufflevector(a, b, (I & H ? W + I - H : I)...);
    b = __builtin_shufflevector(a, b, (I & H ? W + I : I + H)...);
    a = upper;
}

// Eklundh's transposition of W rows of W.
template <int H = W / 2>
void transpose(vf* rows) {
    for (int i = 0; i < W; ++i)
        if (!(i & H)) swap_blocks<H>(rows[i], rows[i + H], typename Count<W>::Type{});
    if constexpr (H > 1) transpose<H / 2>(rows);
}

// Inputs [first, first + num_known) of W places as floats [num_known, kPanel].
template <class T>
void gather_rows(const Rows& rows, int64_t place, int64_t first, int64_t num_known, float* to) {
    const T* from[W];
    for (int i = 0; i < W; ++i)
        from[i] = rows.source_row[place + i] < 0 ? nullptr : rows.at<T>(place + i) + first;
    int64_t k = 0;
    for (; k + W <= num_known; k += W) {
        vf block[W];
        for (int i = 0; i < W; ++i) block[i] = from[i] ? load(from[i] + k) : vf{};
        transpose(block);
        for (int j = 0; j < W; ++j) store(to + (k + j) * kPanel + place, block[j]);
    }
    for (; k < num_known; ++k)
        for (int i = 0; i < W; ++i) to[k * kPanel + place + i] = from[i] ? to_float(from[i][k]) : 0.0f;
}

// Inputs [first, first + num_inputs) of all places as floats [num_inputs, kPanel], zeros where there are none.
void gather(const Rows& rows, int64_t first, int64_t num_inputs, float* to) {
    const int64_t num_known = min(num_inputs, rows.num_inputs - first);
    for (int64_t place = 0; place < kPanel; place += W) {
        if (rows.from->kind == Weight::kFloat32)
            gather_rows<float>(rows, place, first, num_known, to);
        else
            gather_rows<bf16>(rows, place, first, num_known, to);
    }
    for (int64_t k = num_known; k < num_inputs; ++k)
        for (int64_t half = 0; half < kPanel; half += W) store(to + k * kPanel + half, vf{});
}

// Inputs [first, first + num_inputs) of all places as pairs of bfloat16s, [num_inputs / 2, kPanel], zeros where there are
// none; the first and their number are even.
void gather_pairs(const Rows& rows, int64_t first, int64_t num_inputs, int32_t* to) {
    const int64_t num_known = min(num_inputs, rows.num_inputs - first);
    for (int64_t place = 0; place < kPanel; place += W) {
        const bf16* from[W];
        for (int i = 0; i < W; ++i)
            from[i] = rows.source_row[place + i] < 0 ? nullptr : rows.at<bf16>(place + i) + first;
        int64_t k = 0;
        for (; k + 2 * W <= num_known; k += 2 * W) {
            vf block[W];
            for (int i = 0; i < W; ++i) block[i] = from[i] ? as_floats(load_bits(from[i] + k)) : vf{};
            transpose(block);
            for (int j = 0; j < W; ++j) __builtin_memcpy(to + (k / 2 + j) * kPanel + place, block + j, sizeof block[j]);
        }
        for (; k < num_inputs; k += 2)
            for (int i = 0; i < W; ++i) {
                const int64_t size = from[i] ? min(2, num_known - k) : 0;
                int32_t pair = 0;
                if (size > 0) __builtin_memcpy(&pair, from[i] + k, size * sizeof(bf16));
                to[k / 2 * kPanel + place + i] = pair;
            }
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

// What values are divided by to be rounded to codes, and what the codes stand for one of.
struct Scale {
    vf divisor;
    vf value;
};

// One group's, W outputs at a time: x is [num_inputs, kPanel] from the first of them on.
Scale scale_of(Weight kind, const float* x, int64_t num_inputs) {
    vf extreme{};
    for (int64_t k = 0; k < num_inputs; ++k) {
        const vf value = load(x + k * kPanel);
        extreme = magnitude(value) > magnitude(extreme) ? value : extreme;
    }
    if (kind == Weight::kInt8) return {magnitude(extreme) / 127.0f, magnitude(extreme) / 127.0f};
    // There is one more code below zero than above, so the extreme goes there. Cutting it off, or leaving codes unused,
    // may serve the others better: of these divisors the one whose codes c leave the least squared error is taken. With
    // the best scale for them, sum(x c) / sum(c c), that is sum(x x) - sum(x c)^2 / sum(c c).
    Scale best{};
    vf most{};
    for (int i = 0; i < 7; ++i) {
        const vf divisor = extreme / (-7.0f - 0.5f * (float)i), inverse = inverse_of(divisor);
        vf xc{}, cc{};
        for (int64_t k = 0; k < num_inputs; ++k) {
            const vf value = load(x + k * kPanel), code = rounded(value, inverse, -8.0f, 7.0f);
            xc = fma(value, code, xc);
            cc = fma(code, code, cc);
        }
        const vf scale = cc > vf{} ? xc / cc : vf{}, gain = xc * scale;
        best.divisor = gain > most ? divisor : best.divisor;
        best.value = gain > most ? scale : best.value;
        most = gain > most ? gain : most;
    }
    return best;
}

void quantize_panel(const PackedWeight& to, const Rows& rows, int64_t panel) {
    const bool is_int8 = to.kind == Weight::kInt8;
    const int64_t inputs_per_word = is_int8 ? 4 : 8;
    const float lowest = is_int8 ? -127.0f : -8.0f, greatest = is_int8 ? 127.0f : 7.0f;
    const vf zero = splat((float)zero_of(to.kind));
    alignas(64) float x[kMaxGroup * kPanel];
    for (int64_t first = 0; first < to.padded_inputs; first += to.group) {
        const int64_t num_inputs = min(to.group, to.padded_inputs - first);
        gather(rows, first, num_inputs, x);
        char* const out = panel_at(to, panel) + first / inputs_per_word * kPanel * 4;
        const int64_t at = group_at(to, panel, first);
        for (int64_t half = 0; half < kPanel; half += W) {
            const Scale scale = scale_of(to.kind, x + half, num_inputs);
            const vf inverse = inverse_of(scale.divisor);
            if (to.has_short_scales) {
                bf16* const scales = reinterpret_cast<bf16*>(to.scales) + at + half / W;
                for (int i = 0; i < W; ++i) scales[2 * i] = to_bf16(scale.value[i]);
            } else {
                store(to.scales + at + half, scale.value);
            }
            for (int64_t k = 0; k < num_inputs; k += inputs_per_word) {
                vi words{};
                for (int64_t j = 0; j < inputs_per_word; ++j) {
                    const vf code = rounded(load(x + (k + j) * kPanel + half), inverse, lowest, greatest) + zero;
                    words |= __builtin_convertvector(code, vi) << (int)(j % 4 * 8 + j / 4 * 4);
                }
                __builtin_memcpy(out + (k / inputs_per_word * kPanel + half) * 4, &words, sizeof words);
            }
        }
    }
}

// Codes [k, k + SIZE) of a row, zeros where it has none; `row` is null where there is none.
template <int SIZE>
void take_codes(uint8_t (&to)[SIZE], const uint8_t* row, int64_t k, int64_t num_inputs, uint8_t zero) {
    if (row && k + SIZE <= num_inputs) {
        __builtin_memcpy(to, row + k, SIZE);
    } else {
        for (int j = 0; j < SIZE; ++j) to[j] = row && k + j < num_inputs ? row[k + j] : zero;
    }
}

void copy_codes(const PackedWeight& to, const Rows& rows, int64_t panel) {
    const WeightSource& from = *rows.from;
    char* const out = panel_at(to, panel);
    const int64_t num_groups = to.num_groups();
    for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t row = rows.source_row[i];
        const uint8_t* const codes = row < 0 ? nullptr : rows.at<uint8_t>(i);
        const float* scales = rows.is_up[i] ? from.up_scales : from.scales;
        const uint8_t* zeros = rows.is_up[i] ? from.up_zeros : from.zeros;
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t first = group * to.group, end = min(first + to.group, to.padded_inputs);
            const int64_t at = row * num_groups + group, place = group_at(to, panel, first) + i;
            const uint8_t zero = codes && zeros ? zeros[at] : (uint8_t)zero_of(to.kind);
            to.scales[place] = codes ? scales[at] : 0.0f;
            if (to.zeros) to.zeros[place] = zero;
            if (to.kind == Weight::kInt8) {
                for (int64_t k = first; k < end; k += 4) {
                    uint8_t word[4];
                    take_codes(word, codes, k, to.num_inputs, zero);
                    __builtin_memcpy(out + (k / 4 * kPanel + i) * 4, word, sizeof word);
                }
            } else {
                for (int64_t k = first; k < end; k += 8) {
                    uint8_t bytes[8];
                    take_codes(bytes, codes, k, to.num_inputs, zero);
                    for (int j = 0; j < 4; ++j) bytes[j] |= bytes[j + 4] << 4;
                    __builtin_memcpy(out + (k / 8 * kPanel + i) * 4, bytes, 4);
                }
            }
        }
    }
}

// Chooses a panel's exponents, by some of each row's numbers, from all its length.
void begin_shortened(const PackedWeight& to, const Rows& rows, int64_t panel) {
    constexpr int64_t kOfEach = 256;
    // Neighbours are mostly alike, and what was just counted up takes a while until it can be counted up again.
    constexpr int kTallies = 4;
    int tallies[kTallies][kExponents] = {};
    for (int64_t i = 0; i < kPanel; ++i) {
        if (rows.source_row[i] < 0) continue;
        const bf16* const row = rows.at<bf16>(i);
        for (int64_t j = 0, at = 0; j < kOfEach; ++j, at += rows.num_inputs)
            ++tallies[j % kTallies][exponent_of(row[at / kOfEach])];
    }
    for (int tally = 1; tally < kTallies; ++tally)
        for (int i = 0; i < kExponents; ++i) tallies[0][i] += tallies[tally][i];
    begin_panel(to, panel, tallies[0]);
}

}  // namespace

int64_t panel_bytes_of(const PackedWeight& weight) { return panel_bytes(weight); }

bool pack_panel(const PackedWeight& to, const WeightSource& from, int64_t panel) {
    Rows rows{&from, to.num_inputs, {}, {}, {}};
    for (int64_t i = 0; i < kPanel; ++i) {
        int64_t row = to.gated ? panel * W + i % W : panel * kPanel + i;
        const bool is_there = row < to.num_outputs;
        rows.is_up[i] = to.gated && i >= W;
        const WeightPart* part = from.parts;
        if (!to.gated && is_there)
            for (; row >= part->num_rows; ++part) row -= part->num_rows;
        rows.source_row[i] = is_there ? row : -1;
        rows.matrix[i] = rows.is_up[i] ? from.up : part->rows;
    }
    if (to.has_codes()) {
        (from.kind == to.kind ? copy_codes : quantize_panel)(to, rows, panel);
        return true;
    }
    if (to.is_shortened) begin_shortened(to, rows, panel);
    constexpr int64_t kInputs = 256;
    for (int64_t first = 0; first < to.padded_inputs; first += kInputs) {
        const int64_t num_inputs = min(kInputs, to.padded_inputs - first);
        if (to.kind == Weight::kFloat32) {
            gather(rows, first, num_inputs, reinterpret_cast<float*>(panel_at(to, panel)) + first * kPanel);
            continue;
        }
        alignas(64) int32_t pairs[kInputs / 2 * kPanel];
        gather_pairs(rows, first, num_inputs, pairs);
        if (to.is_shortened) {
            if (!shorten(to, panel, pairs, first, num_inputs)) return false;
            continue;
        }
        for (int64_t i = 0; i < num_inputs; ++i) {
            const vi words = word_of_bf16(pairs + i / 2 * kPanel, (int)(i % 2));
            __builtin_memcpy(panel_at(to, panel) + (first + i) * W * 4, &words, sizeof words);
        }
    }
    return true;
}

}  // namespace penstock::PENSTOCK_ISA
