// Attention over a paged cache, read where it lies.
//
// The rows of a tile are query tokens of one sequence by the query heads that share a KV head. The context is taken in
// spans of kSpan tokens: scores, their maximum, weights, then the weighted values; spans are put together by their maxima
// and sums (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Spans begin at fixed positions,
// and every score and every weighted sum is one chain in a fixed order. So a token's result depends neither on what it
// is computed beside nor on how its prompt was cut into steps.
#include "../native/kernels.h"
#include "../native/simd.h"
#include "../native/tiles.h"

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr int64_t kTile = 16;  // keys side by side in a block
constexpr int kVectors = kTile / W;
constexpr int64_t kChunk = 64;  // tokens on their way from memory while those before them are computed
// Computed together: of six rows, two vectors of sums each fit in 16 registers; of eight, one each of two tiles in 32.
constexpr int kMaxRows = NUM_REGISTERS == 32 ? 8 : 6;
constexpr float kLowest = -3.402823466e38f;

static_assert(kSpan % kChunk == 0 && kChunk % kTile == 0);

// A span's keys and values, wherever their blocks are, and those of the chunk behind it, which are fetched ahead.
template <class T>
struct Span {
    // Each [D, 16], rows key_stride apart; those from first_tile on to end_tile hold tokens that are seen.
    const T* keys[(kSpan + kChunk) / kTile];
    int64_t first_tile;
    int64_t end_tile;
    int64_t key_stride;
    const T* values[kSpan + kChunk];  // each [D]; set for tokens that are seen
    // What codes stand for one of, for the same tokens; unused in other caches. A key's scale goes into its score and a
    // value's into its weight, so that the sums are of codes.
    float key_scales[kSpan] = {};
    float value_scales[kSpan] = {};

    // Whatever has not been found yet points somewhere, so that it can be prefetched.
    explicit Span(const CacheView& cache) {
        for (const T*& tile : keys) tile = static_cast<const T*>(cache.k);
        for (const T*& value : values) value = static_cast<const T*>(cache.v);
    }
};

#if defined(PENSTOCK_AMX)
constexpr bool kTiles = true;
constexpr int64_t kBand = 2 * kTileRows;
constexpr int64_t kPairStep = 32;  // what tiles of bfloat16s take at a time, of a head's elements and of tokens
#else
constexpr bool kTiles = false;
constexpr int64_t kBand = 24;  // rows whose scores of a span stay in the first-level cache
constexpr int64_t kPairStep = kTile;
#endif

// Elements of a query and a key in pairs; those behind a head's are zeros.
constexpr int64_t width_of_pairs(int64_t D) { return ceil_div(D, kPairStep) * kPairStep; }

struct Scratch {
    float* scores;    // [kBand, kSpan], then weights in their place
    float* part;      // [kBand, D] a span's weighted sums
    float* whole;     // [rows, D]
    float* gathered;  // [kSpan / kTile, D, kTile] keys of blocks that do not hold whole tiles
    float* pairs;     // [rows, width_of_pairs(D) / 2] queries
    float* packed_k;  // [kSpan / kTile, width_of_pairs(D) / 2, kTile] pairs of keys' elements
    float* packed_v;  // [kSpan / 2, D] pairs of values
    float* nothing;   // [D / 2] zeros: a value beside one that is seen
    float part_high[kBand];  // a span's highest score
    float part_sum[kBand];   // and its sum of weights
    float whole_high[kMaxTileRows];
    float whole_sum[kMaxTileRows];

    static int64_t size(int64_t D) {
        return kBand * (kSpan + D) + kMaxTileRows * D + kSpan * D + (kMaxTileRows + kSpan) * width_of_pairs(D) / 2 +
               kSpan * D / 2 + D / 2;
    }

