// What the products of codes with rounded activations share.
#pragma once

#include "panels.h"

namespace penstock::PENSTOCK_ISA {

typedef uint16_t vu __attribute__((vector_size(W * 4)));

// Bytes times bytes do not fit into the 16 bits that AVX2 and AVX-512 add them up in; 16 bits by 16 do into 32.
// Activations for 8-bit codes are kept in 16 bits there: inputs 0 and 2 of four, then 1 and 3, as a mask and a shift
// leave the codes.
#if (defined(PENSTOCK_AVX2) || defined(PENSTOCK_AVX512)) && !defined(PENSTOCK_VNNI)
#define PENSTOCK_PAIRS
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// A row of activations in `LinearCall::rounded`: codes; for each group what a sum of products starts from, which is minus
// the sum of them, times the zero if all outputs have one zero; of those in 16 bits the sum of neighbours' products, which is
// what `words.cpp` takes off; the scale.
struct RowLayout {
    int64_t code_bytes;
    int64_t sums_at;
    int64_t products_at;
    int64_t scale_at;
    int64_t bytes;

    explicit RowLayout(const PackedWeight& weight)
        : code_bytes(kPairs && weight.kind == Weight::kInt8 ? 2 : 1),
          sums_at(weight.padded_inputs * code_bytes),
          products_at(sums_at + weight.num_groups() * 4),
          scale_at(products_at + (code_bytes == 2 ? weight.num_groups() * 4 : 0)),
          bytes((scale_at + 4 + 63) / 64 * 64) {}
};

#if defined(PENSTOCK_PAIRS)
// Two vectors of sums for each row, beside four of codes, two of inputs and two of what is multiplied.
constexpr int kWordRows = (NUM_REGISTERS - 8) / 2;
// From here on, widening 8-bit codes once for all rows is cheaper than once for each tile of them.
constexpr int64_t kWordsFrom = 4 * kWordRows;

// So many rows, at least, by panels of 8-bit codes. `sums` has room for kPanelsAtOnce panels of kRows.
void many_rows_of_words(const LinearCall& call, int64_t first_row, int64_t num_rows, int64_t first_panel,
                        int64_t end_panel, const float* row_scales, float* sums);
#endif

}  // namespace penstock::PENSTOCK_ISA
