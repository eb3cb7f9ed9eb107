// What a panel's sums become: row scale, bias, activation and addition, at their place in `out`.
#pragma once

#include "panels.h"

namespace penstock::PENSTOCK_ISA {

inline vf activated(Activation activation, vf x) {
    switch (activation) {
        case Activation::kNone:
            return x;
        case Activation::kSilu:
            return silu(x);
        case Activation::kGeluTanh:
            return gelu_tanh(x);
        case Activation::kGelu:
            return gelu(x);
        case Activation::kQuickGelu:
            return quick_gelu(x);
    }
    return x;
}

// What is stored might be anything, for all that compilers know: what stays the same is read once.
class Finish {
   public:
    Finish(const LinearCall& call, int64_t panel)
        : gated_(call.weight->gated),
          has_bias_(call.weight->bias),
          activation_(call.weight->activation),
          stride_(call.out_stride) {
        const int64_t width = gated_ ? W : kPanel, first = panel * width;
        num_outputs_ = min(width, call.weight->num_outputs - first);
        is_whole_ = num_outputs_ == width;
        if (has_bias_)
            for (int h = 0; h < 2; ++h) bias_[h] = load(call.weight->bias + panel * kPanel + h * W);
        out_ = call.out + first;
        added_ = call.added ? call.added + first : nullptr;
    }

    // `row` is one of the call's.
    inline __attribute__((always_inline)) void operator()(vf (&halves)[2], int64_t row) const {
        float* const out = out_ + row * stride_;
        const float* const added = added_ + row * stride_;
        if (has_bias_) {
            halves[0] += bias_[0];
            halves[1] += bias_[1];
        }
        if (gated_) {
            halves[0] = activated(activation_, halves[0]) * halves[1];
        } else if (activation_ != Activation::kNone) {
            for (vf& half : halves) half = activated(activation_, half);
        }
        if (is_whole_) {
            if (added_) {
                halves[0] += load(added);
                if (!gated_) halves[1] += load(added + W);
            }
            store(out, halves[0]);
            if (!gated_) store(out + W, halves[1]);
        } else {
            float values[kPanel];
            store(values, halves[0]);
            store(values + W, halves[1]);
            for (int64_t n = 0; n < num_outputs_; ++n) out[n] = values[n] + (added_ ? added[n] : 0.0f);
        }
    }

   private:
    bool gated_;
    bool has_bias_;
    bool is_whole_;
    Activation activation_;
    int64_t stride_;
    int64_t num_outputs_;
    vf bias_[2] = {};
    float* out_;
    const float* added_;
};

}  // namespace penstock::PENSTOCK_ISA
