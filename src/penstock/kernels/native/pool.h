// One set of threads for every kernel.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace penstock {

// Runs numbered tasks on threads that stay. Threads spin for a moment after a job, because the next op of a forward
// pass is microseconds away, and sleep when none comes.
//
// One caller at a time: `run` from two threads at once is serialized by the module's lock.
class Pool {
   public:
    using Task = void (*)(void* context, int64_t task, int thread);

    // Threads besides the caller's stay on a processor each of `cpus`, the second on the first, as far as these go and the
    // system allows. Throws std::system_error, and leaves no thread behind, where it refuses a thread.
    explicit Pool(int num_threads, const std::vector<int>& cpus = {});
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // The caller's thread included.
    int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Has jobs from here on run on the first `num_active` threads; the others sleep. Not while a job runs.
    void use(int num_active);

    // How tasks are handed out: in their order; or to each thread a run of them, what one reads following on what it has
    // read, until its own are done and it takes the next of others'.
    enum class Order { kAsNumbered, kInRuns };

    // Calls `function(context, task, thread)` for every task in [0, num_tasks) and returns when all have ended.
    // `thread` is in [0, num_threads) and at any moment nobody else's.
    void run(int64_t num_tasks, Order order, Task function, void* context);

    template <class F>
    void each(int64_t num_tasks, Order order, F&& body) {
        run(
            num_tasks, order, [](void* context, int64_t task, int thread) { (*static_cast<F*>(context))(task, thread); },
            &body);
    }

   private:
    void stop();
    void work(int thread);
    void rest(int thread);
    void take_tasks(int thread);

    // A job is open while threads may still join it. The number of those inside is in the low half and the job's
    // number in the high half, so that a late thread cannot join a job that has ended.
    static constexpr uint64_t kOpen = 1ull << 31;
    static constexpr uint64_t kInside = kOpen - 1;
    alignas(64) std::atomic<uint64_t> state_{0};
    struct alignas(64) Run {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    const std::unique_ptr<Run[]> runs_;  // as many as threads
    int num_runs_ = 1;
    alignas(64) std::atomic<uint32_t> num_active_;
    alignas(64) std::atomic<uint32_t> wake_{0};
    std::atomic<int> num_sleeping_{0};
    std::atomic<bool> stopping_{false};
    Task function_ = nullptr;
    void* context_ = nullptr;
    std::vector<std::thread> workers_;
};

}  // namespace penstock
