#include "run_ahead.h"

#include <algorithm>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace penstock {

RunAhead::~RunAhead() {
    if (!thread_.joinable()) return;
    stop();
    {
        std::lock_guard lock(mutex_);
        is_closing_ = true;
    }
    asked_.notify_one();
    thread_.join();
}

bool RunAhead::begin(int64_t num_sequences) {
    std::lock_guard lock(mutex_);
    if (has_begun_) throw std::logic_error("a step has begun already");
    try {
        if (!thread_.joinable()) thread_ = std::thread(&RunAhead::work, this);
    } catch (const std::system_error&) {
        return false;
    }
    num_sequences_ = num_sequences;
    has_begun_ = true;
    asked_.notify_one();
    return true;
}

std::vector<int64_t> RunAhead::draw(const std::string& how, bool goes_on) {
    std::unique_lock lock(mutex_);
    if (!has_begun_) throw std::logic_error("no step has begun");
    wish_ = Wish{how, goes_on};
    asked_.notify_one();
    answered_.wait(lock, [this] { return !wish_; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    return std::move(tokens_);
}

bool RunAhead::has_begun() const {
    std::lock_guard lock(mutex_);
    return has_begun_;
}

void RunAhead::stop() {
    std::unique_lock lock(mutex_);
    if (!has_begun_) return;
    is_unwanted_ = true;
    asked_.notify_one();
    answered_.wait(lock, [this] { return !has_begun_; });
    is_unwanted_ = false;
}

void RunAhead::work() {
    std::unique_lock lock(mutex_);
    for (;;) {
        asked_.wait(lock, [this] { return has_begun_ || is_closing_; });
        if (is_closing_) return;
        lock.unlock();
        std::exception_ptr failure = run();
        lock.lock();
        asked_.wait(lock, [this] { return wish_ || is_unwanted_; });
        bool goes_on = false;
        if (wish_) {
            if (!failure) {
                lock.unlock();
                goes_on = draw_as(*wish_, failure);  // whoever wished waits
                lock.lock();
            }
            failure_ = failure;
        }
        wish_.reset();
        has_begun_ = goes_on;
        answered_.notify_one();
    }
}

std::exception_ptr RunAhead::run() {
    try {
        for (const Tape* pass : passes_) pass->run(num_sequences_, num_sequences_, &is_unwanted_);
        return nullptr;
    } catch (...) {
        return std::current_exception();
    }
}

bool RunAhead::draw_as(const Wish& wish, std::exception_ptr& failure) {
    try {
        tokens_ = draw_(num_sequences_, wish.how);
        const bool goes_on = wish.goes_on && *std::min_element(tokens_.begin(), tokens_.end()) >= 0 &&
                             inputs_->has_room(num_sequences_);
        if (goes_on) inputs_->go_on(tokens_.data(), num_sequences_);
        return goes_on;
    } catch (...) {
        failure = std::current_exception();
        return false;
    }
}

}  // namespace penstock