    Scratch(float* from, int64_t D) {
        const auto take = [&from](int64_t n) {
            float* taken = from;
            from += n;
            return taken;
        };
        scores = take(kBand * kSpan);
        part = take(kBand * D);
        whole = take(kMaxTileRows * D);
        gathered = take(kSpan * D);
        packed_k = take(kSpan * width_of_pairs(D) / 2);
        packed_v = take(kSpan * D / 2);
        pairs = take(kMaxTileRows * width_of_pairs(D) / 2);
        nothing = take(D / 2);
    }
};

// Tokens [first, end) of the span that begins at position `begin` are set up; scores of others are computed from whatever
// lies there and have to be masked. Those up to `ahead` are only found.
template <class T>
void find_span(const AttentionCall& call, int64_t begin, int64_t first, int64_t end, int64_t ahead, Span<T>& span,
               T* gathered) {
    const CacheView& cache = *call.cache;
    const int64_t G = cache.num_kv_heads, D = cache.head_dim, P = cache.block_size, g = call.task->kv_head;
    const T* const k = static_cast<const T*>(cache.k);
    const T* const v = static_cast<const T*>(cache.v);
    const auto block_of = [&](int64_t position) -> int64_t { return call.table[(position - call.table_start) / P]; };
    const bool whole_tiles = P % kTile == 0;
    span.key_stride = whole_tiles ? P : kTile;
    span.first_tile = (first - begin) / kTile;
    span.end_tile = ceil_div(end - begin, kTile);
    if (whole_tiles) {
        // Blocks are aligned to positions, so a tile lies in one of them.
        for (int64_t i = span.first_tile; begin + i * kTile < ahead; ++i) {
            const int64_t tile = begin + i * kTile;
            span.keys[i] = k + (block_of(tile) * G + g) * D * P + tile % P;
        }
    } else {
        for (int64_t i = span.first_tile; i < span.end_tile; ++i) {
            span.keys[i] = gathered + i * D * kTile;
            for (int64_t j = 0; j < kTile; ++j)
                if (begin + i * kTile + j < first || begin + i * kTile + j >= end)
                    for (int64_t d = 0; d < D; ++d) gathered[(i * D + d) * kTile + j] = T{};
        }
    }
    // A block's tokens at a time.
    for (int64_t position = first; position < ahead;) {
        const int64_t offset = position % P, num_tokens = min(P - offset, (position < end ? end : ahead) - position);
        const int64_t head = block_of(position) * G + g, place = head * P + offset, at = position - begin;
        for (int64_t j = 0; j < num_tokens; ++j) span.values[at + j] = v + (place + j) * D;
        position += num_tokens;
        if (position > end) continue;
        if constexpr (__is_same(T, int8_t)) {
            __builtin_memcpy(span.key_scales + at, cache.k_scales + place, num_tokens * sizeof(float));
            __builtin_memcpy(span.value_scales + at, cache.v_scales + place, num_tokens * sizeof(float));
        }
        if (!whole_tiles) {
            const T* const from = k + head * D * P + offset;
            for (int64_t j = at; j < at + num_tokens; ++j)
                for (int64_t d = 0; d < D; ++d)
                    gathered[(j / kTile * D + d) * kTile + j % kTile] = from[d * P + j - at];
        }
    }
}

// How queries meet keys and weights meet values: an element of each at a time.
//
// While keys are multiplied, those at the same place of the next chunk are on their way from memory: blocks lie in no
// order, and no processor guesses which comes next. Values likewise.
template <class T>
struct Singles {
    static constexpr int64_t kEach = 1;
    static constexpr int64_t kPiece = kChunk;  // tokens that all rows of a band take before the next
    const Span<T>& span;

