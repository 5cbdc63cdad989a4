// SPDX-License-Identifier: BSD-3-Clause
#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(DCD_X86)
#    include <xmmintrin.h>
#endif

namespace dcd {
namespace {

std::atomic<bool> poison{false};

struct Arena {
    void* data = nullptr;
    int64_t size = 0;
    ~Arena() { std::free(data); }
};

// A few of the largest layers in use; a rare call that needs more pays for its pages each time.
constexpr int64_t kKept = int64_t(16) << 20, kKeptNetwork = int64_t(128) << 20;

Arena& arena_for(Scratch use) {
    static thread_local Arena arenas[3];
    return arenas[static_cast<int>(use)];
}

}  // namespace

void* scratch(int64_t bytes, Scratch use) {
    if (bytes < 0) throw std::bad_alloc();  // a size that overflowed
    Arena& arena = arena_for(use);
    if (arena.size < bytes) {
        std::free(arena.data);
        arena.size = (bytes + 4095) / 4096 * 4096;
        arena.data = std::aligned_alloc(4096, static_cast<size_t>(arena.size));
        if (!arena.data) {
            arena.size = 0;
            throw std::bad_alloc();
        }
    }
    if (poison && bytes > 0)  // all ones is a NaN in bf16, fp32 and fp64
        std::memset(arena.data, 0xff, static_cast<size_t>(bytes));
    return arena.data;
}

void trim_scratch(Scratch use) {
    Arena& arena = arena_for(use);
    if (arena.size <= (use == Scratch::kNetwork ? kKeptNetwork : kKept)) return;
    std::free(arena.data);
    arena.data = nullptr;
    arena.size = 0;
}

void* allocate_zeroed(int64_t bytes) {
    const size_t size = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, size);
    if (!memory) throw std::bad_alloc();
    return std::memset(memory, 0, size);
}

void release(void* memory) {
    std::free(memory);
}

void poison_scratch(bool on) {
    poison = on;
}

#if defined(DCD_X86)
FlushDenormals::FlushDenormals() : saved_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero);
}
FlushDenormals::~FlushDenormals() {
    _mm_setcsr(saved_);
}
#else
FlushDenormals::FlushDenormals() : saved_(0) {}
FlushDenormals::~FlushDenormals() {}
#endif

}  // namespace dcd
