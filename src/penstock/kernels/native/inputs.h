// What differs from step to step, from Python's lists to where a recorded pass reads it.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace penstock {

// The tensors of one `BatchLayout` and the token ids, with room for `max_tokens` in as many sequences.
class StepInputs {
   public:
    StepInputs(int64_t max_tokens, int64_t table_width, int64_t block_size, uintptr_t token_ids, uintptr_t positions,
               uintptr_t slots, uintptr_t query_starts, uintptr_t context_lens, uintptr_t tables, uintptr_t table_starts);

    // Writes what `BatchLayout.pack` would make of the same; `tables` are arrays of 32-bit integers. A sequence's positions
    // are its tokens' places in it plus its offset, if there are `position_offsets`. Throws std::invalid_argument if they
    // do not fit together or into the room.
    void load(nanobind::list token_ids, nanobind::list query_lens, nanobind::list context_lens, nanobind::list tables,
              nanobind::list table_starts, std::optional<nanobind::list> position_offsets);

    // Whether these are the inputs of a step of one token for each sequence, as `load` would write them, where it matters.
    bool are(nanobind::list token_ids, nanobind::list query_lens, nanobind::list context_lens, nanobind::list tables,
             nanobind::list table_starts, std::optional<nanobind::list> position_offsets) const;

    // Whether every table has a place for one token more.
    bool has_room(int64_t num_sequences) const;
    // Takes the next step's tokens in, one for each sequence.
    void go_on(const int64_t* tokens, int64_t num_sequences);

   private:
    int64_t max_tokens_, table_width_, block_size_;
    int64_t* token_ids_;
    int64_t* positions_;
    int64_t* slots_;
    int32_t* query_starts_;
    int32_t* context_lens_;
    int32_t* tables_;
    int32_t* table_starts_;
    std::vector<int64_t> table_sizes_;
    int64_t num_sequences_ = 0;
};

}  // namespace penstock