    static vf spread(const float* x) { return splat(*x); }
    static vf add(vf sums, vf x, vf y) { return fma(x, y, sums); }
    vf key(int64_t tile, int64_t d, int i) const { return load(span.keys[tile] + d * span.key_stride + i * W); }
    vf value(int64_t j, int64_t d) const { return load(span.values[j] + d); }
    void fetch_key(int64_t tile, int64_t d) const {
        __builtin_prefetch(span.keys[tile + kChunk / kTile] + d * span.key_stride);
    }
    template <int N>
    void fetch_value(int64_t j, int64_t d) const {
#pragma GCC unroll 8
        for (int i = 0; i < N; i += 64 / sizeof(T) / W) __builtin_prefetch(span.values[j + kChunk] + d + i * W);
    }
};

// All values of a span, to the second-level cache, which waits for more lines at a time than the first does: from there
// the next are fetched in time.
template <class T>
void fetch_all_values(const Span<T>& span, int64_t first, int64_t end, int64_t D) {
    for (int64_t j = first; j < end; ++j)
        for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(span.values[j] + d, 0, 2);
}

// Softmax waits for no memory, so the first values are fetched meanwhile: some of them with each row.
template <class T>
void fetch_first_values(const Span<T>& span, int64_t first, int64_t end, int64_t row, int64_t D) {
    constexpr int64_t kEach = 8;
    for (int64_t j = first + row * kEach; j < min(first + (row + 1) * kEach, end); ++j)
        for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(span.values[j] + d);
}

// Two: neighbouring elements of a key, or one element of the values of neighbouring tokens.
struct Pairs {
    static constexpr int64_t kEach = 2;
    static constexpr int64_t kPiece = kChunk;
    const Span<bf16>& span;

    static vf spread(const float* x) { return as_floats(word_at(x)); }
    static vf add(vf sums, vf x, vf y) { return dot2_bf16(sums, (vi)x, (vi)y); }
    vf key(int64_t tile, int64_t d, int) const {
        const bf16* const first = span.keys[tile] + 2 * d * span.key_stride;
        return as_floats(load_pairs(first, first + span.key_stride));
    }
    vf value(int64_t j, int64_t d) const {
        return as_floats(load_pairs(span.values[2 * j] + d, span.values[2 * j + 1] + d));
    }
    void fetch_key(int64_t tile, int64_t d) const {
        const bf16* const first = span.keys[tile + kChunk / kTile] + 2 * d * span.key_stride;
        __builtin_prefetch(first);
        __builtin_prefetch(first + span.key_stride);
    }
    template <int N>
    void fetch_value(int64_t j, int64_t d) const {
        Singles<bf16>{span}.fetch_value<N>(2 * j, d);
        Singles<bf16>{span}.fetch_value<N>(2 * j + 1, d);
    }
};

// Such pairs put together once for many rows.
struct PackedPairs : Pairs {
    static constexpr int64_t kPiece = kSpan;
    const float* keys;    // [kSpan / kTile, D / 2, kTile]
    const float* values;  // [kSpan / 2, D]
    int64_t D;

    PackedPairs(const Span<bf16>& from, int64_t first, int64_t end, int64_t D, float* k, float* v)
        : Pairs{from}, keys(k), values(v), D(D) {
        const int64_t width = width_of_pairs(D);
        for (int64_t tile = span.first_tile; tile < span.end_tile; ++tile) {
            float* const to = k + tile * width / 2 * kTile;
            for (int64_t d = 0; d < D / 2; ++d) {
                Pairs::fetch_key(tile, d);
                store(to + d * kTile, Pairs::key(tile, d, 0));
            }
            __builtin_memset(to + D / 2 * kTile, 0, (width - D) / 2 * kTile * sizeof(float));
        }
        // Tiles take steps of tokens, of which some may not be seen.
        constexpr int64_t kEachStep = kTiles ? kPairStep / 2 : 1;
        const int64_t first_pair = first / 2, end_pair = (end + 1) / 2, first_step = first_pair / kEachStep * kEachStep;
        __builtin_memset(v + first_step * D, 0, (first_pair - first_step) * D * sizeof(float));
        for (int64_t j = first_pair; j < end_pair; ++j)
            for (int64_t d = 0; d < D; d += W) {
                Pairs::fetch_value<1>(j, d);
                store(v + j * D + d, Pairs::value(j, d));
            }
        const int64_t end_step = ceil_div(end_pair, kEachStep) * kEachStep;
        __builtin_memset(v + end_pair * D, 0, (end_step - end_pair) * D * sizeof(float));
    }
    vf key(int64_t tile, int64_t d, int) const { return load(keys + (tile * D / 2 + d) * kTile); }
    vf value(int64_t j, int64_t d) const { return load(values + j * D + d); }
    void fetch_key(int64_t, int64_t) const {}
    template <int N>
    void fetch_value(int64_t, int64_t) const {}
};

