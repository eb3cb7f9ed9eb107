// Products by the processor's tiles: codes with activations rounded to 8 bits, and pairs of bfloat16s.
//
// Integers are exact, and end with each group, as they do in vectors: which rows go through tiles makes no difference to the bits.
// bfloat16s are added up 32 at a time, in an order of the processor's own, so all their products go through tiles, however few
// rows there are.
#include "../native/tiles.h"
#include "codes.h"
#include "finish.h"
#include "shortened.h"

#if defined(PENSTOCK_AMX)

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kRowStride = kPanel * 4;  // bytes of a row of sums
// Inputs of a panel at a time: 16 KiB, which stay in the first-level cache beside as many of a block of rows, while all rows pass.
constexpr int64_t kCodesAtOnce = 512;
constexpr int64_t kGroupsAtOnce = 4;
constexpr int64_t kPairsAtOnce = 256;
// Activations that stay in the second-level cache, of 2 MiB on processors with tiles.
constexpr int64_t kActivationBytes = 640 << 10;
// Few rows wait for memory, and the more often something is asked for the better.
constexpr int64_t kPairsAtOnceOfFewRows = 128;
constexpr int64_t kStepPairs = kTileBytes / 2;  // bfloat16s of a step
// Bytes of a shortened panel that are on their way from memory.
constexpr int64_t kAhead = 6144;

static_assert(kMostTileRows * kPanel <= kScratchFloats);

// How the rows of a product are cut into blocks: evenly, and each into two tiles.
struct Blocks {
    int64_t num_rows;
    int64_t each;
    int64_t step_bytes;
    int64_t shaped = 0;  // rows that tiles are shaped for

    Blocks(int64_t num_rows, int64_t step_bytes)
        : num_rows(num_rows), each(ceil_div(num_rows, ceil_div(num_rows, kBlockRows))), step_bytes(step_bytes) {}

    int64_t count() const { return ceil_div(num_rows, each); }

    // body(row, rows, rows of the first tile, whether there is a second one as a type).
    template <class F>
    void pass(F&& body) {
        for (int64_t row = 0; row < num_rows; row += each) {
            const int64_t rows = min(each, num_rows - row), first = rows <= kTileRows ? rows : (rows + 1) / 2;
            if (rows != shaped) shape_for_product(first, rows - first, step_bytes);
            shaped = rows;
            if (rows > first) {
                body(row, rows, first, Number<true>{});
            } else {
                body(row, rows, first, Number<false>{});
            }
        }
    }
};

// What comes from memory meanwhile: a part of a panel, some lines with each step and some with each row whose groups end.
struct Coming {
    const char* from;
    int64_t lines_a_step;
    int64_t lines_a_row = 0;

    void before_step() { fetch(lines_a_step); }
    void before_row() { fetch(lines_a_row); }

