// What Python sees. Addresses come as integers, because asking a tensor for its address takes a twentieth of the time
// of handing it over; `native/__init__.py` and the modules beside each kernel check what they point to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../sampling/draw.h"
#include "inputs.h"
#include "kernels.h"
#include "pool.h"
#include "run_ahead.h"
#include "tape.h"

namespace nb = nanobind;

namespace penstock {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

struct InstructionSet {
    const Kernels* kernels;
    bool runs;  // on this processor
};

#if defined(PENSTOCK_AMX)
// Asks for it: tiles make a thread's state that is to be saved larger by 8 KiB, so the system gives them to those who do
// (Linux, "Using XSTATE features in user space applications").
bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The fastest first.
const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> all = [] {
        std::vector<InstructionSet> sets;
#if defined(PENSTOCK_X86)
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(PENSTOCK_EMULATED)
        const bool emulated = avx2;
#else
        const bool emulated = false;
#endif
#if defined(PENSTOCK_AMX)
        sets.push_back({&amx::kernels, emulated || (avx512 && __builtin_cpu_supports("avx512vnni") &&
                                                    __builtin_cpu_supports("avx512bf16") && may_use_tiles())});
#endif
#if defined(PENSTOCK_AVX512BF16)
        sets.push_back({&avx512_bf16::kernels, emulated || (avx512 && __builtin_cpu_supports("avx512vnni") &&
                                                            __builtin_cpu_supports("avx512bf16"))});
#endif
#if defined(PENSTOCK_AVX512VNNI)
        sets.push_back({&avx512_vnni::kernels, emulated || (avx512 && __builtin_cpu_supports("avx512vnni"))});
#endif
        sets.push_back({&avx512::kernels, emulated || avx512});
#if defined(PENSTOCK_AVXVNNI)
        sets.push_back({&avx2_vnni::kernels, emulated || (avx2 && __builtin_cpu_supports("avxvnni"))});
#endif
        sets.push_back({&avx2::kernels, avx2});
#endif
        sets.push_back({&portable::kernels, true});
        return sets;
    }();
    return all;
}

const InstructionSet* find(const std::string& name) {
    for (const InstructionSet& set : instruction_sets())
        if (set.kernels->name == name) return &set;
    return nullptr;
}

// Products of so many rows take longer to compute than their weights to come from memory, in 4 bits or 16.
constexpr int64_t kManyRows = 8;

// The kernels, the threads they run on and their scratch. One op at a time.
class Machine {
   public:
    static Machine& get() {
        static Machine* machine = new Machine;  // never destroyed: threads may outlive the module's teardown
        return *machine;
    }

    const Kernels& kernels() const { return *kernels_; }

    void choose(const std::string& isa) {
        const InstructionSet* found = find(isa);
        if (!found) throw std::invalid_argument("the " + isa + " kernels were not built");
        if (!found->runs) throw std::invalid_argument("this processor cannot run the " + isa + " kernels");
        std::lock_guard lock(mutex_);
        kernels_ = found->kernels;
        scratch_.clear();
        scratch_.resize(pool_->num_threads());
    }

    // Those that ops run on now.
    int num_threads() const { return num_threads_; }
    int num_threads(int64_t num_rows) const { return num_rows < kManyRows ? few_rows_threads_ : many_rows_threads_; }

    void set_num_threads(int num_threads, int few_rows_threads, const std::vector<int>& cpus) {
        if (few_rows_threads < 1) throw std::invalid_argument("at least one thread is needed");
        if (few_rows_threads > num_threads) throw std::invalid_argument("few rows take no more threads than many");
        std::lock_guard lock(mutex_);
        if (num_threads != pool_->num_threads() || cpus != cpus_) {
            pool_ = std::make_unique<Pool>(num_threads, cpus);  // the old one stays where the system refuses a thread
            cpus_ = cpus;
            scratch_.clear();
            scratch_.resize(num_threads);
        }
        pool_->use(num_threads);
        num_threads_ = many_rows_threads_ = num_threads;
        few_rows_threads_ = few_rows_threads;
    }

    // Has ops from here on run on as many threads as `num_rows` are worth.
    void take_threads_for(int64_t num_rows) {
        if (num_threads(num_rows) == num_threads_) return;
        std::lock_guard lock(mutex_);
        num_threads_ = num_threads(num_rows);  // of the pool that there is now
        pool_->use(num_threads_);
    }

    // body(task, scratch of the thread it runs on); the scratch has room for `scratch_floats`.
    template <class F>
    void each(int64_t num_tasks, int64_t scratch_floats, F&& body, Pool::Order order = Pool::Order::kAsNumbered) {
        std::lock_guard lock(mutex_);
        for (Scratch& scratch : scratch_) scratch.grow(scratch_floats);
        pool_->each(num_tasks, order, [&](int64_t task, int thread) { body(task, scratch_[thread].floats.get()); });
    }

   private:
    struct Free {
        void operator()(float* floats) const { std::free(floats); }
    };
    struct Scratch {
        std::unique_ptr<float[], Free> floats;
        int64_t size = 0;
        void grow(int64_t to) {
            if (to <= size) return;
            size = 0;  // there may be no room for more, and the next op asks anew
            const size_t bytes = (to * sizeof(float) + 63) / 64 * 64;
            floats.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (!floats) throw std::bad_alloc();
            size = to;
        }
    };