template <int ROWS, int TILES, class Source>
void score_tile(const Source& source, const float* const* q, int64_t tile, int64_t D, float scale, float* scores) {
    vf acc[ROWS][TILES][kVectors] = {};
#pragma GCC unroll 4
    for (int64_t d = 0; d < D / Source::kEach; ++d) {
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) {
            source.fetch_key(tile + t, d);
            vf key[kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) key[i] = source.key(tile + t, d, i);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const vf query = Source::spread(q[r] + d);
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) acc[r][t][i] = Source::add(acc[r][t][i], query, key[i]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i)
                store(scores + r * kSpan + (tile + t) * kTile + i * W, acc[r][t][i] * splat(scale));
}

#if defined(PENSTOCK_AMX)

// Rows that are not there may be anything.
template <bool TWO_ROWS, bool TWO_COLUMNS>
void product(TileSource rows, TileSource columns, int64_t num_steps, float* to, int64_t to_stride) {
    NothingAside aside;
    zero_sums<TWO_ROWS, TWO_COLUMNS>();
    multiply_tiles<Columns::kBFloat16, TWO_ROWS, TWO_COLUMNS>(rows, columns, num_steps, aside);
    store_sums<TWO_ROWS, TWO_COLUMNS>(to, to_stride * 4, kTileRows * to_stride * 4);
}

// `to` [rows, num_columns tiles of 16] becomes the product. Columns lie columns.second apart.
template <bool TWO_ROWS>
void all_columns(TileSource rows, TileSource columns, int64_t num_columns, int64_t num_steps, float* to, int64_t to_stride) {
    for (; num_columns > 1; num_columns -= 2, columns.from += 2 * columns.second, to += 2 * W)
        product<TWO_ROWS, true>(rows, columns, num_steps, to, to_stride);
    if (num_columns) product<TWO_ROWS, false>(rows, columns, num_steps, to, to_stride);
}

#endif

// The greatest of 1, 2, 4, 8 that times `each` sums fit in registers beside what is multiplied.
constexpr int as_many(int each, int most) {
    int n = 1;
    while (n < most && 2 * n * each <= NUM_REGISTERS - 4) n *= 2;
    return n;
}

// Not inlined, because compilers take minutes over one function that holds every shape of tile.
template <int ROWS, class Source>
[[gnu::noinline]] void score_rows(const Source& source, const float* const* q, int64_t tile, int64_t end_tile, int64_t D,
                                  float scale, float* scores) {
    constexpr int TILES = as_many(ROWS * kVectors, kChunk / kTile);
    for (; tile + TILES <= end_tile; tile += TILES) score_tile<ROWS, TILES>(source, q, tile, D, scale, scores);
    for (; tile < end_tile; ++tile) score_tile<ROWS, 1>(source, q, tile, D, scale, scores);
}

// sums[row] += weights[row] * values from the `first` to the `end` that are added together, for as many columns from `d`
// on as fit N vectors at a time; returns the column after them.
template <int ROWS, int N, class Source>
int64_t weigh_columns(const Source& source, const float* weights, int64_t first, int64_t end, int64_t D, float* sums,
                      int64_t d) {
    for (; d + N * W <= D; d += N * W) {
        vf acc[ROWS][N];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) acc[r][i] = load(sums + r * D + d + i * W);
#pragma GCC unroll 4
        for (int64_t j = first; j < end; ++j) {
            source.template fetch_value<N>(j, d);
            vf value[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) value[i] = source.value(j, d + i * W);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const vf weight = Source::spread(weights + r * kSpan + j);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) acc[r][i] = Source::add(acc[r][i], weight, value[i]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) store(sums + r * D + d + i * W, acc[r][i]);
    }
    return d;
}

