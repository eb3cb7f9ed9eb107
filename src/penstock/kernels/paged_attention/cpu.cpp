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
constexpr float kLowest = -3.402823466e38f;

static_assert(kSpan % kChunk == 0);

// A chunk's keys and values, wherever their blocks are.
template <class T>
struct Chunk {
    const T* keys[kTiles];  // each [D, 16], rows key_stride apart
    int64_t key_stride;
    const T* values[kChunk];  // each [D]; set for tokens that are seen
    // What codes stand for one of, for the same tokens; unused in other caches. A key's scale goes into its score and a
    // value's into its weight, so that the sums are of codes.
    float key_scales[kChunk] = {};
    float value_scales[kChunk] = {};
};

struct Scratch {
    float* scores;   // [rows, kChunk]
    float* part;     // [rows, D] a span's weighted sum
    float* whole;    // [rows, D]
    float* part_high;   // [rows] a span's highest score
    float* part_sum;    // [rows] and its sum of weights
    float* whole_high;
    float* whole_sum;
    float* gathered; // [kTiles, D, kTile] keys of blocks that do not hold whole tiles

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
        gathered = take(kChunk * D);
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
    for (int64_t i = 0; i < kTiles; ++i) {
        const int64_t tile = begin + i * kTile;
        if (tile + kTile <= first || tile >= end) {
            chunk.keys[i] = nullptr;
        } else if (whole_tiles) {
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

template <int ROWS, int TILES, class T>
void score_tile(const float* const* q, const T* const* keys, int64_t key_stride, int64_t D, float scale, float* scores) {
    vf acc[ROWS][TILES][kVectors] = {};
    for (int64_t d = 0; d < D; ++d) {
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) {
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
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TILES; ++t)
            for (int i = 0; i < kVectors; ++i)
                store(scores + r * kChunk + t * kTile + i * W, acc[r][t][i] * splat(scale));
}

template <class T>
void score_rows(const float* const* q, int64_t num_rows, const Chunk<T>& chunk, int64_t D, float scale, float* scores) {
    for (int64_t r = 0; r < num_rows;) {
        const int64_t left = num_rows - r;
        float* const to = scores + r * kChunk;
        if (left >= 4) {
            for (int64_t t = 0; t < kTiles; ++t)
                if (chunk.keys[t])
                    score_tile<4, 1>(q + r, chunk.keys + t, chunk.key_stride, D, scale, to + t * kTile);
            r += 4;
            continue;
        }
        for (int64_t t = 0; t < kTiles; t += 2) {
            const T* const* keys = chunk.keys + t;
            const bool both = keys[0] && keys[1];
            if (left >= 2) {
                if (both) {
                    score_tile<2, 2>(q + r, keys, chunk.key_stride, D, scale, to + t * kTile);
                } else {
                    for (int i = 0; i < 2; ++i)
                        if (keys[i]) score_tile<2, 1>(q + r, keys + i, chunk.key_stride, D, scale, to + (t + i) * kTile);
                }
            } else if (both) {
                score_tile<1, 2>(q + r, keys, chunk.key_stride, D, scale, to + t * kTile);
            } else {
                for (int i = 0; i < 2; ++i)
                    if (keys[i]) score_tile<1, 1>(q + r, keys + i, chunk.key_stride, D, scale, to + (t + i) * kTile);
            }
        }
        r += left >= 2 ? 2 : 1;
    }
}

// sums[row] += weights[row] * values over tokens [first, end) of the chunk, for as many columns from `d` on as fit
// N vectors at a time; returns the column after them.
template <int ROWS, int N, class T>
int64_t weigh_columns(const float* weights, const Chunk<T>& chunk, int64_t first, int64_t end, int64_t D, float* sums,
                      int64_t d) {
    for (; d + N * W <= D; d += N * W) {
        vf acc[ROWS][N];
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < N; ++i) acc[r][i] = load(sums + r * D + d + i * W);
        for (int64_t j = first; j < end; ++j) {
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
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < N; ++i) store(sums + r * D + d + i * W, acc[r][i]);
    }
    return d;
}

template <int ROWS, class T>
void weigh(const float* weights, const Chunk<T>& chunk, int64_t first, int64_t end, int64_t D, float* sums) {
    int64_t d = weigh_columns<ROWS, ROWS >= 4 ? 2 : 4>(weights, chunk, first, end, D, sums, 0);
    d = weigh_columns<ROWS, 1>(weights, chunk, first, end, D, sums, d);
    for (; d < D; ++d)
        for (int r = 0; r < ROWS; ++r)
            for (int64_t j = first; j < end; ++j)
                sums[r * D + d] += weights[r * kChunk + j] * to_float(chunk.values[j][d]);
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

// The scores of the row's visible tokens [lo, hi) of a chunk become weights of their values; others become 0.
template <class T>
void soften(const Chunk<T>& chunk, float* scores, int64_t lo, int64_t hi, float* sums, float& high, float& sum_of, int64_t D) {
    vf lanes;
    for (int i = 0; i < W; ++i) lanes[i] = (float)i;
    vf highest_v = splat(kLowest);
    for (int64_t j = 0; j < kChunk; j += W) {
        const vf place = lanes + (float)j;
        vf score = load(scores + j);
        if constexpr (__is_same(T, int8_t)) score *= load(chunk.key_scales + j);
        const vf masked = (place >= (float)lo) & (place < (float)hi) ? score : splat(kLowest);
        store(scores + j, masked);
        highest_v = max(highest_v, masked);
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
        const vf weight = exp(load(scores + j) - splat(high));
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
        ends[row] = task.first_position + token + 1;
        lows[row] = call.window > 0 && ends[row] > call.window ? ends[row] - call.window : 0;
        scratch.whole_high[row] = kLowest;
        scratch.whole_sum[row] = 0.0f;
    }
    __builtin_memset(scratch.whole, 0, num_rows * D * sizeof(float));
    Chunk<T> chunk;
    for (int64_t span = task.first_span; span < task.end_span; ++span) {
        __builtin_memset(scratch.part, 0, num_rows * D * sizeof(float));
        for (int64_t row = 0; row < num_rows; ++row) {
            scratch.part_high[row] = kLowest;
            scratch.part_sum[row] = 0.0f;
        }
        const int64_t span_end = min((span + 1) * kSpan, ends[num_rows - 1]);
        for (int64_t begin = span * kSpan; begin < span_end; begin += kChunk) {
            const int64_t end = min(begin + kChunk, span_end);
            const int64_t first = lows[0] > begin ? lows[0] : begin;
            if (first >= end) continue;
            // Rows before this one end before the chunk begins.
            int64_t from = 0;
            while (ends[from] <= begin) ++from;
            find_chunk(call, begin, first, end, chunk, reinterpret_cast<T*>(scratch.gathered));
            score_rows(q + from, num_rows - from, chunk, D, call.scale, scratch.scores + from * kChunk);
            for (int64_t row = from; row < num_rows; ++row) {
                const int64_t lo = (lows[row] > begin ? lows[row] : begin) - begin;
                const int64_t hi = min(ends[row], begin + kChunk) - begin;
                float* const scores = scratch.scores + row * kChunk;
                if (lo >= hi) {
                    __builtin_memset(scores, 0, kChunk * sizeof(float));
                    continue;
                }
                soften(chunk, scores, lo, hi, scratch.part + row * D, scratch.part_high[row], scratch.part_sum[row], D);
            }
            for (int64_t row = from; row < num_rows;) {
                const float* const weights = scratch.scores + row * kChunk;
                float* const sums = scratch.part + row * D;
                const int64_t left = num_rows - row;
                if (left >= 4) {
                    weigh<4>(weights, chunk, first - begin, end - begin, D, sums);
                    row += 4;
                } else if (left >= 2) {
                    weigh<2>(weights, chunk, first - begin, end - begin, D, sums);
                    row += 2;
                } else {
                    weigh<1>(weights, chunk, first - begin, end - begin, D, sums);
                    row += 1;
                }
            }
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

int64_t attention_scratch_floats(int64_t D) { return kMaxTileRows * (kChunk + 2 * D + 4) + kChunk * D; }

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