    Machine() : pool_(std::make_unique<Pool>(1)), scratch_(1) {
        for (const InstructionSet& set : instruction_sets())
            if (!kernels_ && set.runs) kernels_ = set.kernels;
    }

    const Kernels* kernels_ = nullptr;
    std::unique_ptr<Pool> pool_;
    std::vector<int> cpus_;
    std::atomic<int> num_threads_{1};  // read without the lock, to cut work into parts
    std::atomic<int> many_rows_threads_{1}, few_rows_threads_{1};
    std::vector<Scratch> scratch_;
    std::mutex mutex_;
};

// Rows a task takes when each has `width` elements to look at.
int64_t rows_each(int64_t num_rows, int64_t width) {
    const int64_t least = std::max<int64_t>(1, 4096 / std::max<int64_t>(width, 1));
    return std::max(least, ceil_div(num_rows, Machine::get().num_threads() * 4));
}

// body(first row, end row) for parts of `num_rows` rows that each have `width` elements to look at.
template <class F>
void by_rows(int64_t num_rows, int64_t width, F&& body) {
    const int64_t each = rows_each(num_rows, width);
    Machine::get().each(ceil_div(num_rows, each), 0, [&](int64_t task, float*) {
        body(task * each, std::min((task + 1) * each, num_rows));
    });
}

// Zeroed memory in huge pages: weights are read from front to back once a step, and translating 4 KiB addresses halves
// the speed of that. Most matrices are smaller than such a page or end within one, so they lie one after another in
// shared stretches, each of which is given back when nothing in it is left.
class HugePages {
   public:
    explicit HugePages(size_t bytes) {
        constexpr size_t kStretch = size_t{64} << 20, kLine = 64;
        static std::mutex mutex;
        static std::weak_ptr<Stretch> open;
        bytes = (bytes + kLine - 1) / kLine * kLine;
        std::lock_guard lock(mutex);
        stretch_ = open.lock();
        if (!stretch_ || stretch_->size - stretch_->used < bytes) {
            stretch_ = std::make_shared<Stretch>(std::max(bytes, kStretch));
            if (bytes < kStretch) open = stretch_;
        }
        data_ = static_cast<char*>(stretch_->begin) + stretch_->used;
        size_ = bytes;
        stretch_->used += bytes;
    }
    char* data() const { return data_; }
    int64_t size() const { return size_; }

    // Has the system hand out a page, if it has not, while others may be writing to it.
    void touch(int64_t page) const {
        char* const begin = std::max(data_, first_page() + page * kPage);
        __atomic_fetch_or(begin, 0, __ATOMIC_RELAXED);
    }
    int64_t num_pages() const { return (data_ + size_ - first_page() + kPage - 1) / kPage; }

   private:
    static constexpr int64_t kPage = int64_t{2} << 20;

    char* first_page() const { return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(data_) / kPage * kPage); }

    struct Stretch {
        explicit Stretch(size_t bytes) : size(bytes), mapped_size(bytes + kPage) {
            mapped = mmap(nullptr, mapped_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (mapped == MAP_FAILED) throw std::bad_alloc();
            begin = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(mapped) + kPage - 1) / kPage * kPage);
            madvise(begin, size, MADV_HUGEPAGE);
        }
        ~Stretch() { munmap(mapped, mapped_size); }
        Stretch(const Stretch&) = delete;
        Stretch& operator=(const Stretch&) = delete;

        size_t size, mapped_size;
        size_t used = 0;
        void* mapped;
        void* begin;  // at the beginning of a huge page
    };

    std::shared_ptr<Stretch> stretch_;
    char* data_;
    size_t size_;
};

// Has the system hand out the pages of all of it, while others may be writing there.
void touch(const std::vector<std::pair<Address, int64_t>>& memory) {
    constexpr int64_t kPage = 4096;
    for (const auto& [first, num_bytes] : memory)
        for (int64_t offset = 0; offset < num_bytes; offset += kPage)
            __atomic_fetch_or(at<char>(first) + offset, 0, __ATOMIC_RELAXED);
}

// A matrix in panels. Whoever comes packs some of them, on any thread, until none is left; the source has to stay where it
// is until then. One that is a file's, mapped privately and never written to, is no longer in memory after it.
class PackedMatrix {
   public:
    using Part = std::pair<Address, int64_t>;