template <int ROWS, int N, class Source>
int64_t weigh_from(const Source& source, const float* weights, int64_t first, int64_t end, int64_t D, float* sums,
                   int64_t d) {
    d = weigh_columns<ROWS, N>(source, weights, first, end, D, sums, d);
    if constexpr (N > 1) d = weigh_from<ROWS, N / 2>(source, weights, first, end, D, sums, d);
    return d;
}

template <int ROWS, class Source>
[[gnu::noinline]] void weigh(const Source& source, const float* weights, int64_t first, int64_t end, int64_t D,
                             float* sums) {
    int64_t d = weigh_from<ROWS, as_many(ROWS, 8)>(source, weights, first, end, D, sums, 0);
    if constexpr (Source::kEach == 1)
        for (; d < D; ++d)
            for (int r = 0; r < ROWS; ++r)
                for (int64_t j = first; j < end; ++j)
                    sums[r * D + d] += weights[r * kSpan + j] * to_float(source.span.values[j][d]);
}

template <int N>
struct Count {
    static constexpr int value = N;
};

template <int ROWS, class F>
void of_rows(int64_t rows, F&& body) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS)
            body(Count<ROWS>{});
        else
            of_rows<ROWS - 1>(rows, body);
    }
}

// body(row, number of rows as a type) for parts of `num_rows` rows that are computed together, about equal in size.
template <class F>
void by_rows(int64_t num_rows, F&& body) {
    for (int64_t row = 0; row < num_rows;) {
        const int64_t left = num_rows - row, parts = ceil_div(left, kMaxRows), rows = ceil_div(left, parts);
        of_rows<kMaxRows>(rows, [&](auto count) { body(row, count); });
        row += rows;
    }
}

void scale_row(float* row, int64_t D, float by) {
    int64_t d = 0;
    for (; d + W <= D; d += W) store(row + d, load(row + d) * splat(by));
    for (; d < D; ++d) row[d] *= by;
}

// Adds (sum, high, weight) to another such, both of one row: each is relative to its own highest score.
void merge_row(float* whole, float& whole_high, float& whole_sum, const float* part, float part_high, float part_sum,
               int64_t D) {
    const float high = whole_high > part_high ? whole_high : part_high;
    // One of both is 1.
    const float less = exp((whole_high > part_high ? part_high : whole_high) - high);
    const float keep = whole_high > part_high ? 1.0f : less, add = whole_high > part_high ? less : 1.0f;
    int64_t d = 0;
    for (; d + W <= D; d += W) store(whole + d, fma(load(part + d), splat(add), load(whole + d) * splat(keep)));
    for (; d < D; ++d) whole[d] = whole[d] * keep + part[d] * add;
    whole_sum = whole_sum * keep + part_sum * add;
    whole_high = high;
}

