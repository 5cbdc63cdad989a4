// SPDX-License-Identifier: BSD-3-Clause
// Work shared out to threads.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../scratch.h"

namespace dcd::DCD_ISA {

// f(i) for i in [0, count), each on one thread of the pool. f must not call scratch() and expect the caller's
// bytes.
template <class F>
static void parallel(const Runtime& runtime, int64_t count, const F& f) {
    const auto body = [](int64_t begin, int64_t end, void* context) {
        const FlushDenormals flush;
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
        trim_scratch(Scratch::kTask);
    };
    void* context = const_cast<void*>(static_cast<const void*>(&f));
    if (runtime.threads <= 1 || count <= 1)
        body(0, count, context);
    else
        runtime.parallel_for(0, count, body, context);
}

// Consecutive pieces of one scratch allocation, each 64-byte aligned.
template <class T>
class Pieces {
  public:
    explicit Pieces(T* base) : next_(base) {}
    static int64_t rounded(int64_t count) {
        return (count + 64 / sizeof(T) - 1) / (64 / sizeof(T)) * (64 / sizeof(T));
    }
    T* take(int64_t count) {
        T* piece = next_;
        next_ += rounded(count);
        return piece;
    }

  private:
    T* next_;
};

}  // namespace dcd::DCD_ISA
