// SPDX-License-Identifier: Apache-2.0
#include "cpu/threads.hpp"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

namespace spmd {
namespace {

// Buckets follow one another faster than a thread goes to sleep and wakes up.
constexpr std::chrono::microseconds kAwake{100};

void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (value.load(std::memory_order_acquire) == old) {
    if (std::chrono::steady_clock::now() >= end) return value.wait(old, std::memory_order_acquire);
    std::this_thread::yield();
  }
}

class Team {
 public:
  void run(int count, const std::function<void(int)>& work) {
    const std::lock_guard lock(turn_);
    add_up_to(count - 1);
    work_ = &work;
    count_ = count;
    unfinished_.store(static_cast<uint32_t>(size_), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    work(0);
    while (const uint32_t left = unfinished_.load(std::memory_order_acquire)) wait_for_change(unfinished_, left);
  }

 private:
  void add_up_to(int size) {
    sigset_t sent, before;  // what others send is for the threads that the process had
    sigfillset(&sent);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&sent, fault);
    pthread_sigmask(SIG_SETMASK, &sent, &before);
    try {
      for (; size_ < size; ++size_)
        std::thread(&Team::serve, this, size_ + 1, round_.load(std::memory_order_relaxed)).detach();
    } catch (const std::exception&) {  // the system has no more threads, or no memory
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve(int number, uint32_t round) {
    for (;; ++round) {
      wait_for_change(round_, round);
      if (number < count_) (*work_)(number);
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    }
  }

  std::mutex turn_;
  const std::function<void(int)>* work_ = nullptr;
  int count_ = 0;
  int size_ = 0;
  std::atomic<uint32_t> round_{0};
  std::atomic<uint32_t> unfinished_{0};
};

// Never destroyed: its threads end with the process. A fork has none of them, and gets a team of its own.
Team*& team() {
  static Team* current = new Team;
  [[maybe_unused]] static const int hook =
      pthread_atfork(nullptr, nullptr, [] { team() = new Team; });  // NOLINT(clang-analyzer-cplusplus.NewDeleteLeaks)
  return current;
}

}  // namespace

void run_on_threads(int count, const std::function<void(int)>& work) {
  if (count <= 1) return work(0);
  team()->run(count, work);
}

}  // namespace spmd