    PackedMatrix(int64_t num_outputs, int64_t num_inputs, int kind, int64_t group, bool int8_activations, int source_kind,
                 const std::vector<Part>& parts, Address up, Address scales, Address up_scales, Address zeros,
                 Address up_zeros, float input_scale, float input_zero, bool is_mapped)
        : kernels_(Machine::get().kernels()),
          is_mapped_(is_mapped),
          panel_outputs_(up ? kernels_.panel_width / 2 : kernels_.panel_width),
          num_panels_(ceil_div(num_outputs, panel_outputs_)),
          packed_{} {
        packed_.kind = static_cast<Weight>(kind);
        packed_.num_outputs = num_outputs;
        packed_.num_inputs = num_inputs;
        packed_.padded_inputs = padded(num_inputs, packed_.kind);
        packed_.group = group;
        packed_.int8_activations = int8_activations;
        packed_.input_scale = input_scale;
        packed_.input_zero = input_zero;
        packed_.gated = up != 0;
        packed_.has_short_scales = packed_.kind == Weight::kInt4 && static_cast<Weight>(source_kind) != Weight::kInt4;
        packed_.is_shortened = kernels_.shortens && packed_.kind == Weight::kBFloat16 && num_inputs % 4 == 0;
        if (zeros || up_zeros) {
            zeros_.resize(num_scales());
            packed_.zeros = zeros_.data();
        }
        take_memory();
        int64_t num_rows = 0;
        for (const auto& [rows, count] : parts) {
            parts_.push_back({at<const void>(rows), count});
            num_rows += count;
        }
        if (num_rows != num_outputs) throw std::invalid_argument("the parts have other rows than the matrix");
        source_ = {static_cast<Weight>(source_kind), parts_.data(),              (int64_t)parts_.size(),
                   at<const void>(up),               at<const float>(scales),    at<const float>(up_scales),
                   at<const uint8_t>(zeros),         at<const uint8_t>(up_zeros)};
    }
    PackedMatrix(const PackedMatrix&) = delete;
    PackedMatrix& operator=(const PackedMatrix&) = delete;

    const Kernels& kernels() const { return kernels_; }
    int64_t num_panels() const { return num_panels_; }
    int64_t num_bytes() const { return memory_->size() + zeros_.size(); }
    int64_t panel_outputs() const { return panel_outputs_; }
    int64_t num_places() const { return num_panels_ * kernels_.panel_width; }

    // Packs until every panel is taken, or until `stop`. First each thread has pages of its own handed out: several that
    // write to the same new one at once each wait for the system to zero a whole huge page, and all but one throw it away.
    void pack(const std::atomic<bool>& stop) {
        std::shared_lock lock(layout_mutex_);
        for (int64_t page; !stop && (page = next_page_.fetch_add(1)) < memory_->num_pages();) memory_->touch(page);
        for (int64_t panel; !stop && (panel = next_.fetch_add(1)) < num_panels_;) {
            if (fits_ && !kernels_.pack_panel(packed_, source_, panel)) fits_ = false;
            if (num_packed_.fetch_add(1) + 1 < num_panels_) continue;
            if (is_mapped_ && fits_) forget_source();
            is_through_ = true;
        }
    }

    // Returns it when all of it is packed, having helped. What cannot be shortened is packed again as it is.
    const PackedWeight& finish() {
        static const std::atomic<bool> never{false};
        Machine& machine = Machine::get();
        while (true) {
            if (next_ < num_panels_) machine.each(machine.num_threads(), 0, [&](int64_t, float*) { pack(never); });
            while (!is_through_) std::this_thread::yield();
            if (fits_) return packed_;
            std::unique_lock lock(layout_mutex_);
            packed_.is_shortened = false;
            take_memory();
            next_ = next_page_ = num_packed_ = 0;
            fits_ = true;
            is_through_ = false;
        }
    }

   private:
    int64_t num_scales() const { return packed_.group ? num_places() * packed_.num_groups() : 0; }

    void take_memory() {
        const int64_t panels_bytes = ceil_div(num_panels_ * kernels_.panel_bytes(packed_), 64) * 64;
        memory_.emplace(panels_bytes + num_scales() * (packed_.has_short_scales ? sizeof(uint16_t) : sizeof(float)));
        packed_.panels = memory_->data();
        if (packed_.group) packed_.scales = reinterpret_cast<float*>(memory_->data() + panels_bytes);
    }

    void forget_source() {
        const int64_t row_bytes = packed_.num_inputs * (source_.kind == Weight::kFloat32 ? 4 : 2);  // codes are not mapped
        for (const WeightPart& part : parts_) forget(part.rows, part.num_rows * row_bytes);
        if (source_.up) forget(source_.up, packed_.num_outputs * row_bytes);
    }

    // Whole pages alone: the others are somebody else's too.
    static void forget(const void* rows, int64_t num_bytes) {
        static const uintptr_t page = sysconf(_SC_PAGESIZE);
        const uintptr_t begin = (reinterpret_cast<uintptr_t>(rows) + page - 1) / page * page;
        const uintptr_t end = (reinterpret_cast<uintptr_t>(rows) + num_bytes) / page * page;
        if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }

    static int64_t padded(int64_t num_inputs, Weight kind) {
        const int64_t to = kind == Weight::kFloat32 ? 1 : kind == Weight::kBFloat16 ? 4 : kCodeInputs;
        return ceil_div(num_inputs, to) * to;
    }

    const Kernels& kernels_;
    bool is_mapped_;
    int64_t panel_outputs_;
    int64_t num_panels_;
    std::optional<HugePages> memory_;  // panels, and after them scales
    std::vector<uint8_t> zeros_;
    PackedWeight packed_;
    std::vector<WeightPart> parts_;
    WeightSource source_;
    std::atomic<int64_t> next_page_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int64_t> num_packed_{0};
    std::atomic<bool> fits_{true};
    std::atomic<bool> is_through_{false};  // with every panel
    std::shared_mutex layout_mutex_;       // shared by those who pack
};

