// Attention over a paged cache, read where it lies.
//
// The rows of a tile are query tokens of one sequence by the query heads that share a KV head. The context is taken in
// spans of kSpan tokens: scores, their maximum, weights, then the weighted values; spans are put together by their maxima
// and sums (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Spans begin at fixed positions,
// and every score and every weighted sum is one chain in a fixed order. So a token's result depends neither on what it
// is computed beside nor on how its prompt was cut into steps.
#include "../native/cache.h"
#include "../native/tiles.h"

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr int64_t kTile = kTokensOfTile;
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
#else
constexpr bool kTiles = false;
constexpr int64_t kBand = 24;  // rows whose scores of a span stay in the first-level cache
#endif

struct Scratch {
    float* scores;    // [kBand, kSpan], then weights in their place
    float* part;      // [kBand, D] a span's weighted sums
    float* whole;     // [rows, D]
    float* gathered;  // [kSpan / kTile, D, kTile] keys of blocks that do not hold whole tiles
    float* pairs;     // [rows, D / 2] queries
    float* edges;     // [2, kTile / 2, D] values of a span's first and last tile, where not all are seen
    float part_high[kBand];  // a span's highest score
    float part_sum[kBand];   // and its sum of weights
    float whole_high[kMaxTileRows];
    float whole_sum[kMaxTileRows];

    static int64_t size(int64_t D) {
        return kBand * (kSpan + D) + kMaxTileRows * D + kSpan * D + kMaxTileRows * D / 2 + kTile * D;
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
        edges = take(kTile * D);
        pairs = take(kMaxTileRows * D / 2);
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
    int64_t D;

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
    template <int LOCALITY>
    void fetch_values(int64_t first, int64_t end) const {
        for (int64_t j = first; j < end; ++j)
            for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(span.values[j] + d, 0, LOCALITY);
    }
};

// A span of a cache in pairs, and what is behind it, which is fetched ahead.
struct PairSpan {
    const bf16* keys[2 * kSpan / kTile];    // each [D / 2, 16, 2], rows key_stride apart
    const bf16* values[2 * kSpan / kTile];  // each [8, D, 2]; tokens that are not seen are zeros
    int64_t first_tile;                     // of those that hold tokens that are seen
    int64_t end_tile;
    int64_t key_stride;
    int64_t D;

    explicit PairSpan(const CacheView& cache) : key_stride(2 * cache.block_size), D(cache.head_dim) {
        for (const bf16*& tile : keys) tile = static_cast<const bf16*>(cache.k);
        for (const bf16*& tile : values) tile = static_cast<const bf16*>(cache.v);
    }

    // As find_span does. Blocks are aligned to positions, so a tile lies in one of them.
    void find(const AttentionCall& call, int64_t begin, int64_t first, int64_t end, int64_t ahead, float* edges) {
        const CacheView& cache = *call.cache;
        const int64_t P = cache.block_size;
        first_tile = (first - begin) / kTile;
        end_tile = ceil_div(end - begin, kTile);
        for (int64_t i = first_tile, position; (position = begin + i * kTile) < ahead; ++i) {
            const int64_t block = call.table[(position - call.table_start) / P];
            const int64_t head = (block * cache.num_kv_heads + call.task->kv_head) * D * P;
            keys[i] = static_cast<const bf16*>(cache.k) + head + position % P * 2;
            values[i] = static_cast<const bf16*>(cache.v) + head + position % P * D;
            if (position < end && (position < first || position + kTile > end)) {
                values[i] = seen_values(values[i], first - position, end - position, edges);
                edges += kTile / 2 * D;
            }
        }
    }

    // A tile's values of tokens [first, end), and zeros.
    const bf16* seen_values(const bf16* from, int64_t first, int64_t end, float* to) const {
        for (int64_t j = 0; j < kTile / 2; ++j) {
            const auto is_seen = [&](int64_t token) { return token >= first && token < end; };
            const vi mask = vi{} + ((is_seen(2 * j) ? 0xffff : 0) | (is_seen(2 * j + 1) ? (int32_t)0xffff0000u : 0));
            for (int64_t d = 0; d < D; d += W)
                store(to + j * D + d, as_floats(load_bits(from + 2 * (j * D + d)) & mask));
        }
        return reinterpret_cast<const bf16*>(to);
    }
};

// Two: neighbouring elements of a key, or one element of the values of neighbouring tokens.
struct Pairs {
    static constexpr int64_t kEach = 2;
    static constexpr int64_t kPiece = kChunk;
    const PairSpan& span;

