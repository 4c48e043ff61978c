// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>
#include <vector>

namespace spmd {

// The most pieces one call of process_vm_readv takes (IOV_MAX of Linux).
inline constexpr size_t kMaxPieces = 1024;

// Reads `remote` in process `pid` into `local`. Both lists hold the same number of bytes and at most kMaxPieces pieces,
// and are used up. Throws SourceError with `block` in it.
void read_process(pid_t pid, uint64_t block, std::vector<iovec>& local, std::vector<iovec>& remote);

// Lets any process of this user read this process' memory where Yama restricts that to parents
// (ptrace_scope 1). False where the kernel has no Yama.
bool allow_ptrace_by_any();

}  // namespace spmd
