// SPDX-License-Identifier: BSD-3-Clause
// Products of bf16 in fp32: what is multiplied becomes fp32 in the tile, every value exactly.
#pragma once

#include "mixed_finish.h"

namespace dcd::DCD_ISA {

// What mixed.h multiplies with. Two operands: `rows`, one behind the other with row(k) elements each, and
// `lanes`, in an order of its own, k times as many as lanes.
template <class Simd>
struct Widened {
    using S = Simd;
    using T = Bfloat16;  // of the maps
    using Operand = float;
    static constexpr Products kProducts = Products::kWidened;
    static constexpr bool kFinishes = false;  // multiply_and_finish() in one, see dot_products.h
    static constexpr bool kSplit = false;
    static constexpr int64_t kBand = 2 * Shape<S>::kRows;  // rows of one multiply()
    struct Unit {};                                        // what a task holds while it multiplies

    // Rows a power of two apart would share one set of L1.
    static int64_t padded(int64_t n) { return Pieces<float>::rounded(n) + 16; }
    static int64_t row(int64_t k) { return padded(k); }
    static int64_t lanes_size(int64_t k, int64_t lanes) { return k * padded(lanes); }
    // Whether rows in memory, k elements long, are an operand as they are.
    static bool direct(int64_t) { return false; }
    static const float* as_rows(const T*) { return nullptr; }

    // from [rows, k]
    template <class F>
    static void to_rows(const F* from, int64_t from_row, int64_t rows, int64_t k, float* to) {
        for (int64_t r = 0; r < rows; ++r) copy(from + r * from_row, k, to + r * row(k));
    }
    // from [k, lanes]
    template <class F>
    static void to_lanes(const F* from, int64_t from_k, int64_t k, int64_t lanes, float* to) {
        for (int64_t i = 0; i < k; ++i) copy(from + i * from_k, lanes, to + i * padded(lanes));
    }
    static void rows_to_lanes(const float* from, int64_t from_row, int64_t lanes, int64_t k, float* to) {
        transpose<S>(from, from_row, lanes, k, to, padded(lanes));
    }
    static void lanes_to_rows(const float* from, int64_t rows, int64_t k, float* to) {
        transpose<S>(from, padded(rows), k, rows, to, row(k));
    }

    // c [rows, count] = rows x lanes [first, first + count) of `lanes`, rows at most kBand
    static void multiply(Unit&, const float* rows, int64_t rows_row, int64_t row_count, const float* lanes,
                         int64_t all_lanes, int64_t first, int64_t count, int64_t k, float* c,
                         int64_t c_row) {
        Block<float> block;
        block.a = rows, block.a_row = rows_row, block.a_k = 1;
        block.b = lanes + first, block.b_k = padded(all_lanes), block.k = k;
        block.c = c, block.c_row = c_row;
        dcd::DCD_ISA::multiply<S>(block, row_count, count);
    }

  private:
    template <class F>
    static void copy(const F* from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += S::kLanes)
            Elements<S, F>::store(to + i, Elements<S, F>::load(from + i, count - i), count - i);
    }
};

}  // namespace dcd::DCD_ISA
