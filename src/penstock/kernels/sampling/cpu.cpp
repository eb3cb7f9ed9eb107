// Passes over a row of logits. Which tokens are looked at, and what is done with them, is `draw.h`'s.
#include "../native/kernels.h"
#include "../native/simd.h"

namespace penstock::PENSTOCK_ISA {

float block_maxima(const float* logits, int64_t size, float* maxima) {
    const vf lowest = splat(-__builtin_inff());
    vf all = lowest;
    vi is_odd = {};  // where something was not a number
    for (int64_t begin = 0; begin < size; begin += kLogitBlock) {
        const int64_t end = min(begin + kLogitBlock, size);
        vf highest_of[2] = {lowest, lowest};
        int64_t i = begin;
        for (; i + 2 * W <= end; i += 2 * W)
            for (int j = 0; j < 2; ++j) {
                const vf v = load(logits + i + j * W);
                is_odd |= v != v;
                highest_of[j] = max(v, highest_of[j]);
            }
        for (; i < end; ++i) {
            const vf v = splat(logits[i]);
            is_odd |= v != v;
            highest_of[0] = max(v, highest_of[0]);
        }
        const vf found = max(highest_of[0], highest_of[1]);
        *maxima++ = highest(found);
        all = max(found, all);
    }
    for (int j = 0; j < W; ++j)
        if (is_odd[j]) return __builtin_nanf("");
    return highest(all);
}

void block_weights(const float* logits, int64_t size, float highest_logit, float sharpness, double* sums) {
    const vf top = splat(highest_logit), sharp = splat(sharpness);
    for (int64_t begin = 0; begin < size; begin += kLogitBlock) {
        const int64_t end = min(begin + kLogitBlock, size);
        vf total = {};
        int64_t i = begin;
        for (; i + W <= end; i += W) total += exp((load(logits + i) - top) * sharp);
        double rest = 0;
        for (; i < end; ++i) rest += exp((logits[i] - highest_logit) * sharpness);
        for (int j = 0; j < W; ++j) rest += total[j];
        *sums++ = rest;
    }
}

int64_t gather(const float* logits, int64_t size, const float* maxima, float highest_logit, float sharpness,
               float threshold, Candidate* out) {
    const vf top = splat(highest_logit), sharp = splat(sharpness), least = splat(threshold);
    int64_t num_found = 0;
    for (int64_t begin = 0; begin < size; begin += kLogitBlock, ++maxima) {
        if (!(*maxima >= threshold)) continue;
        const int64_t end = min(begin + kLogitBlock, size);
        int64_t i = begin;
        for (; i + W <= end; i += W) {
            const vf v = load(logits + i);
            if (!(highest(v) >= threshold)) continue;
            const vf weights = v >= least ? exp((v - top) * sharp) : vf{};
            for (int j = 0; j < W; ++j) {
                // Written in any case and kept if it counts: cheaper than a branch nobody can predict.
                out[num_found] = {weights[j], (int32_t)(i + j)};
                num_found += weights[j] > 0;
            }
        }
        for (; i < end; ++i) {
            out[num_found] = {logits[i] >= threshold ? exp((logits[i] - highest_logit) * sharpness) : 0.0f, (int32_t)i};
            num_found += out[num_found].weight > 0;
        }
    }
    return num_found;
}

}  // namespace penstock::PENSTOCK_ISA