    static vf spread(const float* x) { return as_floats(word_at(x)); }
    static vf add(vf sums, vf x, vf y) { return dot2_bf16(sums, (vi)x, (vi)y); }
    const bf16* value_at(int64_t j, int64_t d) const {
        return span.values[j / (kTile / 2)] + 2 * (j % (kTile / 2) * span.D + d);
    }
    vf key(int64_t tile, int64_t d, int) const { return as_floats(load_bits(span.keys[tile] + d * span.key_stride)); }
    vf value(int64_t j, int64_t d) const { return as_floats(load_bits(value_at(j, d))); }
    void fetch_key(int64_t tile, int64_t d) const {
        __builtin_prefetch(span.keys[tile + kChunk / kTile] + d * span.key_stride);
    }
    template <int N>
    void fetch_value(int64_t j, int64_t d) const {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) __builtin_prefetch(value_at(j + kChunk / 2, d + i * W));
    }
    template <int LOCALITY>
    void fetch_values(int64_t first, int64_t end) const {
        for (int64_t j = first / 2; j < (end + 1) / 2; ++j)
            for (int64_t d = 0; d < span.D; d += W) __builtin_prefetch(value_at(j, d), 0, LOCALITY);
    }
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
    const auto& span = source.span;
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

// Rows of a band, of which the first is `first_row`, and tokens [first, end) of a span.
struct Band {
    int64_t first_row;
    int64_t num_rows;
    int64_t first;
    int64_t end;
};

template <class Source>
void score_band(const AttentionCall& call, const Source& source, const Rows& rows, const Band& band, Scratch& scratch) {
    for (int64_t piece = band.first / kChunk * kChunk; piece < band.end; piece += kChunk) {
        const int64_t from = piece / kTile, to = (piece + kChunk) / kTile;
        const int64_t first_tile = from > source.span.first_tile ? from : source.span.first_tile;
        by_rows(band.num_rows, [&](int64_t row, auto count) {
            score_rows<count.value>(source, rows.q + band.first_row + row, first_tile, min(to, source.span.end_tile),
                                    call.cache->head_dim, call.scale, scratch.scores + row * kSpan);
        });
    }
    // To the second-level cache, which waits for more lines at a time than the first does: from there the next are fetched in
    // time. Unless another band of rows has read them.
    if (band.first_row == 0) source.template fetch_values<2>(band.first, band.end);
}

// scratch.part becomes the sums of values by weights.
template <class Source>
void weigh_band(const Source& source, int64_t D, const Band& band, Scratch& scratch) {
    constexpr int64_t kEach = Source::kEach;
    __builtin_memset(scratch.part, 0, band.num_rows * D * sizeof(float));
    for (int64_t piece = band.first / kChunk * kChunk; piece < band.end; piece += kChunk) {
        const int64_t from = piece > band.first ? piece : band.first, to = min(piece + kChunk, band.end);
        by_rows(band.num_rows, [&](int64_t row, auto count) {
            weigh<count.value>(source, scratch.scores + row * kSpan, from / kEach, (to + kEach - 1) / kEach, D,
                               scratch.part + row * D);
        });
    }
}

#if defined(PENSTOCK_AMX)

// Pairs that tiles take where they lie.
struct TilePairs : Pairs {};

// Lines that come from memory meanwhile, some with each step.
struct Lines {
    const char* from[2];
    int64_t stride;
    int64_t each_step;

