// Attention over a paged cache, read where it lies.
//
// The rows of a tile are query tokens of one sequence by the query heads that share a KV head. The context is taken in
// chunks of kChunk tokens: scores, then the running maximum and sum (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018), then the weighted values. Chunks and spans of them begin at fixed positions, and
// every score and every weighted sum is one chain in a fixed order. So a token's result depends neither on what it is
// computed beside nor on how its prompt was cut into steps.
#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kTile = 16;  // keys side by side in a block
constexpr int kVectors = kTile / W;
constexpr int64_t kTiles = kChunk / kTile;
constexpr int kMaxRows = 6;  // computed together: two vectors of sums each fit in 16 registers
constexpr float kLowest = -3.402823466e38f;

static_assert(kSpan % kChunk == 0);

// A chunk's keys and values, wherever their blocks are.
template <class T>
struct Chunk {
    // Each [D, 16], rows key_stride apart; those from first_tile on to end_tile hold tokens that are seen.
    const T* keys[kTiles];
    int64_t first_tile;
    int64_t end_tile;
    int64_t key_stride;
    const T* values[kChunk];  // each [D]; set for tokens that are seen
    // What codes stand for one of, for the same tokens; unused in other caches. A key's scale goes into its score and a
    // value's into its weight, so that the sums are of codes.
    float key_scales[kChunk] = {};
    float value_scales[kChunk] = {};

    // Whatever has not been found yet points somewhere, so that it can be prefetched.
    explicit Chunk(const CacheView& cache) {
        for (const T*& tile : keys) tile = static_cast<const T*>(cache.k);
        for (const T*& value : values) value = static_cast<const T*>(cache.v);
    }
};

struct Scratch {
    float* scores;   // [rows, kChunk]
    float* part;     // [rows, D] a span's weighted sum
    float* whole;    // [rows, D]
    float* part_high;   // [rows] a span's highest score
    float* part_sum;    // [rows] and its sum of weights
    float* whole_high;
    float* whole_sum;
    float* gathered; // [2, kTiles, D, kTile] keys of blocks that do not hold whole tiles, of two chunks

    Scratch(float* from, int64_t D) {
        const auto take = [&from](int64_t n) {
            float* taken = from;
            from += n;
            return taken;
        };
        scores = take(kMaxTileRows * kChunk);
        part = take(kMaxTileRows * D);
        whole = take(kMaxTileRows * D);
        part_high = take(kMaxTileRows);
        part_sum = take(kMaxTileRows);
        whole_high = take(kMaxTileRows);
        whole_sum = take(kMaxTileRows);
        gathered = take(2 * kChunk * D);
    }
};

// Tokens [first, end) of the chunk that begins at position `begin` are set up; scores of others are computed from
// whatever lies there and have to be masked.
template <class T>
void find_chunk(const AttentionCall& call, int64_t begin, int64_t first, int64_t end, Chunk<T>& chunk, T* gathered) {
    const CacheView& cache = *call.cache;
    const int64_t G = cache.num_kv_heads, D = cache.head_dim, P = cache.block_size, g = call.task->kv_head;
    const T* const k = static_cast<const T*>(cache.k);
    const T* const v = static_cast<const T*>(cache.v);
    const auto block_of = [&](int64_t position) -> int64_t { return call.table[(position - call.table_start) / P]; };
    const bool whole_tiles = P % kTile == 0;
    chunk.key_stride = whole_tiles ? P : kTile;
    chunk.first_tile = (first - begin) / kTile;
    chunk.end_tile = (end - begin + kTile - 1) / kTile;
    for (int64_t i = chunk.first_tile; i < chunk.end_tile; ++i) {
        const int64_t tile = begin + i * kTile;
        if (whole_tiles) {
            // Blocks are aligned to positions, so a tile lies in one of them.
            chunk.keys[i] = k + (block_of(tile) * G + g) * D * P + tile % P;
        } else {
            chunk.keys[i] = gathered + i * D * kTile;
            for (int64_t j = 0; j < kTile; ++j)
                if (tile + j < first || tile + j >= end)
                    for (int64_t d = 0; d < D; ++d) gathered[(i * D + d) * kTile + j] = T{};
        }
    }
    // A block's tokens at a time.
    for (int64_t position = first; position < end;) {
        const int64_t offset = position % P, num_tokens = min(P - offset, end - position);
        const int64_t head = block_of(position) * G + g, place = head * P + offset, at = position - begin;
        for (int64_t j = 0; j < num_tokens; ++j) chunk.values[at + j] = v + (place + j) * D;
        if constexpr (__is_same(T, int8_t)) {
            __builtin_memcpy(chunk.key_scales + at, cache.k_scales + place, num_tokens * sizeof(float));
            __builtin_memcpy(chunk.value_scales + at, cache.v_scales + place, num_tokens * sizeof(float));
        }
        if (!whole_tiles) {
            const T* const from = k + head * D * P + offset;
            for (int64_t j = at; j < at + num_tokens; ++j)
                for (int64_t d = 0; d < D; ++d)
                    gathered[(j / kTile * D + d) * kTile + j % kTile] = from[d * P + j - at];
        }
        position += num_tokens;
    }
}