// Scores of the row's visible tokens [lo, hi) of a span become weights of their values; others of the span's tiles that
// hold visible tokens become 0. With a cap, scores s become cap * tanh(s / cap) first. Weights that are rounded are
// summed as they are rounded, so that those of one sum are shares of it.
template <class T, class Source>
void soften(const Source& source, float* scores, int64_t lo, int64_t hi, float cap, float& high, float& sum_of) {
    constexpr int64_t kStep = W * Source::kEach;
    const Span<T>& span = source.span;
    const int64_t first = span.first_tile * kTile / kStep * kStep;
    const int64_t end = (span.end_tile * kTile + kStep - 1) / kStep * kStep;
    high = kLowest;
    sum_of = 0.0f;
    if (lo >= hi) {
        __builtin_memset(scores, 0, kSpan * sizeof(float));
        return;
    }
    vf lanes;
    for (int i = 0; i < W; ++i) lanes[i] = (float)i;
    const bool whole = lo <= first && hi >= end;
    vf highest_v = splat(kLowest);
    if (whole && cap <= 0.0f && !__is_same(T, int8_t)) {
        for (int64_t j = first; j < end; j += W) highest_v = max(highest_v, load(scores + j));
    } else {
        for (int64_t j = first; j < end; j += W) {
            vf score = load(scores + j);
            if constexpr (__is_same(T, int8_t)) score *= load(span.key_scales + j);
            if (cap > 0.0f) score = tanh(score * splat(1.0f / cap)) * splat(cap);
            if (!whole) {
                const vf place = lanes + (float)j;
                score = (place >= (float)lo) & (place < (float)hi) ? score : splat(kLowest);
            }
            store(scores + j, score);
            highest_v = max(highest_v, score);
        }
    }
    high = highest(highest_v);
    vf total = {};
    for (int64_t j = first; j < end; j += kStep) {
        if constexpr (Source::kEach == 2) {
            const vf weight = coarse_exp_below_0(load(scores + j) - splat(high));
            const vi pairs = round_pairs(weight, coarse_exp_below_0(load(scores + j + W) - splat(high)));
            total = dot2_bf16(total, pairs, vi{} + 0x3f803f80);
            store(scores + j / 2, as_floats(pairs));
        } else {
            const vf weight = exp_below_0(load(scores + j) - splat(high));
            total += weight;
            if constexpr (__is_same(T, int8_t)) {
                // Scales of tokens that are not seen may be anything.
                store(scores + j, weight == vf{} ? vf{} : weight * load(span.value_scales + j));
            } else {
                store(scores + j, weight);
            }
        }
    }
    sum_of = sum(total);
}

// A tile's rows and what they see.
struct Rows {
    const float* q[kMaxTileRows];
    int64_t lows[kMaxTileRows];
    int64_t ends[kMaxTileRows];
};

// Rows [first_row, first_row + num_rows) and tokens [first, end) of the span that begins at position `begin`.
template <class T, class Source>
void attend_band(const AttentionCall& call, const Source& source, const Rows& rows, int64_t first_row, int64_t num_rows,
                 int64_t begin, int64_t first, int64_t end, Scratch& scratch) {
    const int64_t D = call.cache->head_dim;
    constexpr int64_t kPiece = Source::kPiece, kEach = Source::kEach;
    constexpr bool IN_TILES = kTiles && __is_same(Source, PackedPairs);
#if defined(PENSTOCK_AMX)
    if constexpr (IN_TILES) {
        const int64_t width = width_of_pairs(D), first_tile = source.span.first_tile;
        const TileSource queries{reinterpret_cast<const char*>(rows.q[first_row]), width * 2, kTileRows * width * 2,
                                 kPairStep * 2};
        const TileSource keys{reinterpret_cast<const char*>(source.keys + first_tile * width / 2 * kTile), kTileBytes,
                              width / 2 * kTileBytes, kPairStep / 2 * kTileBytes};
        (num_rows > kTileRows ? all_columns<true> : all_columns<false>)(
            queries, keys, source.span.end_tile - first_tile, width / kPairStep, scratch.scores + first_tile * kTile, kSpan);
    }
#endif
    for (int64_t piece = (first - begin) / kPiece * kPiece; piece < end - begin && !IN_TILES; piece += kPiece) {
        const int64_t from = piece / kTile, to = (piece + kPiece) / kTile;
        const int64_t first_tile = from > source.span.first_tile ? from : source.span.first_tile;
        by_rows(num_rows, [&](int64_t row, auto count) {
            score_rows<count.value>(source, rows.q + first_row + row, first_tile, min(to, source.span.end_tile), D,
                                    call.scale, scratch.scores + row * kSpan);
        });
    }
    // Unless they were packed before, or another band of rows has read them.
    if (kPiece < kSpan && first_row == 0) fetch_all_values(source.span, first - begin, end - begin, D);
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t low = rows.lows[first_row + row];
        fetch_first_values(source.span, first - begin, end - begin, row, D);
        soften<T>(source, scratch.scores + row * kSpan, (low > begin ? low : begin) - begin,
                  min(rows.ends[first_row + row] - begin, kSpan), call.score_cap, scratch.part_high[row],
                  scratch.part_sum[row]);
    }
