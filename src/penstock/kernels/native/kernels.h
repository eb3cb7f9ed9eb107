// What each instruction set offers: one table of functions. Plain types only, because every instruction set's code
// and the module that chooses between them see this file.
#pragma once

#include <cstdint>

namespace penstock {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Pool;

enum class Weight : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };
// What a product becomes: nothing else, or x times the share of it that each lets through. Gated products take kSilu or
// kGeluTanh.
enum class Activation : int { kNone = 0, kSilu = 1, kGeluTanh = 2, kGelu = 3, kQuickGelu = 4 };

enum class Cache : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// A matrix [N, K] laid out for a vector unit: panels of `panel_width` outputs, the last one padded with zeros. Within a
// panel inputs are outermost.
//   float32: [K, panel_width].
//   bfloat16: likewise, with two outputs to a word, half a panel apart; or, where there is an instruction that multiplies
//     pairs and activations are rounded to bfloat16 for it, [K / 2, panel_width, 2]. Both also in 12 bits each without
//     loss, as `linear/shortened.h` has it.
//   8-bit codes: [K / 4, panel_width, 4], four inputs of an output to a word, which is what a dot product of bytes takes.
//   4-bit codes: [K / 8, panel_width, 4], the next four inputs in the upper halves of the same bytes.
// A code c stands for scale * (c - zero), with a scale and a zero for each output and group of inputs.
struct PackedWeight {
    Weight kind;
    int64_t num_outputs;
    int64_t num_inputs;
    // What codes are padded to, with zeros: a multiple of kCodeInputs. bfloat16: of four. float32: num_inputs.
    int64_t padded_inputs;
    // bfloat16 in 12 bits; inputs are a multiple of four.
    bool is_shortened;
    // Inputs that share a scale: a multiple of kCodeInputs up to kMaxGroup.
    int64_t group;
    // Codes only: activations are rounded to 8 bits, with a scale for each row, and multiplied as integers.
    bool int8_activations;
    // If not 0, every row's scale; a value x becomes x / input_scale + input_zero, rounded and clamped, and what the
    // zero adds to each output is in `bias`, with its sign turned.
    float input_scale;
    float input_zero;
    // First half of each panel gate outputs, second half the up outputs they multiply; num_outputs counts pairs.
    bool gated;
    // The gate's, or every output's.
    Activation activation;
    void* panels;
    // [panels * panel_width] in the panels' order, or null
    float* bias;
    // [panels, groups, panel_width]; null unless codes
    float* scales;
    // Likewise, or null: every zero is 128 of 8 bits or 8 of 4.
    uint8_t* zeros;
    // Scales are bfloat16s, two to a word, half a panel apart.
    bool has_short_scales;

    bool has_codes() const { return kind == Weight::kInt8 || kind == Weight::kInt4; }
    int64_t num_groups() const { return ceil_div(padded_inputs, group); }
};

constexpr int64_t kCodeInputs = 32;
constexpr int64_t kMaxGroup = 512;

// Rows of a matrix, dense.
struct WeightPart {
    const void* rows;
    int64_t num_rows;
};

// A matrix as it comes, of `kind`: `parts` [N, K] one below the other, and `up` [N, K] if the product is gated. Codes are
// one part, a byte each whatever their bits, with `scales` and `zeros` [N, groups] as in PackedWeight.
struct WeightSource {
    Weight kind;
    const WeightPart* parts;
    int64_t num_parts;
    const void* up;
    const float* scales;
    const float* up_scales;
    const uint8_t* zeros;
    const uint8_t* up_zeros;
};

struct LinearCall {
    const PackedWeight* weight;
    const float* x;     // [M, K], rows x_stride apart
    int64_t x_stride;
    int64_t num_rows;
    float* out;         // [M, N], rows out_stride apart
    int64_t out_stride;
    const float* added; // [M, N] as `out`, which it may be; null: nothing is added
    uint8_t* rounded;   // [M, rounded_row_bytes()], unless that is 0
};

// One layer's cache, [N, G, D, P] keys and [N, G, P, D] values: a vector of keys meets one query element at a time, a
// vector of value elements one probability at a time. Or two at a time: see cache.h.
struct CacheView {
    Cache kind;
    void* k;
    void* v;
    // [N, G, P] each: what a key's or value's codes stand for one of; null unless kInt8.
    float* k_scales;
    float* v_scales;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
};