// Threads of their own that pack matrices in their order, on cores that nobody else wants: the interpreter is importing
// meanwhile. They know nothing of Python.
class PackingThreads {
   public:
    PackingThreads(std::vector<std::shared_ptr<PackedMatrix>> matrices, int num_threads) : matrices_(std::move(matrices)) {
        try {
            for (int i = 0; i < num_threads; ++i)
                threads_.emplace_back([this] {
                    setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
                    for (const auto& matrix : matrices_) matrix->pack(stop_);
                });
        } catch (const std::system_error&) {
            // Fewer pack, or nobody does until a matrix is asked for.
        }
    }
    ~PackingThreads() { stop(); }
    PackingThreads(const PackingThreads&) = delete;
    PackingThreads& operator=(const PackingThreads&) = delete;

    // Returns when no thread reads a source any more; what is not packed stays so.
    void stop() {
        stop_ = true;
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
        matrices_.clear();  // what nobody took
    }

   private:
    static constexpr int kNice = 10;
    std::vector<std::shared_ptr<PackedMatrix>> matrices_;
    std::vector<std::thread> threads_;
    std::atomic<bool> stop_{false};
};

class PackedLinear {
   public:
    PackedLinear(std::shared_ptr<PackedMatrix> matrix, Address bias, Address up_bias, int activation)
        : matrix_(std::move(matrix)),
          kernels_(matrix_->kernels()),
          num_panels_(matrix_->num_panels()),
          packed_(matrix_->finish()) {
        packed_.activation = static_cast<Activation>(activation);
        if (bias) {
            const int64_t each = matrix_->panel_outputs();
            bias_.resize(matrix_->num_places());
            for (int64_t n = 0; n < packed_.num_outputs; ++n) {
                const int64_t place = n / each * kernels_.panel_width + n % each;
                bias_[place] = at<float>(bias)[n];
                if (packed_.gated) bias_[place + each] = at<float>(up_bias)[n];
            }
            packed_.bias = bias_.data();
        }
    }

    void run(Address x, int64_t x_stride, int64_t num_rows, Address out, int64_t out_stride, Address added) const {
        std::optional<RowsOp> before;
        Tape* const tape = Tape::recording();
        if (tape && x_stride == packed_.num_inputs && kernels_.rounded_row_bytes(packed_))
            before = tape->take_last(at<void>(x), packed_.num_inputs);
        for_rows(num_rows, [=](int64_t num_rows) {
            multiply({&packed_, at<const float>(x), x_stride, num_rows, at<float>(out), out_stride, at<const float>(added),
                      nullptr},
                     before);
        });
    }

    // What of it is in memory, and read by each product.
    int64_t num_bytes() const { return matrix_->num_bytes(); }
    const PackedWeight& packed() const { return packed_; }
    const Kernels& kernels() const { return kernels_; }

   private:
    // `before` writes the rows that are multiplied, if nobody has: in the same parts, of which each is then rounded.
    void multiply(LinearCall call, const std::optional<RowsOp>& before) const {
        const int64_t rows_each = kernels_.most_rows(packed_);
        const int64_t num_rows = call.num_rows;
        Machine& machine = Machine::get();
        if (const int64_t row_bytes = kernels_.rounded_row_bytes(packed_)) {
            struct alignas(64) Line {
                uint8_t bytes[64];
            };
            thread_local std::vector<Line> rounded;
            const size_t needed = ceil_div(num_rows * row_bytes, sizeof(Line));
            if (rounded.size() < needed) rounded.resize(needed);
            call.rounded = rounded.data()->bytes;
            by_rows(num_rows, packed_.num_inputs, [&](int64_t first, int64_t end) {
                if (before) before->write(first, end);
                kernels_.round_activations(call, first, end);
            });
        }
        const int64_t row_parts = ceil_div(num_rows, rows_each);
        // Several tasks a thread, so that one that is held up does not hold up all, and none longer than a millisecond
        // or so, because the others wait for whoever takes the last; but none so small that handing it out costs more
        // than doing it.
        constexpr int64_t kLongest = 1 << 25;
        const int64_t num_tasks = std::max<int64_t>(
            machine.num_threads() * 16, num_panels_ * kernels_.panel_width * packed_.num_inputs * num_rows / kLongest);
        const int64_t wanted = machine.num_threads() == 1 ? 1 : ceil_div(num_tasks, row_parts);
        const int64_t panel_work = packed_.num_inputs * kernels_.panel_width * std::min(num_rows, rows_each);
        const int64_t least = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(panel_work, 1));
        // Whole tiles, shared out evenly: the last thread to end is the one that is waited for. One row of widened codes takes
        // four panels at once.
        const int64_t unit = num_rows == 1 && packed_.has_codes() && !packed_.int8_activations ? 4 : 1;
        const int64_t num_units = ceil_div(num_panels_, unit);
        const int64_t panel_parts = std::min({wanted, num_units, ceil_div(num_panels_, least)});
        const auto bound = [&](int64_t part) { return std::min(part * num_units / panel_parts * unit, num_panels_); };
        const auto body = [&](int64_t task, float* scratch) {
            const int64_t row = task / panel_parts * rows_each, part = task % panel_parts;
            kernels_.linear(call, row, std::min(row + rows_each, num_rows), bound(part), bound(part + 1), scratch);
        };
        // Memory is fast where reading goes on, and slow where it begins.
        machine.each(row_parts * panel_parts, kernels_.linear_scratch_floats(), body, Pool::Order::kInRuns);
    }

    std::shared_ptr<PackedMatrix> matrix_;
    const Kernels& kernels_;
    int64_t num_panels_;
    std::vector<float> bias_;
    PackedWeight packed_;
};

