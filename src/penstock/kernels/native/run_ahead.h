// Decoding that does not wait for Python: the next step is begun with the tokens just drawn, before anybody has looked
// at them. What Python does between two steps it then does beside the second.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "inputs.h"
#include "tape.h"

namespace penstock {

// One thread asks; the steps run on another, which starts with the first. A step is of one token for each sequence.
class RunAhead {
   public:
    // The tokens of the rows of the step that ran, drawn as `how` says; a negative one where there is none.
    using Draw = std::function<std::vector<int64_t>(int64_t num_rows, const std::string& how)>;

    // A step runs `passes` one after another, over what is in `inputs`.
    RunAhead(std::vector<const Tape*> passes, StepInputs* inputs, Draw draw)
        : passes_(std::move(passes)), inputs_(inputs), draw_(std::move(draw)) {}
    ~RunAhead();
    RunAhead(const RunAhead&) = delete;
    RunAhead& operator=(const RunAhead&) = delete;

    // Begins the step that was loaded into the inputs; false where the system refuses a thread for it. None runs.
    bool begin(int64_t num_sequences);

    // Returns the tokens of the step that was begun, and throws what it threw. If it `goes_on` and there is a token for
    // each sequence and room for it in the sequence's table, the step with these tokens has then begun.
    std::vector<int64_t> draw(const std::string& how, bool goes_on);

    // Whether a step has begun whose tokens were not drawn.
    bool has_begun() const;

    // Gives such a step up, and returns when nothing runs.
    void stop();

   private:
    struct Wish {
        std::string how;
        bool goes_on;
    };

    void work();
    std::exception_ptr run();
    bool draw_as(const Wish& wish, std::exception_ptr& failure);

    const std::vector<const Tape*> passes_;
    StepInputs* const inputs_;
    const Draw draw_;
    mutable std::mutex mutex_;
    std::condition_variable asked_, answered_;
    std::thread thread_;
    int64_t num_sequences_ = 0;
    bool has_begun_ = false;
    std::atomic<bool> is_unwanted_{false};
    bool is_closing_ = false;
    std::optional<Wish> wish_;
    std::vector<int64_t> tokens_;
    std::exception_ptr failure_;  // of the step that a wish was for
};

}  // namespace penstock