// A part of a step's attention: some query tokens of a sequence, some of the query heads that share a KV head, some of the
// context.
struct AttentionTask {
    int32_t sequence;
    int32_t kv_head;
    int32_t first_head;    // of the query heads that share it
    int32_t num_heads;
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
    const int32_t* visible; // [T] how many of its sequence's tokens a row sees; null: those up to itself
    int64_t window;        // 0: none
    float scale;
    float score_cap;       // 0: none
    float* partials;       // each [R, D + 2]: the weighted sum, the highest score, the sum of weights
    float* scratch;        // attention_scratch_floats()
};

// Spans keep their bounds whatever is computed with them, and what they give is put together in order: a token's
// result does not depend on how the work was cut.
constexpr int64_t kSpan = 256;
constexpr int64_t kMaxTileRows = 128;

struct NormCall {
    const float* x;       // [T, E], rows x_stride apart
    int64_t x_stride;
    const float* weight;  // [E]
    const float* bias;    // [E]; rms_norm has none
    float* out;           // [T, E], rows out_stride apart; may be x
    int64_t out_stride;
    int64_t width;        // E
    float eps;
};

struct EmbedCall {
    const int64_t* token_ids;    // [T]
    const PackedWeight* packed;  // [V, E], without a gate; or null, and there is a table
    Weight kind;                 // of the table: float32 or bfloat16
    const void* table;           // [V, E]
    int64_t width;               // E
    float scale;
    float* out;                  // [T, E]
};

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

// A row of logits is looked at in blocks: few of them hold anything likely.
constexpr int64_t kLogitBlock = 256;

struct Candidate {
    float weight;  // e^((logit - the highest) * sharpness), where sharpness is the temperature's inverse
    int32_t token;
};

struct Kernels {
    const char* name;
    int64_t panel_width;

    // Whether bfloat16 can be shortened.
    bool shortens;
    int64_t (*panel_bytes)(const PackedWeight& weight);
    // Floats into codes are quantized: 8 bits by the greatest magnitude of each group, 4 bits by the scale that leaves the
    // least squared error. False: it is to be shortened, and its numbers are too far apart.
    bool (*pack_panel)(const PackedWeight& to, const WeightSource& from, int64_t panel);
    // Bytes of a row of activations as the weight wants them; 0: as they are.
    int64_t (*rounded_row_bytes)(const PackedWeight& weight);
    void (*round_activations)(const LinearCall& call, int64_t first_row, int64_t end_row);
    int64_t (*linear_scratch_floats)();
    // Rows that one call of `linear` is for.
    int64_t (*most_rows)(const PackedWeight& weight);
    // So many rows at most, [first_row, end_row), by panels [first_panel, end_panel).
    void (*linear)(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
                   float* scratch);

    void (*embed)(const EmbedCall& call, int64_t first_row, int64_t end_row);
    void (*add)(float* x, const float* y, float scale, int64_t first, int64_t end);
    void (*rms_norm)(const NormCall& call, int64_t first_row, int64_t end_row);
    void (*layer_norm)(const NormCall& call, int64_t first_row, int64_t end_row);
    void (*rope_write_kv)(const RopeCall& call, int64_t first_token, int64_t end_token);

    int64_t (*attention_scratch_floats)(int64_t head_dim);
    void (*attention)(const AttentionCall& call);
    void (*merge_partials)(const float* partials, int64_t num_partials, int64_t num_rows, int64_t head_dim, float* out);

    // Writes the maximum of each block and returns that of all; not a number if some logit is not.
    float (*block_maxima)(const float* logits, int64_t size, float* maxima);
    // Writes the sum of each block's weights.
    void (*block_weights)(const float* logits, int64_t size, float highest, float sharpness, double* sums);
    // Writes the tokens whose logits reach `threshold`, in their order, and returns how many. What has no weight is left
    // out. `out` has room for one more than `size`.
    int64_t (*gather)(const float* logits, int64_t size, const float* maxima, float highest, float sharpness,
                      float threshold, Candidate* out);

    float (*read_all)(const float* from, int64_t size);
    int64_t (*multiply_add)(int64_t num_rounds, float* out);
    int64_t (*multiply_add_pairs)(int64_t num_rounds, float* out);
    int64_t (*multiply_add_bytes)(int64_t num_rounds, float* out);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx2_vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}

}  // namespace penstock