// While keys are multiplied, those at the same place of the next chunk, `ahead`, are on their way from memory: blocks lie
// in no order, and no processor guesses which comes next. Values likewise.
template <int ROWS, int TILES, class T>
void score_tile(const float* const* q, const T* const* keys, const T* const* ahead, int64_t key_stride, int64_t D,
                float scale, float* scores) {
    vf acc[ROWS][TILES][kVectors] = {};
#pragma GCC unroll 4
    for (int64_t d = 0; d < D; ++d) {
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) {
            __builtin_prefetch(ahead[t] + d * key_stride);
            vf key[kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) key[i] = load(keys[t] + d * key_stride + i * W);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const vf query = splat(q[r][d]);
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) acc[r][t][i] = fma(query, key[i], acc[r][t][i]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i)
                store(scores + r * kChunk + t * kTile + i * W, acc[r][t][i] * splat(scale));
}

// The greatest of 1, 2, 4, 8 that times `each` sums fit in registers beside what is multiplied.
constexpr int as_many(int each, int most) {
    int n = 1;
    while (n < most && 2 * n * each <= NUM_REGISTERS - 4) n *= 2;
    return n;
}

// Not inlined, because compilers take minutes over one function that holds every shape of tile.
template <int ROWS, class T>
[[gnu::noinline]] void score_rows(const float* const* q, const Chunk<T>& chunk, const Chunk<T>& ahead, int64_t D,
                                  float scale, float* scores) {
    constexpr int TILES = as_many(ROWS * kVectors, kTiles);
    int64_t t = chunk.first_tile;
    for (; t + TILES <= chunk.end_tile; t += TILES)
        score_tile<ROWS, TILES>(q, chunk.keys + t, ahead.keys + t, chunk.key_stride, D, scale, scores + t * kTile);
    for (; t < chunk.end_tile; ++t)
        score_tile<ROWS, 1>(q, chunk.keys + t, ahead.keys + t, chunk.key_stride, D, scale, scores + t * kTile);
}

// sums[row] += weights[row] * values over tokens [first, end) of the chunk, for as many columns from `d` on as fit
// N vectors at a time; returns the column after them.
template <int ROWS, int N, class T>
int64_t weigh_columns(const float* weights, const Chunk<T>& chunk, const Chunk<T>& ahead, int64_t first, int64_t end,
                      int64_t D, float* sums, int64_t d) {
    constexpr int kLine = 64 / sizeof(T);  // elements in a line of the cache
    for (; d + N * W <= D; d += N * W) {
        vf acc[ROWS][N];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) acc[r][i] = load(sums + r * D + d + i * W);
#pragma GCC unroll 4
        for (int64_t j = first; j < end; ++j) {
#pragma GCC unroll 8
            for (int i = 0; i < N; i += kLine / W) __builtin_prefetch(ahead.values[j] + d + i * W);
            vf value[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) value[i] = load(chunk.values[j] + d + i * W);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const vf weight = splat(weights[r * kChunk + j]);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) acc[r][i] = fma(weight, value[i], acc[r][i]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) store(sums + r * D + d + i * W, acc[r][i]);
    }
    return d;
}