#if defined(PENSTOCK_AMX)
    if constexpr (IN_TILES) {
        const int64_t from = (first - begin) / kPairStep * kPairStep, num_steps = ceil_div(end - begin - from, kPairStep);
        constexpr int64_t kStride = kSpan * 4;
        const TileSource weights{reinterpret_cast<const char*>(scratch.scores + from / 2), kStride, kTileRows * kStride,
                                 kPairStep * 2};
        const TileSource values{reinterpret_cast<const char*>(source.values + from / 2 * D), D * 4, kTileBytes,
                                kPairStep / 2 * D * 4};
        (num_rows > kTileRows ? all_columns<true> : all_columns<false>)(weights, values, D / kTile, num_steps, scratch.part, D);
        return;
    }
#endif
    __builtin_memset(scratch.part, 0, num_rows * D * sizeof(float));
    for (int64_t piece = (first - begin) / kPiece * kPiece; piece < end - begin; piece += kPiece) {
        const int64_t from = piece > first - begin ? piece : first - begin, to = min(piece + kPiece, end - begin);
        by_rows(num_rows, [&](int64_t row, auto count) {
            weigh<count.value>(source, scratch.scores + row * kSpan, from / kEach, (to + kEach - 1) / kEach, D,
                               scratch.part + row * D);
        });
    }
}

template <class T, bool IN_PAIRS>
void attend(const AttentionCall& call) {
    const AttentionTask& task = *call.task;
    const int64_t D = call.cache->head_dim, R = call.num_heads / call.cache->num_kv_heads;
    const int64_t first_head = task.kv_head * R + task.first_head, num_rows = task.num_tokens * task.num_heads;
    Scratch scratch(call.scratch, D);
    Rows rows;
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t token = row / task.num_heads, head = first_head + row % task.num_heads;
        const float* const q = call.q + (task.first_row + token) * call.q_stride + head * D;
        rows.q[row] = q;
        if constexpr (IN_PAIRS) {
            const int64_t width = width_of_pairs(D);
            rows.q[row] = scratch.pairs + row * width / 2;
            bf16* const rounded = reinterpret_cast<bf16*>(scratch.pairs + row * width / 2);
            for (int64_t d = 0; d < D; ++d) rounded[d] = to_bf16(kTiles ? q[d] * call.scale : q[d]);
            for (int64_t d = D; d < width; ++d) rounded[d] = {0};
        }
        const int64_t own_end = task.first_position + token + 1;
        rows.ends[row] = call.visible ? call.visible[task.first_row + token] : own_end;
        rows.lows[row] = call.window > 0 && own_end > call.window ? own_end - call.window : 0;
        scratch.whole_high[row] = kLowest;
        scratch.whole_sum[row] = 0.0f;
    }
#if defined(PENSTOCK_AMX)
    if (IN_PAIRS) shape_for_product(kTileRows, kTileRows, kTileBytes);
