#include "inputs.h"

#include <algorithm>
#include <stdexcept>

namespace nb = nanobind;

namespace penstock {
namespace {

// One sequence's block ids, for as long as this lives.
class Table {
   public:
    explicit Table(nb::handle table) {
        if (PyObject_GetBuffer(table.ptr(), &buffer_, PyBUF_FORMAT | PyBUF_ND) != 0) nb::raise_python_error();
        const char* const format = buffer_.format;
        if (buffer_.itemsize != sizeof(int32_t) || buffer_.ndim != 1 || !format || (format[0] != 'i' && format[0] != 'l')) {
            PyBuffer_Release(&buffer_);
            throw std::invalid_argument("a block table is an array of 32-bit integers");
        }
    }
    ~Table() { PyBuffer_Release(&buffer_); }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    int64_t size() const { return buffer_.len / static_cast<int64_t>(sizeof(int32_t)); }
    const int32_t* ids() const { return static_cast<const int32_t*>(buffer_.buf); }

   private:
    Py_buffer buffer_;
};

int64_t integer(nb::handle list, size_t at) {
    return nb::cast<int64_t>(nb::handle(PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(at))));
}

void check(bool holds) {
    if (!holds) throw std::invalid_argument("the step's lists do not fit together, or not into what was recorded");
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

StepInputs::StepInputs(int64_t max_tokens, int64_t table_width, int64_t block_size, uintptr_t token_ids,
                       uintptr_t positions, uintptr_t slots, uintptr_t query_starts, uintptr_t context_lens,
                       uintptr_t tables, uintptr_t table_starts)
    : max_tokens_(max_tokens),
      table_width_(table_width),
      block_size_(block_size),
      token_ids_(at<int64_t>(token_ids)),
      positions_(at<int64_t>(positions)),
      slots_(at<int64_t>(slots)),
      query_starts_(at<int32_t>(query_starts)),
      context_lens_(at<int32_t>(context_lens)),
      tables_(at<int32_t>(tables)),
      table_starts_(at<int32_t>(table_starts)),
      table_sizes_(max_tokens) {}

void StepInputs::load(nb::list token_ids, nb::list query_lens, nb::list context_lens, nb::list tables,
                      nb::list table_starts, std::optional<nb::list> position_offsets) {
    const size_t num_tokens = token_ids.size(), num_sequences = query_lens.size();
    num_sequences_ = 0;  // until all fits
    check(num_tokens <= static_cast<size_t>(max_tokens_) && num_sequences <= num_tokens);
    check(context_lens.size() == num_sequences && tables.size() == num_sequences && table_starts.size() == num_sequences);
    check(!position_offsets || position_offsets->size() == num_sequences);
    for (size_t t = 0; t < num_tokens; ++t) token_ids_[t] = integer(token_ids, t);
    int64_t row = 0;
    query_starts_[0] = 0;
    for (size_t s = 0; s < num_sequences; ++s) {
        const int64_t num_queries = integer(query_lens, s), context = integer(context_lens, s);
        const int64_t start = integer(table_starts, s), end = row + num_queries;
        const int64_t position_offset = position_offsets ? integer(*position_offsets, s) : 0;
        const Table table(PyList_GET_ITEM(tables.ptr(), static_cast<Py_ssize_t>(s)));
        check(num_queries > 0 && start >= 0 && context - num_queries >= start && end <= static_cast<int64_t>(num_tokens));
        check(table.size() <= table_width_ && context - start <= table.size() * block_size_);
        std::copy_n(table.ids(), table.size(), tables_ + s * table_width_);
        for (int64_t position = context - num_queries; row < end; ++row, ++position) {
            const int64_t offset = position - start;
            positions_[row] = position + position_offset;
            slots_[row] = int64_t{table.ids()[offset / block_size_]} * block_size_ + offset % block_size_;
        }
        query_starts_[s + 1] = static_cast<int32_t>(row);
        context_lens_[s] = static_cast<int32_t>(context);
        table_starts_[s] = static_cast<int32_t>(start);
        table_sizes_[s] = table.size();
    }
    check(row == static_cast<int64_t>(num_tokens));
    num_sequences_ = static_cast<int64_t>(num_sequences);
}

bool StepInputs::are(nb::list token_ids, nb::list query_lens, nb::list context_lens, nb::list tables,
                     nb::list table_starts, std::optional<nb::list> position_offsets) const {
    const size_t num_sequences = query_lens.size();
    if (token_ids.size() != num_sequences || static_cast<int64_t>(num_sequences) != num_sequences_) return false;
    check(context_lens.size() == num_sequences && tables.size() == num_sequences && table_starts.size() == num_sequences);
    check(!position_offsets || position_offsets->size() == num_sequences);
    for (size_t s = 0; s < num_sequences; ++s) {
        const int64_t context = integer(context_lens, s), start = integer(table_starts, s);
        const int64_t position_offset = position_offsets ? integer(*position_offsets, s) : 0;
        if (token_ids_[s] != integer(token_ids, s) || integer(query_lens, s) != 1 || context_lens_[s] != context ||
            table_starts_[s] != start || positions_[s] != context - 1 + position_offset)
            return false;
        const Table table(PyList_GET_ITEM(tables.ptr(), static_cast<Py_ssize_t>(s)));
        const int64_t num_blocks = (context - start + block_size_ - 1) / block_size_;
        if (table.size() < num_blocks || !std::equal(table.ids(), table.ids() + num_blocks, tables_ + s * table_width_))
            return false;
    }
    return true;
}

bool StepInputs::has_room(int64_t num_sequences) const {
    for (int64_t s = 0; s < num_sequences; ++s)
        if (context_lens_[s] - table_starts_[s] >= table_sizes_[s] * block_size_) return false;
    return true;
}

void StepInputs::go_on(const int64_t* tokens, int64_t num_sequences) {
    for (int64_t s = 0; s < num_sequences; ++s) {
        const int64_t offset = context_lens_[s] - table_starts_[s];
        token_ids_[s] = tokens[s];
        positions_[s] += 1;
        slots_[s] = int64_t{tables_[s * table_width_ + offset / block_size_]} * block_size_ + offset % block_size_;
        context_lens_[s] += 1;
    }
}

}  // namespace penstock