template <int ROWS, int N, class T>
int64_t weigh_from(const float* weights, const Chunk<T>& chunk, const Chunk<T>& ahead, int64_t first, int64_t end,
                   int64_t D, float* sums, int64_t d) {
    d = weigh_columns<ROWS, N>(weights, chunk, ahead, first, end, D, sums, d);
    if constexpr (N > 1) d = weigh_from<ROWS, N / 2>(weights, chunk, ahead, first, end, D, sums, d);
    return d;
}

template <int ROWS, class T>
[[gnu::noinline]] void weigh(const float* weights, const Chunk<T>& chunk, const Chunk<T>& ahead, int64_t first,
                             int64_t end, int64_t D, float* sums) {
    int64_t d = weigh_from<ROWS, as_many(ROWS, 8)>(weights, chunk, ahead, first, end, D, sums, 0);
    for (; d < D; ++d)
        for (int r = 0; r < ROWS; ++r)
            for (int64_t j = first; j < end; ++j)
                sums[r * D + d] += weights[r * kChunk + j] * to_float(chunk.values[j][d]);
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
        const int64_t left = num_rows - row, parts = (left + kMaxRows - 1) / kMaxRows, rows = (left + parts - 1) / parts;
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
    const float keep = exp(whole_high - high), add = exp(part_high - high);
    int64_t d = 0;
    for (; d + W <= D; d += W) store(whole + d, fma(load(part + d), splat(add), load(whole + d) * splat(keep)));
    for (; d < D; ++d) whole[d] = whole[d] * keep + part[d] * add;
    whole_sum = whole_sum * keep + part_sum * add;
    whole_high = high;
}

// The scores of the row's visible tokens [lo, hi) of a chunk become weights of their values; others become 0. With a
// cap, scores s become cap * tanh(s / cap) first.
template <class T>
void soften(const Chunk<T>& chunk, float* scores, int64_t lo, int64_t hi, float cap, float* sums, float& high,
            float& sum_of, int64_t D) {
    vf lanes;
    for (int i = 0; i < W; ++i) lanes[i] = (float)i;
    const bool whole = lo == 0 && hi == kChunk;
    vf highest_v = splat(kLowest);
    for (int64_t j = 0; j < kChunk; j += W) {
        vf score = load(scores + j);
        if constexpr (__is_same(T, int8_t)) score *= load(chunk.key_scales + j);
        if (cap > 0.0f) score = tanh(score * splat(1.0f / cap)) * splat(cap);
        if (!whole) {
            const vf place = lanes + (float)j;
            score = (place >= (float)lo) & (place < (float)hi) ? score : splat(kLowest);
        }
        store(scores + j, score);
        highest_v = max(highest_v, score);
    }
    const float top = highest(highest_v);
    if (top > high) {
        if (sum_of != 0.0f) {
            const float by = exp(high - top);
            sum_of *= by;
            scale_row(sums, D, by);
        }
        high = top;
    }
    vf total = {};
    for (int64_t j = 0; j < kChunk; j += W) {
        const vf weight = exp_below_0(load(scores + j) - splat(high));
        total += weight;
        if constexpr (__is_same(T, int8_t)) {
            // Scales of tokens that are not seen may be anything.
            store(scores + j, weight == vf{} ? vf{} : weight * load(chunk.value_scales + j));
        } else {
            store(scores + j, weight);
        }
    }
    sum_of += sum(total);
}

