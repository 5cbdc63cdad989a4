// SPDX-License-Identifier: BSD-3-Clause
// Products of bf16 by vdpbf16ps: a lane adds two products to its sum.
#pragma once

#include "pairs.h"

namespace dcd::DCD_ISA {

template <int ROWS, int VECTORS>
static void dot_pairs(const uint16_t* rows, int64_t row, const uint16_t* lanes, int64_t vector, int64_t pairs,
                      float* c, int64_t c_row) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
        __m512bh x[VECTORS];
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j)
            x[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(lanes + j * vector + k * 32));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, rows + r * row + 2 * k, sizeof(pair));
            const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], w, x[j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(c + r * c_row + 16 * j, sum[r][j]);
}

// See widened.h for what the members mean.
template <class Simd>
struct DotProducts {
    using S = Simd;
    using T = Bfloat16;
    using Operand = uint16_t;
    static constexpr Products kProducts = Products::kAvx512Bf16;
    static constexpr bool kSplit = false;
    static constexpr int64_t kBand = 8;
    struct Unit {};

    static int64_t row(int64_t k) { return (k + 1) / 2 * 2; }
    static int64_t lanes_size(int64_t k, int64_t lanes) { return Pairs<S>::lanes_size(row(k), lanes); }
    static bool direct(int64_t k) { return k % 2 == 0; }
    static const uint16_t* as_rows(const T* p) { return &p->bits; }

    template <class F>
    static void to_rows(const F* from, int64_t from_row, int64_t rows, int64_t k, uint16_t* to) {
        Pairs<S>::to_rows(from, from_row, rows, k, row(k), to, row(k));
    }
    template <class F>
    static void to_lanes(const F* from, int64_t from_k, int64_t k, int64_t lanes, uint16_t* to) {
        Pairs<S>::to_lanes(from, from_k, k, lanes, row(k), to);
    }
    static void rows_to_lanes(const uint16_t* from, int64_t from_row, int64_t lanes, int64_t k,
                              uint16_t* to) {
        Pairs<S>::rows_to_lanes(from, from_row, lanes, row(k), to);
    }
    static void lanes_to_rows(const uint16_t* from, int64_t rows, int64_t k, uint16_t* to) {
        Pairs<S>::lanes_to_rows(from, rows, row(k), to, row(k));
    }

    static void multiply(Unit&, const uint16_t* rows, int64_t row, int64_t row_count, const uint16_t* lanes,
                         int64_t, int64_t first, int64_t count, int64_t k, float* c, int64_t c_row) {
        const int64_t vector = DotProducts::row(k) * 16, pairs = DotProducts::row(k) / 2;
        const int64_t vectors = Pairs<S>::vectors(count), columns = (vectors + 2) / 3;
        lanes += first / 16 * vector;
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t v0 = j * vectors / columns, v1 = (j + 1) * vectors / columns;
            tile_of(row_count, v1 - v0)(rows, row, lanes + v0 * vector, vector, pairs, c + v0 * 16, c_row);
        }
    }

  private:
    using TileFn = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t);
    static TileFn tile_of(int64_t rows, int64_t vectors) {
#define DCD_ROWS(n)                                          \
    {                                                        \
        &dot_pairs<n, 1>, &dot_pairs<n, 2>, &dot_pairs<n, 3> \
    }
        static constexpr TileFn tiles[kBand][3] = {DCD_ROWS(1), DCD_ROWS(2), DCD_ROWS(3), DCD_ROWS(4),
                                                   DCD_ROWS(5), DCD_ROWS(6), DCD_ROWS(7), DCD_ROWS(8)};
#undef DCD_ROWS
        return tiles[rows - 1][vectors - 1];
    }
};

}  // namespace dcd::DCD_ISA
