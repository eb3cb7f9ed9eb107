// A processor's eight tiles (Intel AMX): registers of up to 16 rows of 64 bytes, and products of two of them.
//
// A product adds to a tile of sums [rows, 16], of 32 bits, the product of a tile [rows, row bytes] by one of words
// [row bytes / 4, 16], in which the second tile's rows are the first one's columns, four bytes or two bfloat16s at a time. That is
// the layout in which panels of codes and of pairs lie anyway.
//
// Each thread shapes its tiles before it uses them, and releases them afterwards: what they hold is saved whenever the system
// takes the thread off its core.
#pragma once

#include "simd.h"

#if defined(PENSTOCK_AMX)

namespace penstock::PENSTOCK_ISA {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row

// As the processor takes them: Intel's Software Developer's Manual, LDTILECFG.
struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t first_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#if defined(__AMX_TILE__)

inline void set_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// Rows `stride` bytes apart.
template <int TILE>
inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

// Signed bytes by unsigned ones, or by signed ones, exactly.
template <int SUMS, int A, int B>
inline void tile_dot_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}
template <int SUMS, int A, int B>
inline void tile_dot_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}

// bfloat16s, which must not be subnormal: products with even and with odd numbers are added up each in a chain, and both then
// to the sum.
template <int SUMS, int A, int B>
inline void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}

#else  // what stands in gives the same bits

struct Tiles {
    TileShapes shapes;
    alignas(64) uint8_t bytes[8][kTileRows][kTileBytes];
};
inline thread_local Tiles tiles;

inline void set_shapes(const TileShapes& shapes) {
    tiles.shapes = shapes;
    __builtin_memset(tiles.bytes, 0, sizeof tiles.bytes);
}
inline void release_tiles() { tiles.shapes.palette = 0; }

template <int TILE>
inline void tile_zero() {
    __builtin_memset(tiles.bytes[TILE], 0, sizeof tiles.bytes[TILE]);
}

template <int TILE>
inline void tile_load(const void* from, int64_t stride) {
    tile_zero<TILE>();
    for (int64_t row = 0; row < tiles.shapes.rows[TILE]; ++row)
        __builtin_memcpy(tiles.bytes[TILE][row], static_cast<const char*>(from) + row * stride, tiles.shapes.row_bytes[TILE]);
}

template <int TILE>
inline void tile_store(void* to, int64_t stride) {
    for (int64_t row = 0; row < tiles.shapes.rows[TILE]; ++row)
        __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles.bytes[TILE][row], tiles.shapes.row_bytes[TILE]);
}

template <int SUMS, int A, int B, class Byte>
inline void tile_dot_bytes() {
    for (int64_t row = 0; row < tiles.shapes.rows[SUMS]; ++row)
        for (int64_t n = 0; n < tiles.shapes.row_bytes[SUMS] / 4; ++n) {
            int32_t sum;
            __builtin_memcpy(&sum, tiles.bytes[SUMS][row] + n * 4, 4);
            for (int64_t k = 0; k < tiles.shapes.row_bytes[A]; ++k)
                sum += (int8_t)tiles.bytes[A][row][k] * (Byte)tiles.bytes[B][k / 4][n * 4 + k % 4];
            __builtin_memcpy(tiles.bytes[SUMS][row] + n * 4, &sum, 4);
        }
}

template <int SUMS, int A, int B>
inline void tile_dot_unsigned() {
    tile_dot_bytes<SUMS, A, B, uint8_t>();
}
template <int SUMS, int A, int B>
inline void tile_dot_signed() {
    tile_dot_bytes<SUMS, A, B, int8_t>();
}

template <int SUMS, int A, int B>
inline void tile_dot_bf16() {
    const auto at = [](const uint8_t* from) {
        bf16 x;
        __builtin_memcpy(&x, from, sizeof x);
        return to_float(x);
    };
    for (int64_t row = 0; row < tiles.shapes.rows[SUMS]; ++row)
        for (int64_t n = 0; n < tiles.shapes.row_bytes[SUMS] / 4; ++n) {
            float sum, chains[2] = {};
            __builtin_memcpy(&sum, tiles.bytes[SUMS][row] + n * 4, 4);
            for (int64_t k = 0; k < tiles.shapes.row_bytes[A] / 2; ++k)
                chains[k % 2] = __builtin_fmaf(at(tiles.bytes[A][row] + k * 2),
                                               at(tiles.bytes[B][k / 2] + n * 4 + k % 2 * 2), chains[k % 2]);
            sum += chains[0] + chains[1];
            __builtin_memcpy(tiles.bytes[SUMS][row] + n * 4, &sum, 4);
        }
}

#endif

// A product of up to 32 rows by 32 columns: tiles 0 to 3 have the sums, of the first rows by both halves of the columns and then of
// the others, 4 and 5 the rows, 6 and 7 the columns.
constexpr int kRowTile = 4;
constexpr int kColumnTile = 6;

