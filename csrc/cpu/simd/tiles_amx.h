// SPDX-License-Identifier: BSD-3-Clause
// Tile registers of AMX. They belong to the thread: what configures them releases them.
#pragma once

#include <immintrin.h>

#include "tile_config.h"

namespace dcd::DCD_ISA {

// The instructions take the number of a register as a literal.
#define DCD_TILE(tile, use)             \
    do {                                \
        if constexpr ((tile) == 0)      \
            use(0);                     \
        else if constexpr ((tile) == 1) \
            use(1);                     \
        else if constexpr ((tile) == 2) \
            use(2);                     \
        else if constexpr ((tile) == 3) \
            use(3);                     \
        else if constexpr ((tile) == 4) \
            use(4);                     \
        else if constexpr ((tile) == 5) \
            use(5);                     \
        else if constexpr ((tile) == 6) \
            use(6);                     \
        else                            \
            use(7);                     \
    } while (false)

class Tiles {
  public:
    void configure(const TileConfig& config) {
        in_memory();
        _tile_loadconfig(&config);
    }
    void release() { _tile_release(); }

    template <int TILE>
    void zero() {
#define DCD_USE(n) _tile_zero(n)
        DCD_TILE(TILE, DCD_USE);
#undef DCD_USE
    }
    template <int TILE>
    void load(const void* from, int64_t row_bytes) {
        in_memory();
#define DCD_USE(n) _tile_loadd(n, from, row_bytes)
        DCD_TILE(TILE, DCD_USE);
#undef DCD_USE
    }
    template <int TILE>
    void store(void* to, int64_t row_bytes) {
#define DCD_USE(n) _tile_stored(n, to, row_bytes)
        DCD_TILE(TILE, DCD_USE);
#undef DCD_USE
        in_memory();
    }
    // Tile C += A B, A rows of pairs, B pairs of lanes. The registers of the kernel and no others.
    template <int C, int A, int B>
    void dot_bf16() {
        static_assert(A == 4 + C / 2 && B == 6 + C % 2);
        if constexpr (C == 0)
            _tile_dpbf16ps(0, 4, 6);
        else if constexpr (C == 1)
            _tile_dpbf16ps(1, 4, 7);
        else if constexpr (C == 2)
            _tile_dpbf16ps(2, 5, 6);
        else
            _tile_dpbf16ps(3, 5, 7);
    }

  private:
    // GCC's intrinsics do not say that they read memory.
    static void in_memory() { __asm__ volatile("" ::: "memory"); }
};

#undef DCD_TILE

}  // namespace dcd::DCD_ISA
