#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

namespace penstock {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Where that is not allowed the thread goes where it likes, as it would have.
void stay_on(pthread_t thread, int cpu) {
    cpu_set_t only;
    CPU_ZERO(&only);
    if (cpu < 0 || cpu >= CPU_SETSIZE) return;
    CPU_SET(cpu, &only);
    pthread_setaffinity_np(thread, sizeof only, &only);
}

}  // namespace

Pool::Pool(int num_threads, const std::vector<int>& cpus) : runs_(new Run[num_threads]), num_active_(num_threads) {
    try {
        for (int thread = 1; thread < num_threads; ++thread) {
            workers_.emplace_back(&Pool::work, this, thread);
            if (static_cast<size_t>(thread) <= cpus.size()) stay_on(workers_.back().native_handle(), cpus[thread - 1]);
        }
    } catch (...) {
        stop();  // a thread nobody waits for would end the process
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stopping_.store(true);
    wake_.fetch_add(1);
    futex_wake_all(wake_);
    use(num_threads());
    for (std::thread& worker : workers_) worker.join();
}

void Pool::use(int num_active) {
    const uint32_t before = num_active_.exchange(num_active);
    if (before < static_cast<uint32_t>(num_active)) futex_wake_all(num_active_);
}

void Pool::run(int64_t num_tasks, Order order, Task function, void* context) {
    const int num_active = static_cast<int>(num_active_.load(std::memory_order_relaxed));
    if (num_tasks <= 1 || num_active == 1) {
        for (int64_t task = 0; task < num_tasks; ++task) function(context, task, 0);
        return;
    }
    function_ = function;
    context_ = context;
    num_runs_ = order == Order::kInRuns ? num_active : 1;
    for (int i = 0; i < num_runs_; ++i) {
        runs_[i].next.store(i * num_tasks / num_runs_, std::memory_order_relaxed);
        runs_[i].end = (i + 1) * num_tasks / num_runs_;
    }
    const uint64_t job = (state_.load(std::memory_order_relaxed) >> 32) + 1;
    state_.store(job << 32 | kOpen);
    wake_.fetch_add(1);
    if (num_sleeping_.load() > 0) futex_wake_all(wake_);
    take_tasks(0);
    // Closed first: who has not joined by now finds nothing to do, and is not waited for.
    uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    while (state & kInside) {
        relax();
        state = state_.load(std::memory_order_acquire);
    }
}

void Pool::take_tasks(int thread) {
    for (int i = 0; i < num_runs_; ++i) {
        Run& run = runs_[(thread + i) % num_runs_];
        for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;)
            function_(context_, task, thread);
    }
}

void Pool::rest(int thread) {
    uint32_t num_active = num_active_.load();
    while (static_cast<uint32_t>(thread) >= num_active && !stopping_.load()) {
        futex_wait(num_active_, num_active);
        num_active = num_active_.load();
    }
}

void Pool::work(int thread) {
    uint64_t last_job = 0;
    auto idle_since = std::chrono::steady_clock::now();
    while (!stopping_.load(std::memory_order_relaxed)) {
        if (static_cast<uint32_t>(thread) >= num_active_.load(std::memory_order_relaxed)) {
            rest(thread);
            idle_since = std::chrono::steady_clock::now();
        }
        const uint32_t awake = wake_.load();
        uint64_t state = state_.load(std::memory_order_acquire);
        if ((state & kOpen) && (state >> 32) != last_job) {
            if (!state_.compare_exchange_strong(state, state + 1, std::memory_order_acq_rel)) continue;
            last_job = state >> 32;
            take_tasks(thread);
            state_.fetch_sub(1, std::memory_order_release);
            idle_since = std::chrono::steady_clock::now();
            continue;
        }
        for (int i = 0; i < 32; ++i) relax();
        if (std::chrono::steady_clock::now() - idle_since < kSpin) continue;
        num_sleeping_.fetch_add(1);
        // A job that came since `awake` was read changed the word, and the wait returns at once.
        if (!stopping_.load()) futex_wait(wake_, awake);
        num_sleeping_.fetch_sub(1);
        idle_since = std::chrono::steady_clock::now();
    }
}

}  // namespace penstock
