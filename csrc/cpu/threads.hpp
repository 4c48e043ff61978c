// SPDX-License-Identifier: Apache-2.0
// Threads that wait for work: to start new ones for each bucket of an update takes longer than to copy it.
#pragma once

#include <functional>

namespace spmd {

// Calls `work(0)` here and `work(1)` to `work(count - 1)` on other threads, and returns when all have returned. Where
// no more threads can be had, some of these calls are not made. `work` must not throw, nor come back here. Calls from
// several threads take turns.
void run_on_threads(int count, const std::function<void(int)>& work);

}  // namespace spmd
