// SPDX-License-Identifier: Apache-2.0
#include "cpu/process_memory.hpp"

#include <sys/prctl.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>

#include "check.hpp"

namespace spmd {
namespace {

const char* advice(int error) {
  switch (error) {
    case ESRCH:
      return "the process is gone";
    case EPERM:
      return "this process may not read that one's memory: same user needed, and with "
             "/proc/sys/kernel/yama/ptrace_scope = 1 the source must call allow_ptrace_by_any() first";
    case EFAULT:
      return "the address is not mapped there: was that memory freed or moved since it was exported?";
    case ENOSYS:
      return "the kernel or its sandbox has no process_vm_readv";
    default:
      return "process_vm_readv failed";
  }
}

[[noreturn]] void fail(pid_t pid, uint64_t block, const iovec& piece, int error) {
  const auto address = reinterpret_cast<uint64_t>(piece.iov_base);
  char text[160];
  std::snprintf(text, sizeof(text), "block %" PRIu64 ": reading %zu bytes at 0x%" PRIx64 " of process %d: ", block,
                piece.iov_len, address, static_cast<int>(pid));
  throw SourceError(
      std::string(text) + std::strerror(error) + " (errno " + std::to_string(error) + "); " + advice(error), pid,
      address, piece.iov_len, block, error);
}

void drop_front(std::span<iovec>& pieces, size_t bytes) {
  while (!pieces.empty() && bytes >= pieces.front().iov_len) {
    bytes -= pieces.front().iov_len;
    pieces = pieces.subspan(1);
  }
  if (bytes == 0) return;
  iovec& piece = pieces.front();
  piece.iov_base = static_cast<char*>(piece.iov_base) + bytes;
  piece.iov_len -= bytes;
}

}  // namespace

void read_process(pid_t pid, uint64_t block, std::vector<iovec>& local, std::vector<iovec>& remote) {
  std::span<iovec> to(local), from(remote);
  while (!from.empty()) {
    const ssize_t got = process_vm_readv(pid, to.data(), to.size(), from.data(), from.size(), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) fail(pid, block, from.front(), got < 0 ? errno : EFAULT);
    // A short read ends in front of what cannot be read; the next turn names that address.
    drop_front(to, static_cast<size_t>(got));
    drop_front(from, static_cast<size_t>(got));
  }
}

bool allow_ptrace_by_any() {
  if (prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0) == 0) return true;
  if (errno == EINVAL) return false;
  SPMD_THROW_POSIX("prctl(PR_SET_PTRACER)");
}

}  // namespace spmd
