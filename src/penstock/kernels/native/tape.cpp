#include "tape.h"

#include <chrono>
#include <stdexcept>
#include <utility>

namespace penstock {
namespace {

thread_local Tape* recording_here = nullptr;

}  // namespace

Tape::Tape(int64_t max_rows, int64_t max_sequences, const Tape* goes_on_from)
    : most_{max_rows, max_sequences},
      turns_(goes_on_from ? goes_on_from->turns_ : std::make_shared<ThreadTurns>()),
      begins_(!goes_on_from) {}

void Tape::begin() {
    if (recording_here) throw std::invalid_argument("a tape is being recorded already");
    ops_.clear();
    last_.reset();
    recording_here = this;
}

void Tape::end() { recording_here = nullptr; }

void Tape::add(Op op) {
    ops_.push_back(std::move(op));
    last_.reset();
}

std::optional<RowsOp> Tape::take_last(const void* out, int64_t width) {
    if (!last_ || last_->out != out || last_->width != width) return std::nullopt;
    ops_.pop_back();
    return std::exchange(last_, std::nullopt);
}

void Tape::run(int64_t num_rows, int64_t num_sequences, const std::atomic<bool>* is_unwanted) const {
    if (num_rows < 0 || num_rows > most_.num_rows || num_sequences < 0 || num_sequences > most_.num_sequences)
        throw std::invalid_argument("the step is larger than what was recorded");
    const bool has_choice = leaves_threads(num_rows);
    if (begins_) turns_->begin_step(has_choice);
    if (has_choice && turns_->takes_all()) {
        take_all_threads();
    } else {
        take_threads_for(num_rows);
    }
    const auto began = std::chrono::steady_clock::now();
    const StepSize size{num_rows, num_sequences};
    for (const Op& op : ops_) {
        if (is_unwanted && *is_unwanted) return turns_->abandon_step();
        op(size);
    }
    turns_->add(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
}

void ThreadTurns::begin_step(bool has_choice) {
    if (counts_) note(step_seconds_);
    counts_ = has_choice;
    step_seconds_ = 0.0;
}

void ThreadTurns::note(double seconds) {
    if (num_steps_ < kTrial) {
        if (num_steps_ == 0) num_won_ = 0;
        if (num_steps_ % kTurn != 0) seconds_[num_steps_ / kTurn % 2] += seconds;
        if (num_steps_ % (2 * kTurn) == 2 * kTurn - 1) {
            num_won_ += seconds_[1] < kWorthIt * seconds_[0];
            seconds_[0] = seconds_[1] = 0.0;
        }
        if (num_steps_ == kTrial - 1) all_are_faster_ = num_won_ > kPairs / 2;
    }
    if (++num_steps_ == kTrial + kUntilNext) num_steps_ = 0;
}

Tape* Tape::recording() { return recording_here; }

void check_recordable(int64_t size, int64_t most) {
    if (size != most) throw std::invalid_argument("only ops over whole steps can be recorded");
}

}  // namespace penstock