// What one step's attention consists of.
class AttentionWork {
   public:
    AttentionWork(Address query_starts, Address context_lens, Address tables, int64_t table_width, Address table_starts,
                  Address visible, int64_t block_size, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window,
                  float score_cap)
        : kernels_(Machine::get().kernels()),
          query_starts_(at<const int32_t>(query_starts)),
          context_lens_(at<const int32_t>(context_lens)),
          tables_(at<const int32_t>(tables)),
          table_width_(table_width),
          table_starts_(at<const int32_t>(table_starts)),
          visible_(at<const int32_t>(visible)),
          block_size_(block_size),
          num_heads_(num_heads),
          num_kv_heads_(num_kv_heads),
          head_dim_(head_dim),
          window_(window),
          score_cap_(score_cap) {
        if (num_heads / num_kv_heads > kMaxTileRows)
            throw std::invalid_argument("more than 128 query heads share a KV head");
    }

    // Works out who computes what, for the sequences that the layout's tensors hold now.
    void plan(int64_t num_sequences) {
        const int32_t* const starts = query_starts_;
        const int32_t* const lens = context_lens_;
        const int64_t R = num_heads_ / num_kv_heads_;
        tasks_.clear();
        merges_.clear();
        const int64_t tile_tokens = std::max<int64_t>(1, kMaxTileRows / R);
        int64_t num_spans = 0;
        for (int64_t s = 0; s < num_sequences; ++s)
            if (starts[s + 1] - starts[s] == 1) num_spans += ceil_div(lens[s], kSpan) * num_kv_heads_;
        const int64_t num_threads = Machine::get().num_threads();
        const int64_t spans_each = std::max<int64_t>(1, num_spans / (num_threads * 4));
        // Where a token's spans are fewer than the threads, several read each of them, for some of its query heads.
        const bool is_shared = num_sequences == 1 && num_spans > 0 && num_spans < num_threads;
        const int32_t heads_each = is_shared ? ceil_div(R, num_threads / num_spans) : R;
        int32_t num_partials = 0;
        for (int64_t s = 0; s < num_sequences; ++s) {
            const int32_t num_queries = starts[s + 1] - starts[s], first_position = lens[s] - num_queries;
            for (int32_t t = 0; t < num_queries; t += tile_tokens) {
                const int32_t num_tokens = std::min<int64_t>(tile_tokens, num_queries - t);
                const int32_t position = first_position + t;
                const int32_t first_span = window_ > 0 ? std::max<int64_t>(0, position + 1 - window_) / kSpan : 0;
                // A sequence's rows see no fewer tokens than those before them.
                const int32_t end = visible_ ? visible_[starts[s] + t + num_tokens - 1] : position + num_tokens;
                const int32_t end_span = ceil_div(end, kSpan);
                const bool split = num_queries == 1 && end_span - first_span > spans_each;
                for (int32_t g = 0; g < num_kv_heads_; ++g) {
                    AttentionTask task{(int32_t)s, g,          0,        heads_each, starts[s] + t, num_tokens,
                                       position,   first_span, end_span, -1};
                    const auto push = [&] {
                        for (int32_t head = 0; head < R; head += heads_each) {
                            task.first_head = head;
                            task.num_heads = std::min<int32_t>(heads_each, R - head);
                            tasks_.push_back(task);
                        }
                    };
                    if (!split) {
                        push();
                        continue;
                    }
                    merges_.push_back({num_partials, end_span - first_span, starts[s], g});
                    for (int32_t span = first_span; span < end_span; span += spans_each) {
                        task.first_span = span;
                        task.end_span = std::min<int64_t>(span + spans_each, end_span);
                        task.partial = num_partials;
                        num_partials += task.end_span - span;
                        push();
                    }
                }
            }
        }
        // The longest first, so that none is left over at the end.
        std::stable_sort(tasks_.begin(), tasks_.end(), [](const AttentionTask& a, const AttentionTask& b) {
            return (int64_t)a.num_tokens * (a.end_span - a.first_span) >
                   (int64_t)b.num_tokens * (b.end_span - b.first_span);
        });
        partials_.resize(num_partials * R * (head_dim_ + 2));
    }

    CacheView view(int kind, Address k, Address v, Address k_scales, Address v_scales) const {
        return {static_cast<Cache>(kind), at<void>(k),   at<void>(v), at<float>(k_scales),
                at<float>(v_scales),      num_kv_heads_, head_dim_,   block_size_};
    }

    void run(const float* q, int64_t q_stride, const CacheView& cache, float* out, float scale) {
        Machine& machine = Machine::get();
        const int64_t scratch_floats = kernels_.attention_scratch_floats(head_dim_);
        machine.each(tasks_.size(), scratch_floats, [&](int64_t i, float* scratch) {
            const AttentionTask& task = tasks_[i];
            kernels_.attention({&task, &cache, q, q_stride, out, num_heads_, tables_ + task.sequence * table_width_,
                                table_starts_[task.sequence], visible_, window_, scale, score_cap_, partials_.data(), scratch});
        });
        if (merges_.empty()) return;
        const int64_t R = num_heads_ / num_kv_heads_;
        machine.each(merges_.size(), 0, [&](int64_t i, float*) {
            const Merge& merge = merges_[i];
            kernels_.merge_partials(partials_.data() + merge.partial * R * (head_dim_ + 2), merge.num_partials, R,
                                    head_dim_, out + (merge.row * num_heads_ + merge.kv_head * R) * head_dim_);
        });
    }