    void before_step() {
        for (const char*& line : from)
            for (int64_t i = 0; i < each_step; ++i, line += stride) __builtin_prefetch(line, 0, 2);
    }
};

template <class F>
void of_tiles(bool two_rows, bool two_columns, F&& body) {
    two_rows ? two_columns ? body(Number<true>{}, Number<true>{}) : body(Number<true>{}, Number<false>{})
             : two_columns ? body(Number<false>{}, Number<true>{}) : body(Number<false>{}, Number<false>{});
}

void shape_for_band(const Band& band, int64_t step_bytes) {
    const int64_t first = min(band.num_rows, kTileRows);
    shape_for_product(first, band.num_rows - first, step_bytes);
}

// The span's values come meanwhile.
void score_band(const AttentionCall&, const TilePairs& source, const Rows& rows, const Band& band, Scratch& scratch) {
    const PairSpan& span = source.span;
    const int64_t row_bytes = span.D * 2, step_bytes = row_bytes % kTileBytes ? kTileBytes / 2 : kTileBytes;
    const int64_t stride = span.key_stride * 2, lines_each = band.first_row == 0 ? step_bytes / 4 : 0;
    const TileSource queries{reinterpret_cast<const char*>(rows.q[band.first_row]), row_bytes, kTileRows * row_bytes, step_bytes};
    shape_for_band(band, step_bytes);
    for (int64_t tile = span.first_tile; tile < span.end_tile; tile += 2) {
        const int64_t beside = min(tile + 1, span.end_tile - 1);
        const auto at = [](const bf16* from) { return reinterpret_cast<const char*>(from); };
        const TileSource keys{at(span.keys[tile]), stride, at(span.keys[beside]) - at(span.keys[tile]), step_bytes / 4 * stride};
        Lines values{{at(span.values[tile]), at(span.values[beside])}, 64, lines_each};
        of_tiles(band.num_rows > kTileRows, beside > tile, [&](auto two_rows, auto two_columns) {
            zero_sums<two_rows.value, two_columns.value>();
            multiply_tiles<Columns::kBFloat16, two_rows.value, two_columns.value>(queries, keys, row_bytes / step_bytes, values);
            store_sums<two_rows.value, two_columns.value>(scratch.scores + tile * kTile, kSpan * 4, kTileRows * kSpan * 4);
        });
    }
}

// The next span's keys come meanwhile.
void weigh_band(const TilePairs& source, int64_t D, const Band& band, Scratch& scratch) {
    constexpr int64_t kStride = kSpan * 4, kStepBytes = kTile * 2;
    const PairSpan& span = source.span;
    const int64_t stride = span.key_stride * 2, lines_each = band.first_row == 0 ? kTile / 2 : 0;
    shape_for_band(band, kStepBytes);
    for (int64_t d = 0; d < D; d += 2 * kTile)
        of_tiles(band.num_rows > kTileRows, d + kTile < D, [&](auto two_rows, auto two_columns) {
            zero_sums<two_rows.value, two_columns.value>();
            for (int64_t tile = span.first_tile; tile < span.end_tile; ++tile) {
                const char* const weights = reinterpret_cast<const char*>(scratch.scores) + tile * kStepBytes;
                const char* const next = reinterpret_cast<const char*>(span.keys[kSpan / kTile + tile]) + d / 2 * stride;
                Lines keys{{next, next + kTile / 2 * stride}, stride, lines_each};
                multiply_tiles<Columns::kBFloat16, two_rows.value, two_columns.value>(
                    {weights, kStride, kTileRows * kStride, 0},
                    {reinterpret_cast<const char*>(span.values[tile] + 2 * d), D * 4, kTileBytes, 0}, 1, keys);
            }
            store_sums<two_rows.value, two_columns.value>(scratch.part + d, D * 4, kTileRows * D * 4);
        });
}

#endif

// The band's rows and its tokens of the span that begins at position `begin`.
template <class T, class Source>
void attend_band(const AttentionCall& call, const Source& source, const Rows& rows, const Band& band, int64_t begin,
                 Scratch& scratch) {
    constexpr int64_t kEachRow = 8;
    score_band(call, source, rows, band, scratch);
    for (int64_t row = 0; row < band.num_rows; ++row) {
        // Softmax waits for no memory, so the first values are fetched meanwhile: some of them with each row.
        const int64_t low = rows.lows[band.first_row + row], from = band.first + row * kEachRow;
        source.template fetch_values<3>(from, min(from + kEachRow, band.end));
        soften<T>(source, scratch.scores + row * kSpan, (low > begin ? low : begin) - begin,
                  min(rows.ends[band.first_row + row] - begin, kSpan), call.score_cap, scratch.part_high[row],
                  scratch.part_sum[row]);
    }
    weigh_band(source, call.cache->head_dim, band, scratch);
}

template <bool FIRST, class A, class B>
struct Choose {
    using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
    using type = B;
};

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
            rows.q[row] = scratch.pairs + row * D / 2;
            bf16* const rounded = reinterpret_cast<bf16*>(scratch.pairs + row * D / 2);
            for (int64_t d = 0; d < D; ++d) rounded[d] = to_bf16(kTiles ? q[d] * call.scale : q[d]);
        }
        const int64_t own_end = task.first_position + token + 1;
        rows.ends[row] = call.visible ? call.visible[task.first_row + token] : own_end;
        rows.lows[row] = call.window > 0 && own_end > call.window ? own_end - call.window : 0;
        scratch.whole_high[row] = kLowest;
        scratch.whole_sum[row] = 0.0f;
    }
    __builtin_memset(scratch.whole, 0, num_rows * D * sizeof(float));
    typename Choose<IN_PAIRS, PairSpan, Span<T>>::type span(*call.cache);
    const int64_t last = min(task.end_span * kSpan, rows.ends[num_rows - 1]);
    for (int64_t s = task.first_span; s < task.end_span; ++s) {
        const int64_t begin = s * kSpan, end = min(begin + kSpan, last);
        const int64_t first = rows.lows[0] > begin ? rows.lows[0] : begin;
        const auto attend_bands = [&](const auto& source) {
            for (int64_t band = 0; band < num_rows; band += kBand) {
                const int64_t band_rows = min(kBand, num_rows - band);
                attend_band<T>(call, source, rows, {band, band_rows, first - begin, end - begin}, begin, scratch);
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
            span.find(call, begin, first, end, min(begin + 2 * kSpan, last), scratch.edges);
#if defined(PENSTOCK_AMX)
            attend_bands(TilePairs{{span}});
#else
            attend_bands(Pairs{span});
#endif
        } else {
            find_span(call, begin, first, end, min(begin + kSpan + kChunk, last), span, reinterpret_cast<T*>(scratch.gathered));
            attend_bands(Singles<T>{span, D});
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
            return is_in_pairs(*call.cache) ? attend<bf16, kBF16Pairs>(call) : attend<bf16, false>(call);
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