template <class T>
void attend(const AttentionCall& call) {
    const AttentionTask& task = *call.task;
    const int64_t D = call.cache->head_dim, R = call.num_heads / call.cache->num_kv_heads;
    const int64_t num_rows = task.num_tokens * R;
    Scratch scratch(call.scratch, D);
    const float* q[kMaxTileRows];
    int64_t lows[kMaxTileRows], ends[kMaxTileRows];
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t token = row / R, head = task.kv_head * R + row % R;
        q[row] = call.q + (task.first_row + token) * call.q_stride + head * D;
        const int64_t own_end = task.first_position + token + 1;
        ends[row] = call.visible ? call.visible[task.first_row + token] : own_end;
        lows[row] = call.window > 0 && own_end > call.window ? own_end - call.window : 0;
        scratch.whole_high[row] = kLowest;
        scratch.whole_sum[row] = 0.0f;
    }
    __builtin_memset(scratch.whole, 0, num_rows * D * sizeof(float));
    // Chunks are found one ahead of the one that is computed.
    Chunk<T> chunks[2] = {Chunk<T>(*call.cache), Chunk<T>(*call.cache)};
    const int64_t last = min(task.end_span * kSpan, ends[num_rows - 1]);
    const auto seen_of = [&](int64_t begin) { return lows[0] > begin ? lows[0] : begin; };
    const auto find = [&](int64_t begin) {
        const int64_t i = begin / kChunk % 2, first = seen_of(begin), end = min(begin + kChunk, last);
        T* const gathered = reinterpret_cast<T*>(scratch.gathered) + i * kChunk * D;
        if (first < end) find_chunk(call, begin, first, end, chunks[i], gathered);
    };
    find(task.first_span * kSpan);
    for (int64_t span = task.first_span; span < task.end_span; ++span) {
        __builtin_memset(scratch.part, 0, num_rows * D * sizeof(float));
        for (int64_t row = 0; row < num_rows; ++row) {
            scratch.part_high[row] = kLowest;
            scratch.part_sum[row] = 0.0f;
        }
        const int64_t span_end = min((span + 1) * kSpan, ends[num_rows - 1]);
        for (int64_t begin = span * kSpan; begin < span_end; begin += kChunk) {
            const Chunk<T>&chunk = chunks[begin / kChunk % 2], &ahead = chunks[(begin / kChunk + 1) % 2];
            find(begin + kChunk);
            const int64_t first = seen_of(begin), end = min(begin + kChunk, span_end);
            if (first >= end) continue;
            // Rows before this one end before the chunk begins.
            int64_t from = 0;
            while (ends[from] <= begin) ++from;
            by_rows(num_rows - from, [&](int64_t row, auto count) {
                score_rows<count.value>(q + from + row, chunk, ahead, D, call.scale, scratch.scores + (from + row) * kChunk);
            });
            for (int64_t row = from; row < num_rows; ++row) {
                const int64_t lo = (lows[row] > begin ? lows[row] : begin) - begin;
                const int64_t hi = min(ends[row], begin + kChunk) - begin;
                float* const scores = scratch.scores + row * kChunk;
                if (lo >= hi) {
                    __builtin_memset(scores, 0, kChunk * sizeof(float));
                    continue;
                }
                soften(chunk, scores, lo, hi, call.score_cap, scratch.part + row * D, scratch.part_high[row],
                       scratch.part_sum[row], D);
            }
            by_rows(num_rows - from, [&](int64_t row, auto count) {
                weigh<count.value>(scratch.scores + (from + row) * kChunk, chunk, ahead, first - begin, end - begin,
                                   D, scratch.part + (from + row) * D);
            });
        }
        if (task.partial >= 0) {
            for (int64_t row = 0; row < num_rows; ++row) {
                float* const to = call.partials + ((task.partial + span - task.first_span) * R + row) * (D + 2);
                __builtin_memcpy(to, scratch.part + row * D, D * sizeof(float));
                to[D] = scratch.part_high[row];
                to[D + 1] = scratch.part_sum[row];
            }
            continue;
        }
        for (int64_t row = 0; row < num_rows; ++row)
            if (scratch.part_sum[row] != 0.0f)
                merge_row(scratch.whole + row * D, scratch.whole_high[row], scratch.whole_sum[row],
                          scratch.part + row * D, scratch.part_high[row], scratch.part_sum[row], D);
    }
    if (task.partial >= 0) return;
    for (int64_t row = 0; row < num_rows; ++row) {
        float* const whole = scratch.whole + row * D;
        scale_row(whole, D, 1.0f / scratch.whole_sum[row]);
        const int64_t token = row / R, head = task.kv_head * R + row % R;
        __builtin_memcpy(call.out + ((task.first_row + token) * call.num_heads + head) * D, whole, D * sizeof(float));
    }
}

}  // namespace

int64_t attention_scratch_floats(int64_t D) { return kMaxTileRows * (kChunk + 2 * D + 4) + 2 * kChunk * D; }

void attention(const AttentionCall& call) {
    switch (call.cache->kind) {
        case Cache::kFloat32:
            return attend<float>(call);
        case Cache::kBFloat16:
            return attend<bf16>(call);
        case Cache::kInt8:
            return attend<int8_t>(call);
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