#endif
    __builtin_memset(scratch.whole, 0, num_rows * D * sizeof(float));
    __builtin_memset(scratch.nothing, 0, D / 2 * sizeof(float));
    Span<T> span(*call.cache);
    const int64_t last = min(task.end_span * kSpan, rows.ends[num_rows - 1]);
    for (int64_t s = task.first_span; s < task.end_span; ++s) {
        const int64_t begin = s * kSpan, end = min(begin + kSpan, last);
        const int64_t first = rows.lows[0] > begin ? rows.lows[0] : begin;
        find_span(call, begin, first, end, min(begin + kSpan + kChunk, last), span, reinterpret_cast<T*>(scratch.gathered));
        const auto attend_bands = [&](const auto& source) {
            for (int64_t band = 0; band < num_rows; band += kBand) {
                const int64_t band_rows = min(kBand, num_rows - band);
                attend_band<T>(call, source, rows, band, band_rows, begin, first, end, scratch);
                for (int64_t row = 0; row < band_rows; ++row) {
                    const float* const part = scratch.part + row * D;
                    const float high = scratch.part_high[row], sum = scratch.part_sum[row];
                    if (task.partial >= 0) {
                        float* const to = call.partials + ((task.partial + s - task.first_span) * R + task.first_head + band + row) * (D + 2);
                        __builtin_memcpy(to, part, D * sizeof(float));
                        to[D] = high;
                        to[D + 1] = sum;
                    } else if (sum != 0.0f) {
                        merge_row(scratch.whole + (band + row) * D, scratch.whole_high[band + row],
                                  scratch.whole_sum[band + row], part, high, sum, D);
                    }
                }
            }
        };
        if constexpr (IN_PAIRS) {
            if ((first - begin) % 2) span.values[first - begin - 1] = reinterpret_cast<const T*>(scratch.nothing);
            if ((end - begin) % 2) span.values[end - begin] = reinterpret_cast<const T*>(scratch.nothing);
            const auto attend_packed = [&] {
                attend_bands(PackedPairs(span, first - begin, end - begin, D, scratch.packed_k, scratch.packed_v));
            };
            if constexpr (kTiles) {
                attend_packed();
            } else {
                num_rows > kBand ? attend_packed() : attend_bands(Pairs{span});
            }
        } else {
            attend_bands(Singles<T>{span});
        }
    }
#if defined(PENSTOCK_AMX)
    if (IN_PAIRS) release_tiles();
#endif
    if (task.partial >= 0) return;
    for (int64_t row = 0; row < num_rows; ++row) {
        float* const whole = scratch.whole + row * D;
        scale_row(whole, D, 1.0f / scratch.whole_sum[row]);
        const int64_t token = row / task.num_heads, head = first_head + row % task.num_heads;
        __builtin_memcpy(call.out + ((task.first_row + token) * call.num_heads + head) * D, whole, D * sizeof(float));
    }
}

}  // namespace

int64_t attention_scratch_floats(int64_t D) { return Scratch::size(D); }

void attention(const AttentionCall& call) {
    switch (call.cache->kind) {
        case Cache::kFloat32:
            return attend<float, false>(call);
        case Cache::kBFloat16:
            // Rows of other widths would end within a vector of pairs.
            if (kBF16Pairs && call.cache->head_dim % kTile == 0) return attend<bf16, kBF16Pairs>(call);
            return attend<bf16, false>(call);
        case Cache::kInt8:
            return attend<int8_t, false>(call);
    }
}

// Partials of one token and KV head, [num_partials, R, D + 2] in the order of their spans, into out [R, D].
void merge_partials(const float* partials, int64_t num_partials, int64_t R, int64_t D, float* out) {
    const int64_t size = D + 2;
    for (int64_t row = 0; row < R; ++row) {
        float* const whole = out + row * D;
        float high = kLowest, total = 0.0f;
        __builtin_memset(whole, 0, D * sizeof(float));
        for (int64_t i = 0; i < num_partials; ++i) {
            const float* const part = partials + (i * R + row) * size;
            if (part[D + 1] != 0.0f) merge_row(whole, high, total, part, part[D], part[D + 1], D);
        }
        scale_row(whole, D, 1.0f / total);
    }
}

}  // namespace penstock::PENSTOCK_ISA
