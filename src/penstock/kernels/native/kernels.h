// What each instruction set offers: one table of functions. Plain types only, because every instruction set's code
// and the module that chooses between them see this file.
#pragma once

#include <cstdint>

namespace penstock {

class Pool;

enum class Weight : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };
enum class Cache : int { kFloat32 = 0, kBFloat16 = 1 };

// A matrix [N, K] laid out for a vector unit: panels of `panel_width` outputs, each [K, panel_width] with the inputs in
// the outer place; the last one padded with zeros. bfloat16 has two outputs to a word, half a panel apart.
struct PackedWeight {
    Weight kind;
    int64_t num_outputs;
    int64_t num_inputs;
    // First half of each panel gate outputs, second half the up outputs they multiply; num_outputs counts pairs.
    bool gated;
    void* panels;
    // [panels * panel_width] in the panels' order, or null
    float* bias;
    // [panels * panel_width] likewise: what each output's codes stand for one of; null unless kInt8
    float* scales;
};

struct LinearCall {
    const PackedWeight* weight;
    const float* x;     // [M, K], rows x_stride apart
    int64_t x_stride;
    int64_t num_rows;
    float* out;         // [M, N], rows out_stride apart
    int64_t out_stride;
    const float* added; // [M, N] as `out`, which it may be; null: nothing is added
};

// One layer's cache, [N, G, D, P] keys and [N, G, P, D] values: a vector of keys meets one query element at a time, a
// vector of value elements one probability at a time.
struct CacheView {
    Cache kind;
    void* k;
    void* v;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
};

// A part of a step's attention: some query tokens of a sequence, one KV head, some of the context.
struct AttentionTask {
    int32_t sequence;
    int32_t kv_head;
    int32_t first_row;     // of the step's T rows
    int32_t num_tokens;
    int32_t first_position; // of the first token
    int32_t first_span;    // spans of the context, in units of kSpan tokens
    int32_t end_span;
    int32_t partial;       // where its first span's result goes, the others after it; -1: all goes to `out`
};

struct AttentionCall {
    const AttentionTask* task;
    const CacheView* cache;
    const float* q;        // [T, H, D], tokens q_stride apart
    int64_t q_stride;
    float* out;            // [T, H, D], dense
    int64_t num_heads;
    const int32_t* table;  // the sequence's blocks
    int64_t table_start;   // position of the first token of table[0]
    int64_t window;        // 0: none
    float scale;
    float* partials;       // each [R, D + 2]: the weighted sum, the highest score, the sum of weights
    float* scratch;        // attention_scratch_floats()
};

// Spans keep their bounds whatever is computed with them, and what they give is put together in order: a token's
// result does not depend on how the work was cut.
constexpr int64_t kSpan = 256;
constexpr int64_t kMaxTileRows = 64;

struct RopeCall {
    float* qkv;            // [T, (H + 2 G) D]; queries are rotated in place
    int64_t num_tokens;
    int64_t num_heads;
    const float* cos;      // [T, D], as rope/reference.py has them
    const float* sin;
    const int64_t* slots;  // [T] block * P + offset
    const float* q_norm;   // [D] or null
    const float* k_norm;
    float eps;
    const CacheView* cache;
};

struct Kernels {
    const char* name;
    int64_t panel_width;

    // `weight` [rows, K], of kind `from`, into panel `panel`; `up` is null unless gated. Into kInt8 it is quantized: each
    // output has its own scale, its greatest magnitude by 127.
    void (*pack_panel)(const PackedWeight& to, const void* weight, const void* up, Weight from, int64_t panel);
    int64_t (*linear_scratch_floats)();
    // Rows [first_row, end_row) by panels [first_panel, end_panel).
    void (*linear)(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
                   float* scratch);

    void (*rms_norm)(const float* x, const float* weight, float* out, int64_t first_row, int64_t end_row, int64_t width,
                     float eps);
    void (*rope_write_kv)(const RopeCall& call, int64_t first_token, int64_t end_token);

    int64_t (*attention_scratch_floats)(int64_t head_dim);
    void (*attention)(const AttentionCall& call);
    void (*merge_partials)(const float* partials, int64_t num_partials, int64_t num_rows, int64_t head_dim, float* out);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace penstock