// `first` rows and `second` others, which may be none, of which each step takes `step_bytes`.
inline void shape_for_product(int64_t first, int64_t second, int64_t step_bytes) {
    TileShapes shapes;
    for (int i = 0; i < 2; ++i) {
        const uint8_t rows = (uint8_t)(i == 0 || second == 0 ? first : second);
        for (int tile = 2 * i; tile < 2 * i + 2; ++tile) {
            shapes.rows[tile] = rows;
            shapes.row_bytes[tile] = kTileBytes;
        }
        shapes.rows[kRowTile + i] = rows;
        shapes.row_bytes[kRowTile + i] = (uint16_t)step_bytes;
        shapes.rows[kColumnTile + i] = (uint8_t)(step_bytes / 4);
        shapes.row_bytes[kColumnTile + i] = kTileBytes;
    }
    set_shapes(shapes);
}

// Where a product's tiles lie, in bytes.
struct TileSource {
    const char* from;
    int64_t stride;  // from a tile's row to the next
    int64_t second;  // from the first tile to the one beside it
    int64_t step;    // from a step to the next
};

struct NothingAside {
    static void before_step() {}
};

template <int N>
struct Number {
    static constexpr int value = N;
};

// What columns are; rows of codes are signed bytes.
enum class Columns { kUnsigned, kSigned, kBFloat16 };

template <Columns OF, int SUMS, int A, int B>
inline void tile_dot() {
    if constexpr (OF == Columns::kUnsigned) {
        tile_dot_unsigned<SUMS, A, B>();
    } else if constexpr (OF == Columns::kSigned) {
        tile_dot_signed<SUMS, A, B>();
    } else {
        tile_dot_bf16<SUMS, A, B>();
    }
}

// Sums += rows * columns over `num_steps` steps. Rows are one tile or two, and so are columns. `aside.before_step()` may fetch what
// comes next.
template <Columns OF, bool TWO_ROWS, bool TWO_COLUMNS, class Aside>
inline __attribute__((always_inline)) void multiply_tiles(TileSource rows, TileSource columns, int64_t num_steps, Aside& aside) {
    for (int64_t i = 0; i < num_steps; ++i, rows.from += rows.step, columns.from += columns.step) {
        aside.before_step();
        tile_load<kRowTile>(rows.from, rows.stride);
        tile_load<kColumnTile>(columns.from, columns.stride);
        if constexpr (TWO_COLUMNS) tile_load<kColumnTile + 1>(columns.from + columns.second, columns.stride);
        if constexpr (TWO_ROWS) tile_load<kRowTile + 1>(rows.from + rows.second, rows.stride);
        tile_dot<OF, 0, kRowTile, kColumnTile>();
        if constexpr (TWO_COLUMNS) tile_dot<OF, 1, kRowTile, kColumnTile + 1>();
        if constexpr (TWO_ROWS) tile_dot<OF, 2, kRowTile + 1, kColumnTile>();
        if constexpr (TWO_ROWS && TWO_COLUMNS) tile_dot<OF, 3, kRowTile + 1, kColumnTile + 1>();
    }
}

template <bool TWO_ROWS, bool TWO_COLUMNS>
inline __attribute__((always_inline)) void zero_sums() {
    tile_zero<0>();
    if constexpr (TWO_COLUMNS) tile_zero<1>();
    if constexpr (TWO_ROWS) tile_zero<2>();
    if constexpr (TWO_ROWS && TWO_COLUMNS) tile_zero<3>();
}

// Sums as they lie in rows `stride` bytes apart, of which the second tile's begin `second` bytes behind the first one's.
template <bool TWO_ROWS, bool TWO_COLUMNS>
inline __attribute__((always_inline)) void load_sums(const void* sums, int64_t stride, int64_t second) {
    const char* const from = static_cast<const char*>(sums);
    tile_load<0>(from, stride);
    if constexpr (TWO_COLUMNS) tile_load<1>(from + kTileBytes, stride);
    if constexpr (TWO_ROWS) tile_load<2>(from + second, stride);
    if constexpr (TWO_ROWS && TWO_COLUMNS) tile_load<3>(from + second + kTileBytes, stride);
}

template <bool TWO_ROWS, bool TWO_COLUMNS>
inline __attribute__((always_inline)) void store_sums(void* sums, int64_t stride, int64_t second) {
    char* const to = static_cast<char*>(sums);
    tile_store<0>(to, stride);
    if constexpr (TWO_COLUMNS) tile_store<1>(to + kTileBytes, stride);
    if constexpr (TWO_ROWS) tile_store<2>(to + second, stride);
    if constexpr (TWO_ROWS && TWO_COLUMNS) tile_store<3>(to + second + kTileBytes, stride);
}

}  // namespace penstock::PENSTOCK_ISA

#endif
