// SPDX-License-Identifier: BSD-3-Clause
// Working memory of one thread, kept from call to call.
#pragma once

#include <cstdint>

namespace dcd {

// A task's own memory, what the caller of parallel() shares with the tasks, and the images of a whole
// network.
enum class Scratch { kTask, kShared, kNetwork };

// 64-byte aligned memory of this thread; the next call for the same use may hand out the same bytes again.
// Kept because a kernel of 50 us cannot afford to fault in a fresh megabyte; given back when the thread ends.
void* scratch(int64_t bytes, Scratch use = Scratch::kTask);

// Zeroed, 64-byte aligned memory; throws std::bad_alloc. release() takes null too.
void* allocate_zeroed(int64_t bytes);
void release(void* memory);

// From now on fresh scratch is full of NaN, so that a test sees a read of what nobody wrote.
void poison_scratch(bool on);

// Gives back this thread's scratch where it has grown beyond what layers commonly need.
void trim_scratch(Scratch use);

// Denormal operands cost up to 190 times the normal time on some CPUs. Within this scope they count as zero;
// the caller's mode comes back at the end.
class FlushDenormals {
  public:
    FlushDenormals();
    ~FlushDenormals();
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
    unsigned saved_;
};

}  // namespace dcd