   private:
    struct Merge {
        int32_t partial;
        int32_t num_partials;
        int32_t row;
        int32_t kv_head;
    };

    const Kernels& kernels_;
    const int32_t* query_starts_;
    const int32_t* context_lens_;
    const int32_t* tables_;
    int64_t table_width_;
    const int32_t* table_starts_;
    const int32_t* visible_;
    int64_t block_size_, num_heads_, num_kv_heads_, head_dim_, window_;
    float score_cap_;
    std::vector<AttentionTask> tasks_;
    std::vector<Merge> merges_;
    std::vector<float> partials_;
};

class AttentionPlan {
   public:
    AttentionPlan(int64_t num_sequences, Address query_starts, Address context_lens, Address tables, int64_t table_width,
                  Address table_starts, Address visible, int64_t block_size, int64_t num_heads, int64_t num_kv_heads,
                  int64_t head_dim, int64_t window, float score_cap)
        : work_(std::make_shared<AttentionWork>(query_starts, context_lens, tables, table_width, table_starts, visible,
                                                block_size, num_heads, num_kv_heads, head_dim, window, score_cap)) {
        for_sequences(num_sequences, [work = work_](int64_t num_sequences) { work->plan(num_sequences); });
    }

    void run(Address q, int64_t q_stride, int64_t num_rows, int cache_kind, Address k, Address v, Address k_scales,
             Address v_scales, Address out, float scale) {
        const CacheView cache = work_->view(cache_kind, k, v, k_scales, v_scales);
        for_rows(num_rows, [=, work = work_](int64_t) {
            work->run(at<const float>(q), q_stride, cache, at<float>(out), scale);
        });
    }

   private:
    std::shared_ptr<AttentionWork> work_;  // which tapes hold too
};

// write(first row, end row) for parts of the rows of a norm's result; a product recorded next may do it instead.
template <class F>
void write_rows(const NormCall& call, int64_t num_rows, F write) {
    for_rows(num_rows, [=](int64_t num_rows) { by_rows(num_rows, call.width, write); });
    Tape* const tape = Tape::recording();
    if (tape && call.out_stride == call.width) tape->last_writes({call.out, call.width, write});
}

void rms_norm(Address x, int64_t x_stride, Address weight, Address out, int64_t out_stride, int64_t num_rows,
              int64_t width, float eps) {
    const NormCall call{at<const float>(x), x_stride,   at<const float>(weight), nullptr,
                        at<float>(out),     out_stride, width,                   eps};
    write_rows(call, num_rows, [=](int64_t first, int64_t end) { Machine::get().kernels().rms_norm(call, first, end); });
}

void layer_norm(Address x, Address weight, Address bias, Address out, int64_t num_rows, int64_t width, float eps) {
    const NormCall call{at<const float>(x), width, at<const float>(weight), at<const float>(bias),
                        at<float>(out),     width, width,                   eps};
    write_rows(call, num_rows, [=](int64_t first, int64_t end) { Machine::get().kernels().layer_norm(call, first, end); });
}

void add(Address x, Address y, int64_t num_rows, int64_t width, float scale) {
    for_rows(num_rows, [=](int64_t num_rows) {
        by_rows(num_rows, width, [&](int64_t first, int64_t end) {
            Machine::get().kernels().add(at<float>(x), at<const float>(y), scale, first * width, end * width);
        });
    });
}

void embed(const Kernels& kernels, const EmbedCall& call, int64_t num_rows, int64_t vocab_size) {
    for_rows(num_rows, [=, &kernels](int64_t num_rows) {
        for (int64_t row = 0; row < num_rows; ++row)
            if (call.token_ids[row] < 0 || call.token_ids[row] >= vocab_size)
                throw std::out_of_range("token " + std::to_string(call.token_ids[row]) + " is not one of " +
                                        std::to_string(vocab_size));
        by_rows(num_rows, call.width, [&](int64_t first, int64_t end) { kernels.embed(call, first, end); });
    });
}

void embed_table(Address token_ids, int64_t num_rows, int kind, Address table, int64_t vocab_size, int64_t width,
                 float scale, Address out) {
    const EmbedCall call{at<const int64_t>(token_ids), nullptr, static_cast<Weight>(kind), at<const void>(table),
                         width,                        scale,   at<float>(out)};
    embed(Machine::get().kernels(), call, num_rows, vocab_size);
}

void embed_packed(const PackedLinear& head, Address token_ids, int64_t num_rows, float scale, Address out) {
    const PackedWeight& packed = head.packed();
    if (packed.gated) throw std::invalid_argument("two weights have no rows of one");
    const EmbedCall call{at<const int64_t>(token_ids), &packed, packed.kind, nullptr, packed.num_inputs, scale,
                         at<float>(out)};
    embed(head.kernels(), call, num_rows, packed.num_outputs);
}

