// The table of one instruction set; compiled once for each.
#include "kernels.h"
#include "../linear/panels.h"

#define PENSTOCK_TEXT_(x) #x
#define PENSTOCK_TEXT(x) PENSTOCK_TEXT_(x)

namespace penstock::PENSTOCK_ISA {

int64_t panel_bytes_of(const PackedWeight& weight);
bool pack_panel(const PackedWeight& to, const WeightSource& from, int64_t panel);
int64_t rounded_row_bytes(const PackedWeight& weight);
void round_activations(const LinearCall& call, int64_t first_row, int64_t end_row);
int64_t linear_scratch_floats();
int64_t most_rows(const PackedWeight& weight);
void linear(const LinearCall& call, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel,
            float* scratch);
void embed(const EmbedCall& call, int64_t first_row, int64_t end_row);
void add(float* x, const float* y, float scale, int64_t first, int64_t end);
void rms_norm(const NormCall& call, int64_t first_row, int64_t end_row);
void layer_norm(const NormCall& call, int64_t first_row, int64_t end_row);
void rope_write_kv(const RopeCall& call, int64_t first_token, int64_t end_token);
int64_t attention_scratch_floats(int64_t head_dim);
void attention(const AttentionCall& call);
void merge_partials(const float* partials, int64_t num_partials, int64_t num_rows, int64_t head_dim, float* out);
float block_maxima(const float* logits, int64_t size, float* maxima);
void block_weights(const float* logits, int64_t size, float highest, float sharpness, double* sums);
int64_t gather(const float* logits, int64_t size, const float* maxima, float highest, float sharpness, float threshold,
               Candidate* out);
float read_all(const float* from, int64_t size);
int64_t multiply_add(int64_t num_rounds, float* out);
int64_t multiply_add_pairs(int64_t num_rounds, float* out);
int64_t multiply_add_bytes(int64_t num_rounds, float* out);

const Kernels kernels = {
    PENSTOCK_TEXT(PENSTOCK_ISA),
    kPanel,
    kShortens,
    panel_bytes_of,
    pack_panel,
    rounded_row_bytes,
    round_activations,
    linear_scratch_floats,
    most_rows,
    linear,
    embed,
    add,
    rms_norm,
    layer_norm,
    rope_write_kv,
    attention_scratch_floats,
    attention,
    merge_partials,
    block_maxima,
    block_weights,
    gather,
    read_all,
    multiply_add,
    multiply_add_pairs,
    multiply_add_bytes,
};

}  // namespace penstock::PENSTOCK_ISA
