// From a row of logits to a token, or to the likeliest few. Compiled once: only the passes over whole rows are written
// for each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../native/kernels.h"

namespace penstock {

// How one row becomes a token; see `reference.py` for what each means.
struct Sampling {
    double number;      // in [0, 1)
    float temperature;  // 0: the likeliest
    int64_t top_k;      // 0: all
    double top_p;
    double min_p;
};

// The order of likelihood: the lower token of two as likely goes first.
inline bool precedes(const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

inline double weigh(const Candidate* candidates, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += candidates[i].weight;
    return total;
}

// Puts the shortest run of the likeliest whose weights add up to what `reached` asks for first, its least likely member
// last, and returns its length; all of them if it never does. Like a quicksort that only looks where the end can be.
template <class Reached>
int64_t take(Candidate* candidates, int64_t count, Reached&& reached) {
    double total = 0;
    int64_t begin = 0, end = count;
    while (end - begin > 64) {
        Candidate a = candidates[begin], pivot = candidates[begin + (end - begin) / 2], b = candidates[end - 1];
        if (precedes(b, a)) std::swap(a, b);
        pivot = precedes(pivot, a) ? a : precedes(b, pivot) ? b : pivot;  // neither the first nor the last
        Candidate* const middle = std::partition(candidates + begin, candidates + end,
                                                 [&](const Candidate& c) { return !precedes(pivot, c); });
        const int64_t cut = middle - candidates;
        const double here = weigh(candidates + begin, cut - begin);
        if (reached(total + here)) {
            end = cut;
        } else {
            total += here;
            begin = cut;
        }
    }
    std::sort(candidates + begin, candidates + end, precedes);
    for (int64_t i = begin; i < end; ++i) {
        total += candidates[i].weight;
        if (reached(total)) return i + 1;
    }
    return end;
}

// One row, and room to work on it.
class Row {
   public:
    static int64_t num_blocks(int64_t size) { return (size + kLogitBlock - 1) / kLogitBlock; }

    static int64_t scratch_floats(int64_t size) {
        constexpr int64_t kCandidate = sizeof(Candidate) / sizeof(float), kDouble = sizeof(double) / sizeof(float);
        return (2 + kDouble) * num_blocks(size) + kCandidate * (size + 1) + 2;
    }

    Row(const Kernels& kernels, const float* logits, int64_t size, float* scratch)
        : kernels_(kernels), logits_(logits), size_(size), num_blocks_(num_blocks(size)) {
        sums_ = reinterpret_cast<double*>(scratch);
        candidates_ = reinterpret_cast<Candidate*>(sums_ + num_blocks_);
        maxima_ = reinterpret_cast<float*>(candidates_ + size + 1);
        ordered_ = maxima_ + num_blocks_;
        highest_ = kernels.block_maxima(logits, size, maxima_);
    }

    bool is_finite() const { return std::isfinite(highest_); }

    // The likeliest token, the first of those.
    int64_t best() const {
        int64_t block = 0;
        while (maxima_[block] != highest_) ++block;
        int64_t token = block * kLogitBlock;
        while (logits_[token] != highest_) ++token;
        return token;
    }

    int64_t draw(const Sampling& how) {
        if (how.temperature == 0) return best();
        const float sharpness = 1.0f / how.temperature;
        const int64_t top_k = how.top_k < size_ ? how.top_k : 0;
        if (!how.top_k && how.top_p >= 1 && how.min_p <= 0) return draw_whole(how.number, sharpness);
        int64_t count = gather(top_k, how, sharpness);
        double whole = total_;
        if (top_k) {
            if (top_k < count) {
                std::nth_element(candidates_, candidates_ + top_k - 1, candidates_ + count, precedes);
                count = top_k;
            }
            whole = weigh(candidates_, count);
        }
        if (how.top_p < 1) count = take(candidates_, count, [&](double total) { return total >= how.top_p * whole; });
        if (how.min_p > 0)
            count = std::partition(candidates_, candidates_ + count,
                                   [&](const Candidate& c) { return c.weight >= how.min_p; }) -
                    candidates_;
        const double target = how.number * weigh(candidates_, count);
        return candidates_[take(candidates_, count, [&](double total) { return total > target; }) - 1].token;
    }

    // Writes the `count` likeliest tokens and their logits, -1 where fewer are finite, and returns the logarithm of the
    // sum of e^logit.
    double top(int64_t count, int32_t* tokens, float* logits) {
        std::fill(tokens, tokens + count, -1);
        if (count) {
            // A sharpness of zero weighs all finite ones alike.
            const int64_t found = kernels_.gather(logits_, size_, maxima_, highest_, 0.0f, ranked(count), candidates_);
            for (int64_t i = 0; i < found; ++i) candidates_[i].weight = logits_[candidates_[i].token];
            count = std::min(count, found);
            std::partial_sort(candidates_, candidates_ + count, candidates_ + found, precedes);
            for (int64_t i = 0; i < count; ++i) {
                tokens[i] = candidates_[i].token;
                logits[i] = candidates_[i].weight;
            }
        }
        return highest_ + std::log(add_up(1.0f));
    }

   private:
    double add_up(float sharpness) {
        kernels_.block_weights(logits_, size_, highest_, sharpness, sums_);
        double total = 0;
        for (int64_t i = 0; i < num_blocks_; ++i) total += sums_[i];
        return total;
    }

    // A logit that at least `rank` tokens reach, and few more: that many blocks have one.
    float ranked(int64_t rank) {
        if (rank > num_blocks_) return -std::numeric_limits<float>::infinity();
        std::copy(maxima_, maxima_ + num_blocks_, ordered_);
        std::nth_element(ordered_, ordered_ + rank - 1, ordered_ + num_blocks_, std::greater<float>());
        return ordered_[rank - 1];
    }

    // Collects every token that top_k, top_p and min_p can leave, and returns how many.
    int64_t gather(int64_t top_k, const Sampling& how, float sharpness) {
        // A little lower than what min_p asks for, which is decided on the weights themselves; top_p's share is of all
        // that top_k leaves, be it likely or not.
        const float least = how.min_p > 0 && !top_k ? highest_ + (std::log(how.min_p) - 1e-3) / sharpness
                                                    : -std::numeric_limits<float>::infinity();
        if (!top_k && how.top_p < 1) total_ = add_up(sharpness);
        for (const int64_t rank : {std::max<int64_t>(top_k, 64), num_blocks_, size_}) {
            const bool is_last = rank == size_ || (!top_k && how.top_p >= 1);
            const float threshold = is_last ? least : std::max(least, ranked(rank));
            const int64_t count =
                kernels_.gather(logits_, size_, maxima_, highest_, sharpness, threshold, candidates_);
            if (threshold == least || (top_k ? count >= top_k : weigh(candidates_, count) >= how.top_p * total_))
                return count;
        }
        return 0;  // not reached: the last round's threshold is the least
    }

    int64_t draw_whole(double number, float sharpness) {
        double target = number * add_up(sharpness);
        int64_t block = -1;
        for (int64_t i = 0; i < num_blocks_ && (block < 0 || target >= sums_[block]); ++i) {
            if (!(sums_[i] > 0)) continue;
            if (block >= 0) target -= sums_[block];
            block = i;
        }
        const int64_t begin = block * kLogitBlock, end = std::min(size_, begin + kLogitBlock);
        const int64_t count = kernels_.gather(logits_ + begin, end - begin, maxima_ + block, highest_, sharpness,
                                              -std::numeric_limits<float>::infinity(), candidates_);
        double total = 0;
        int64_t i = 0;
        while (i + 1 < count && (total += candidates_[i].weight) <= target) ++i;
        return begin + candidates_[i].token;
    }

    const Kernels& kernels_;
    const float* logits_;
    int64_t size_, num_blocks_;
    double* sums_;
    Candidate* candidates_;
    float* maxima_;
    float* ordered_;
    float highest_;
    double total_ = 0;
};

}  // namespace penstock