// cos, sin [T, head_dim], see rope_angles/reference.py; `inverse` has `num_pairs` of the head_dim / 2 pairs' frequencies,
// and `axes` which of the positions [A, T] turn each; null: there is one axis.
void rope_angles(Address positions, int64_t num_rows, Address axes, Address inverse, int64_t num_pairs, int64_t head_dim, float factor,
                 Address cos, Address sin) {
    for_rows(num_rows, [=](int64_t num_rows) {
        by_rows(num_rows, head_dim * 16, [&](int64_t first, int64_t end) {
            const int64_t half = head_dim / 2;
            for (int64_t row = first; row < end; ++row)
                for (int64_t i = 0; i < half; ++i) {
                    const int64_t axis = axes && i < num_pairs ? at<const int64_t>(axes)[i] : 0;
                    const float position = static_cast<float>(at<const int64_t>(positions)[axis * num_rows + row]);
                    const float angle = i < num_pairs ? position * at<const float>(inverse)[i] : 0.0f;
                    float* const to_cos = at<float>(cos) + row * head_dim + i;
                    float* const to_sin = at<float>(sin) + row * head_dim + i;
                    to_cos[0] = to_cos[half] = i < num_pairs ? std::cos(angle) * factor : 1.0f;
                    to_sin[half] = i < num_pairs ? std::sin(angle) * factor : 0.0f;
                    to_sin[0] = -to_sin[half];
                }
        });
    });
}

void rope_write_kv(Address qkv, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                   Address cos, Address sin, Address slots, Address q_norm, Address k_norm, float eps, int64_t block_size,
                   int cache_kind, Address k, Address v, Address k_scales, Address v_scales) {
    const CacheView cache{static_cast<Cache>(cache_kind), at<void>(k),  at<void>(v), at<float>(k_scales),
                          at<float>(v_scales),            num_kv_heads, head_dim,    block_size};
    for_rows(num_tokens, [=](int64_t num_tokens) {
        const RopeCall call{at<float>(qkv),           num_tokens,
                            num_heads,                at<const float>(cos),
                            at<const float>(sin),     at<const int64_t>(slots),
                            at<const float>(q_norm),  at<const float>(k_norm),
                            eps,                      &cache};
        by_rows(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim * 2, [&](int64_t first, int64_t end) {
            Machine::get().kernels().rope_write_kv(call, first, end);
        });
    });
}

// One token for each row, -1 where its logits are not finite numbers; `how` is [num_rows] of Sampling.
std::vector<int64_t> draw_tokens(Address logits, int64_t num_rows, int64_t size, const std::string& how) {
    if (how.size() != num_rows * sizeof(Sampling)) throw std::invalid_argument("not as many ways to draw as rows");
    std::vector<int64_t> tokens(num_rows);
    const Kernels& kernels = Machine::get().kernels();
    Machine::get().each(num_rows, Row::scratch_floats(size), [&](int64_t r, float* scratch) {
        Row row(kernels, at<const float>(logits) + r * size, size, scratch);
        tokens[r] = row.is_finite() ? row.draw(reinterpret_cast<const Sampling*>(how.data())[r]) : -1;
    });
    return tokens;
}

// Each row's `count` likeliest tokens and their logits, and the logarithm of its sum of e^logit.
void top_tokens(Address logits, int64_t num_rows, int64_t size, int64_t count, Address tokens, Address values,
                Address log_totals) {
    if (count > size) throw std::invalid_argument("there are not that many tokens");
    const Kernels& kernels = Machine::get().kernels();
    Machine::get().each(num_rows, Row::scratch_floats(size), [&](int64_t r, float* scratch) {
        Row row(kernels, at<const float>(logits) + r * size, size, scratch);
        at<double>(log_totals)[r] = row.top(count, at<int32_t>(tokens) + r * count, at<float>(values) + r * count);
    });
}

// Seconds of the fastest of five calls.
template <class F>
double best_of_five(F&& work) {
    double best = 1e30;
    for (int i = 0; i < 5; ++i) {
        const auto began = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
    return best;
}

// Bytes a second.
double read_bandwidth(int64_t num_bytes) {
    take_all_threads();
    constexpr int64_t kPart = 1 << 18;
    const HugePages memory(num_bytes);
    float* const floats = reinterpret_cast<float*>(memory.data());
    const int64_t size = num_bytes / sizeof(float), num_parts = ceil_div(size, kPart);
    Machine& machine = Machine::get();
    machine.each(num_parts, 0, [&](int64_t part, float*) {
        std::fill(floats + part * kPart, floats + std::min(size, (part + 1) * kPart), 1.0f);
    });
    std::vector<float> sums(num_parts);
    const double seconds = best_of_five([&] {
        machine.each(num_parts, 0, [&](int64_t part, float*) {
            sums[part] = machine.kernels().read_all(floats + part * kPart, std::min(kPart, size - part * kPart));
        });
    });
    return num_bytes / seconds;
}

// Multiplications and additions a second, of float32, bfloat16 or bytes.
double multiply_add_rate(const std::string& numbers) {
    take_all_threads();
    constexpr int64_t kTasksEach = 8, kRounds = 100000;
    Machine& machine = Machine::get();
    const Kernels& kernels = machine.kernels();
    const auto run = numbers == "bytes"      ? kernels.multiply_add_bytes
                     : numbers == "bfloat16" ? kernels.multiply_add_pairs
                                             : kernels.multiply_add;
    std::atomic<int64_t> num_ops{0};
    const double seconds = best_of_five([&] {
        num_ops = 0;
        machine.each(machine.num_threads() * kTasksEach, 16 * 16, [&](int64_t, float* scratch) {
            scratch[0] = 0.5f, scratch[1] = 1.0f;
            num_ops += run(kRounds, scratch);
        });
    });
    return num_ops / seconds;
}

}  // namespace