   private:
    void fetch(int64_t num_lines) {
        for (int64_t i = 0; i < num_lines; ++i, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// Codes of 4 bits less their zeros, of a panel's inputs from `first` to `end`, a byte each as codes of 8 are.
void widen(const PackedWeight& weight, int64_t panel, int64_t first, int64_t end, char* to) {
    typedef int8_t vb __attribute__((vector_size(W * 4)));
    const char* codes = panel_at(weight, panel) + first * kPanel / 2;
    for (int64_t k = first; k < end;) {
        vb zeros[2];
        for (int h = 0; h < 2; ++h) {
            const vi zero = weight.zeros ? zeros_at(weight.zeros + group_at(weight, panel, k) + h * W)
                                         : vi{} + zero_of(Weight::kInt4);
            zeros[h] = (vb)(zero * 0x01010101);
        }
        for (const int64_t group_end = min(k + weight.group, end); k < group_end; k += 8)
            for (int h = 0; h < 2; ++h, codes += kVectorBytes, to += kVectorBytes) {
                const vi words = load_bits(codes);
                const vb low = (vb)(words & 0x0f0f0f0f) - zeros[h], high = (vb)(words >> 4 & 0x0f0f0f0f) - zeros[h];
                __builtin_memcpy(to, &low, sizeof low);
                __builtin_memcpy(to + 2 * kVectorBytes, &high, sizeof high);
                if (h == 1) to += 2 * kVectorBytes;
            }
    }
}

// Adds groups' integers, with what zeros take off those of 8 bits, times their scales, to sums [rows, kPanel], and finishes
// those of the last groups.
template <Weight KIND>
struct EndGroups {
    const LinearCall& call;
    const RowLayout& layout;
    const float* row_scales;
    float* all_sums;
    const int32_t* products;  // [rows, groups, kPanel]
    const float* scales;      // [groups, kPanel]
    int64_t panel;
    int64_t first_group;
    int64_t end_group;
    int64_t first_row;

    // The block's rows, counted from `first_row`.
    void operator()(int64_t row, int64_t num_rows, Coming& coming) const {
        const PackedWeight& weight = *call.weight;
        const int64_t row_bytes = layout.bytes, num_groups = end_group - first_group;
        const bool is_first = first_group == 0, is_last = end_group == weight.num_groups();
        const uint8_t* const zeros =
            weight.zeros ? weight.zeros + (panel * weight.num_groups() + first_group) * kPanel : nullptr;
        const uint8_t* starts = call.rounded + (first_row + row) * row_bytes + layout.sums_at + first_group * 4;
        float* sums = all_sums + row * kPanel;
        const auto each_row = [&](auto&& end) {
            for (int64_t r = 0; r < num_rows; ++r, starts += row_bytes, sums += kPanel) {
                coming.before_row();
                vf halves[2] = {};
                if (!is_first)
                    for (int h = 0; h < 2; ++h) halves[h] = load(sums + h * W);
                for (int64_t g = 0; g < num_groups; ++g)
                    for (int h = 0; h < 2; ++h) {
                        vi sum = load_bits(products + (r * num_groups + g) * kPanel + h * W);
                        if (KIND == Weight::kInt8) {
                            const vi start = word_at(starts + g * 4);
                            sum += zeros ? zeros_at(zeros + g * kPanel + h * W) * start : start;
                        }
                        const vf product = __builtin_convertvector(sum, vf);
                        halves[h] = fma(product, load(scales + g * kPanel + h * W), halves[h]);
                    }
                end(halves, r);
            }
        };
        if (!is_last)
            return each_row([&](const vf(&halves)[2], int64_t) {
                for (int h = 0; h < 2; ++h) store(sums + h * W, halves[h]);
            });
        const Finish finish_row(call, panel);
        each_row([&](vf(&halves)[2], int64_t r) {
            for (vf& half : halves) half *= splat(row_scales[row + r]);
            finish_row(halves, first_row + row + r);
        });
    }
};

// Inputs of a panel that all rows pass at once: whole groups. One block needs them no more than once.
int64_t inputs_at_once(const PackedWeight& weight, int64_t num_blocks) {
    const bool any = num_blocks == 1 && weight.kind == Weight::kInt8;
    return (any ? kGroupsAtOnce : min(kCodesAtOnce / weight.group, kGroupsAtOnce)) * weight.group;
}

template <Weight KIND>
void codes_by_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
                   float* sums) {
    const PackedWeight& weight = *call.weight;
    const RowLayout layout(weight);
    constexpr int64_t kInputsPerByte = KIND == Weight::kInt8 ? 1 : 2;
    constexpr Columns kColumns = KIND == Weight::kInt8 ? Columns::kUnsigned : Columns::kSigned;
    const int64_t K = weight.padded_inputs, group = weight.group;
    const int64_t step = group % kTileBytes == 0 && K % kTileBytes == 0 ? kTileBytes : kCodeInputs;
    Blocks blocks(num_rows, step);
    const int64_t part = inputs_at_once(weight, blocks.count());
    const char* const x = reinterpret_cast<const char*>(call.rounded) + first_row * layout.bytes;
    float row_scales[kMostTileRows];
    for (int64_t r = 0; r < num_rows; ++r) __builtin_memcpy(row_scales + r, x + r * layout.bytes + layout.scale_at, 4);
    alignas(64) char widened[KIND == Weight::kInt8 ? 1 : kCodesAtOnce * kPanel];
    alignas(64) float scales[kGroupsAtOnce * kPanel];
    // Groups side by side, so that what was just stored of one has no address in common with what is loaded of another in its
    // lower 12 bits, by which processors find out whether to wait.
    alignas(64) int32_t products[kBlockRows * kGroupsAtOnce * kPanel];
    EndGroups<KIND> end_groups{call, layout, row_scales, sums, products, nullptr, 0, 0, 0, first_row};
    for (int64_t p = first_panel; p < end_panel; ++p)
        for (int64_t k = 0; k < K; k += part) {
            const int64_t end = min(k + part, K), first_group = k / group, end_group = ceil_div(end, group);
            const char* codes = panel_at(weight, p) + k * kPanel / kInputsPerByte;
            Coming coming{panel_at(weight, p) + (k + part) * kPanel / kInputsPerByte,
                          ceil_div(step * kPanel / kInputsPerByte / 64, blocks.count())};
            if (blocks.count() == 1) {
                // A row takes about as long as a 48th of the part.
                const int64_t num_lines = (end - k) * kPanel / kInputsPerByte / 64;
                coming.lines_a_row = num_lines / 48;
                coming.lines_a_step = ceil_div(num_lines - coming.lines_a_row * num_rows, (end - k) / step);
            }
            if constexpr (KIND == Weight::kInt4) {
                widen(weight, p, k, end, widened);
                codes = widened;
            }
            end_groups.scales = weight.scales + group_at(weight, p, k);
            if (weight.has_short_scales) {
                for (int64_t g = 0; g < end_group - first_group; ++g) {
                    vf both[2];
                    scales_at<KIND>(weight, group_at(weight, p, k + g * group), both);
                    for (int h = 0; h < 2; ++h) store(scales + g * kPanel + h * W, both[h]);
                }
                end_groups.scales = scales;
            }
            end_groups.panel = p;
            end_groups.first_group = first_group;
            end_groups.end_group = end_group;
            blocks.pass([&](int64_t row, int64_t rows, int64_t first, auto two) {
                for (int64_t g = k; g < end; g += group) {
                    zero_sums<two.value, true>();
                    multiply_tiles<kColumns, two.value, true>(
                        {x + row * layout.bytes + g, layout.bytes, first * layout.bytes, step},
                        {codes + (g - k) * kPanel, 2 * kVectorBytes, kVectorBytes, step * kPanel},
                        (min(g + group, end) - g) / step, coming);
                    const int64_t stride = (end_group - first_group) * kRowStride;
                    store_sums<two.value, true>(products + (g - k) / group * kPanel, stride, first * stride);
                }
                end_groups(row, rows, coming);
            });
        }
    release_tiles();
}

// Inputs [first, first + num_inputs) of a panel in pairs, with zeros behind them up to a whole step.
void gather_pairs(const PackedWeight& weight, int64_t panel, int64_t first, int64_t num_inputs, char* to) {
    constexpr int64_t kInputBytes = kPanel * 2;
    if (weight.is_shortened) {
        const vbytes upper = repeated(outliers_of(weight, panel).upper);
        const char* four = panel_at(weight, panel) + first / 4 * kFourBytes;
        for (int64_t k = 0; k < num_inputs; k += 4, four += kFourBytes) {
            for (int64_t line = 0; line < kFourBytes; line += 64) __builtin_prefetch(four + kAhead + line, 0, 2);
            for (int which = 0; which < 2; ++which) {
                vi words[2];
                lengthen(four, which, upper, words);
                __builtin_memcpy(to + (k + which * 2) * kInputBytes, words, sizeof words);
            }
        }
    } else {
        __builtin_memcpy(to, panel_at(weight, panel) + first * kInputBytes, num_inputs * kInputBytes);
    }
    const int64_t whole = ceil_div(num_inputs, kStepPairs) * kStepPairs;
    __builtin_memset(to + num_inputs * kInputBytes, 0, (whole - num_inputs) * kInputBytes);
}

void pairs_by_rows(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel, int64_t end_panel,
                   float* sums) {
    const PackedWeight& weight = *call.weight;
    const int64_t K = weight.padded_inputs, row_bytes = rounded_row_bytes(weight), bytes = panel_bytes(weight);
    const char* const x = reinterpret_cast<const char*>(call.rounded) + first_row * row_bytes;
    const bool are_kept = !weight.is_shortened && K % kStepPairs == 0;  // as tiles take them
    Blocks blocks(num_rows, kTileBytes);
    const bool few = blocks.count() == 1;
    const int64_t part = !few ? kPairsAtOnce : are_kept ? K : kPairsAtOnceOfFewRows;
    alignas(64) char gathered[kPairsAtOnce * kPanel * 2];
    for (int64_t p = first_panel; p < end_panel; ++p)
        for (int64_t k = 0; k < K; k += part) {
            const int64_t num_inputs = min(part, K - k), num_steps = ceil_div(num_inputs, kStepPairs);
            const char* weights = panel_at(weight, p) + k * kPanel * 2;
            Coming coming = few ? Coming{weights + 4096, are_kept ? kStepPairs * kPanel * 2 / 64 : 0}
                                : Coming{panel_at(weight, p) + bytes * (k + part) / K,
                                         ceil_div(bytes / K * kStepPairs / 64, blocks.count())};
            if (!are_kept) {
                gather_pairs(weight, p, k, num_inputs, gathered);
                weights = gathered;
            }
            blocks.pass([&](int64_t row, int64_t rows, int64_t first, auto two) {
                float* const to = sums + row * kPanel;
                k == 0 ? zero_sums<two.value, true>() : load_sums<two.value, true>(to, kRowStride, first * kRowStride);
                multiply_tiles<Columns::kBFloat16, two.value, true>(
                    {x + row * row_bytes + k * 2, row_bytes, first * row_bytes, kTileBytes},
                    {weights, 2 * kVectorBytes, kVectorBytes, kTileBytes * kPanel}, num_steps, coming);
                store_sums<two.value, true>(to, kRowStride, first * kRowStride);
                if (k + part < K) return;
                complete(call, p, first_row + row, rows, to);
                finish(call, p, first_row + row, rows, to, nullptr);
            });
        }
    release_tiles();
}

}  // namespace

int64_t most_tile_rows(const PackedWeight& weight) {
    const int64_t fitting = kActivationBytes / rounded_row_bytes(weight) / kBlockRows * kBlockRows;
    return fitting < kRows ? kRows : min(fitting, kMostTileRows);
}

void linear_through_tiles(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel,
                          int64_t end_panel, float* scratch) {
    const auto by_rows = !call.weight->has_codes()             ? pairs_by_rows
                         : call.weight->kind == Weight::kInt8 ? codes_by_rows<Weight::kInt8>
                                                              : codes_by_rows<Weight::kInt4>;
    by_rows(call, first_row, end_row - first_row, first_panel, end_panel, scratch);
}

}  // namespace penstock::PENSTOCK_ISA

#endif
