// A forward pass recorded once and repeated in one call. A decoder's ops are the same every step; only how many rows and
// sequences they are for differs.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace penstock {

struct StepSize {
    int64_t num_rows;
    int64_t num_sequences;
};

// An op that writes the rows [T, width] of `out`, each by itself; `write` does rows [first, end).
struct RowsOp {
    const void* out;
    int64_t width;
    std::function<void(int64_t first, int64_t end)> write;
};

// Whether steps over few rows are faster on all threads, found out by turns. On some machines all cores but one read memory as
// fast as all do, and the last one is better left to who else needs it; on others each core gets a share and no more.
class ThreadTurns {
   public:
    // Ends the step before. One that has no choice is not counted, nor is one that was abandoned.
    void begin_step(bool has_choice);
    void abandon_step() { counts_ = false; }
    // What the step takes.
    bool takes_all() const { return num_steps_ < kTrial ? num_steps_ / kTurn % 2 == 1 : all_are_faster_; }
    void add(double seconds) { step_seconds_ += seconds; }

   private:
    void note(double seconds);

    static constexpr int kTurn = 8;  // steps, of which the first is not counted: threads wake up
    static constexpr int kPairs = 7;
    static constexpr int kTrial = 2 * kTurn * kPairs;
    static constexpr int kUntilNext = 8192;  // steps from trial to trial: who shares the machine comes and goes
    static constexpr double kWorthIt = 0.97;

    bool counts_ = false;
    double step_seconds_ = 0.0;
    int num_steps_ = 0;       // since the trial began
    double seconds_[2] = {};  // of the pair of turns that is on
    int num_won_ = 0;         // pairs in which all threads were faster
    bool all_are_faster_ = false;
};

// Ops in their order, for steps of any size up to that of the recording. Their addresses stay those of the recording;
// whoever recorded keeps what lies there. One thread at a time.
class Tape {
   public:
    using Op = std::function<void(const StepSize&)>;

    // A step is one tape, or goes on with another: all of it runs on the same threads.
    Tape(int64_t max_rows, int64_t max_sequences, const Tape* goes_on_from = nullptr);

    // From here to `end`, ops that the calling thread asks for are recorded and not done.
    void begin();
    void end();

    // Ends between two ops where it is unwanted. Throws std::invalid_argument for a step larger than the recording.
    void run(int64_t num_rows, int64_t num_sequences, const std::atomic<bool>* is_unwanted = nullptr) const;

    // The calling thread's, or null.
    static Tape* recording();

    const StepSize& most() const { return most_; }
    void add(Op op);

    // Says what the op added last does.
    void last_writes(RowsOp op) { last_ = std::move(op); }
    // Takes the op added last off, if it writes such rows: who reads them does it then, while they are in the cache.
    std::optional<RowsOp> take_last(const void* out, int64_t width);

   private:
    StepSize most_;
    std::vector<Op> ops_;
    std::optional<RowsOp> last_;
    std::shared_ptr<ThreadTurns> turns_;
    bool begins_;
};

// Throws std::invalid_argument: an op over something else than all rows, or all sequences, cannot be repeated.
void check_recordable(int64_t size, int64_t most);

// Has ops from here on run on as many threads as `num_rows` are worth, or on all.
void take_threads_for(int64_t num_rows);
void take_all_threads();
// Whether those are more.
bool leaves_threads(int64_t num_rows);

// Does op(num_rows), now or whenever the tape that is being recorded is run.
template <class F>
void for_rows(int64_t num_rows, F op) {
    Tape* const tape = Tape::recording();
    if (!tape) {
        take_threads_for(num_rows);
        return op(num_rows);
    }
    check_recordable(num_rows, tape->most().num_rows);
    tape->add([op](const StepSize& size) { op(size.num_rows); });
}

// Likewise op(num_sequences).
template <class F>
void for_sequences(int64_t num_sequences, F op) {
    Tape* const tape = Tape::recording();
    if (!tape) return op(num_sequences);
    check_recordable(num_sequences, tape->most().num_sequences);
    tape->add([op](const StepSize& size) { op(size.num_sequences); });
}

}  // namespace penstock