void take_threads_for(int64_t num_rows) { Machine::get().take_threads_for(num_rows); }
void take_all_threads() { take_threads_for(INT64_MAX); }
bool leaves_threads(int64_t num_rows) {
    return Machine::get().num_threads(num_rows) < Machine::get().num_threads(INT64_MAX);
}

}  // namespace penstock

NB_MODULE(_native, m) {
    using namespace penstock;
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Tape>(m, "Tape")
        .def(nb::init<int64_t, int64_t, const Tape*>(), nb::arg(), nb::arg(), nb::arg("goes_on_from").none() = nb::none())
        .def("begin", &Tape::begin)
        .def("end", &Tape::end)
        .def("run", [](const Tape& tape, int64_t rows, int64_t sequences) { tape.run(rows, sequences); }, Unlocked());
    nb::class_<StepInputs>(m, "StepInputs")
        .def(nb::init<int64_t, int64_t, int64_t, Address, Address, Address, Address, Address, Address, Address>())
        .def("load", &StepInputs::load, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
        .def("are", &StepInputs::are, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    nb::class_<RunAhead>(m, "RunAhead")
        .def(
            "__init__",
            [](RunAhead* self, const Tape* first, const Tape* rest, const Tape* last, StepInputs* inputs, Address logits,
               int64_t size, const nb::object&) {
                new (self) RunAhead({first, rest, last}, inputs, [=](int64_t num_rows, const std::string& how) {
                    return draw_tokens(logits, num_rows, size, how);
                });
            },
            nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
            nb::keep_alive<1, 8>())
        .def("begin", &RunAhead::begin)
        .def("draw", [](RunAhead& self, const nb::bytes& how, bool goes_on) {
            const std::string ways(how.c_str(), how.size());
            const nb::gil_scoped_release unlocked;
            return self.draw(ways, goes_on);
        })
        .def("has_begun", &RunAhead::has_begun)
        .def("stop", &RunAhead::stop, Unlocked());
    m.def("isa", [] { return std::string(Machine::get().kernels().name); });
    m.def("choose", [](const std::string& isa) { Machine::get().choose(isa); }, nb::arg("isa"));
    m.def("runs", [](const std::string& isa) { return find(isa) && find(isa)->runs; }, nb::arg("isa"));
    m.attr("many_rows") = kManyRows;
    m.def("num_threads", [](int64_t num_rows) { return Machine::get().num_threads(num_rows); }, nb::arg("num_rows"));
    m.def(
        "set_num_threads",
        [](int many, int few, const std::vector<int>& cpus) { Machine::get().set_num_threads(many, few, cpus); },
        nb::arg("num_threads"), nb::arg("few_rows_threads"), nb::arg("cpus"), Unlocked());
    nb::class_<PackedMatrix>(m, "PackedMatrix")
        .def(nb::init<int64_t, int64_t, int, int64_t, bool, int, const std::vector<PackedMatrix::Part>&, Address, Address,
                      Address, Address, Address, float, float, bool>());
    nb::class_<PackingThreads>(m, "PackingThreads")
        .def(nb::init<std::vector<std::shared_ptr<PackedMatrix>>, int>())
        .def("stop", &PackingThreads::stop, Unlocked());
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(nb::init<std::shared_ptr<PackedMatrix>, Address, Address, int>(), Unlocked())
        .def("run", &PackedLinear::run, Unlocked())
        .def("embed", &embed_packed, Unlocked())
        .def_prop_ro("num_bytes", &PackedLinear::num_bytes);
    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def(nb::init<int64_t, Address, Address, Address, int64_t, Address, Address, int64_t, int64_t, int64_t, int64_t,
                      int64_t, float>())
        .def("run", &AttentionPlan::run, Unlocked());
    m.def("rms_norm", &rms_norm, Unlocked());
    m.def("layer_norm", &layer_norm, Unlocked());
    m.def("add", &add, Unlocked());
    m.def("embed", &embed_table, Unlocked());
    m.def("rope_angles", &rope_angles, Unlocked());
    m.def("rope_write_kv", &rope_write_kv, Unlocked());
    m.def("draw_tokens", [](Address logits, int64_t num_rows, int64_t size, const nb::bytes& how) {
        const std::string ways(how.c_str(), how.size());
        const nb::gil_scoped_release unlocked;
        return draw_tokens(logits, num_rows, size, ways);
    });
    m.def("top_tokens", &top_tokens, Unlocked());
    m.def("touch", &touch, Unlocked());
    m.def("read_bandwidth", &read_bandwidth, Unlocked());
    m.def("multiply_add_rate", &multiply_add_rate, Unlocked());
}
