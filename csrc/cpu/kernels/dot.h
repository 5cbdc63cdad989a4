// SPDX-License-Identifier: BSD-3-Clause
// Sums over the contiguous axis: c[r, j] (+)= sum_k a[r, k] b[j, k], lanes along k. What reductions over
// pixels of contiguous maps and products with a row-major weight need, without transposing either operand.
#pragma once

#include "tile.h"

namespace dcd::DCD_ISA {

// FETCH: the rows of b that the next tile reads are fetched on the way.
template <class S, int ROWS, int COLUMNS, bool FETCH>
static void dot_tile(const typename S::Scalar* a, int64_t a_row, const typename S::Scalar* b, int64_t b_row,
                     int64_t k, bool accumulate, typename S::Scalar* c, int64_t c_row) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    constexpr int W = S::kLanes;
    V sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) sum[r][j] = S::zero();
    const auto step = [&](auto load, auto fetch) {
        V x[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) x[r] = load(a + r * a_row);
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) {
            const V y = load(b + j * b_row);
            if (FETCH) fetch(b + (j + COLUMNS) * b_row);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sum[r][j] = S::fma(x[r], y, sum[r][j]);
        }
    };
    int64_t i = 0;
    const auto fetch = [&i](const T* p) { S::prefetch(p + i); };
    for (; i + W <= k; i += W) step([i](const T* p) { return S::load(p + i); }, fetch);
    if (i < k) step([i, k](const T* p) { return S::load_first(p + i, static_cast<int>(k - i)); }, fetch);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        T* out = c + r * c_row;
        T row[COLUMNS];
        if constexpr (COLUMNS % 4 == 0) {
#pragma GCC unroll 2
            for (int j = 0; j < COLUMNS; j += 4)
                S::sum4(sum[r][j], sum[r][j + 1], sum[r][j + 2], sum[r][j + 3], row + j);
        } else {
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; ++j) row[j] = S::sum(sum[r][j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) out[j] = row[j] + (accumulate ? out[j] : T(0));
    }
}

template <class S, int ROWS, bool FETCH>
static void dot_rows(const typename S::Scalar* a, int64_t a_row, const typename S::Scalar* b, int64_t b_row,
                     int64_t columns, int64_t k, bool accumulate, typename S::Scalar* c, int64_t c_row) {
    int64_t j = 0;
    if constexpr (ROWS == 1)  // four sums alone would wait for each other
        for (; j + 8 <= columns; j += 8)
            dot_tile<S, ROWS, 8, FETCH>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
    for (; j + 4 <= columns; j += 4)
        dot_tile<S, ROWS, 4, FETCH>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
    for (; j < columns; ++j)
        dot_tile<S, ROWS, 1, FETCH>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
}

// c [rows, columns]; a [rows, k], b [columns, k] with unit stride along k. FETCH where b comes from memory,
// one row behind the other: sums over lanes keep the processor from running ahead of them.
template <class S, bool FETCH = false>
static void dot(const typename S::Scalar* a, int64_t a_row, int64_t rows, const typename S::Scalar* b,
                int64_t b_row, int64_t columns, int64_t k, bool accumulate, typename S::Scalar* c,
                int64_t c_row) {
    constexpr int kRows = S::kRegisters == 32 ? 6 : 3;
    // A piece of b stays in L2 while the rows of a pass over it; a single pass over b needs no pieces. Its
    // rows are long, for adding up the lanes costs as much as 60 steps of k, but not so long that a lane's
    // sum loses digits.
    constexpr int64_t kPiece = 64 * 1024, kLongest = 2048;
    const bool once = rows <= kRows;
    const int64_t length = columns * kLongest > kPiece && !once ? kLongest / 2 : kLongest;
    const int64_t width = once ? columns : kPiece / (k > 0 && k < length ? k : length) / 4 * 4;
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += length) {
        const int64_t count = k - k0 < length ? k - k0 : length;
        for (int64_t j0 = 0; j0 < columns; j0 += width) {
            const int64_t taken_columns = columns - j0 < width ? columns - j0 : width;
            for (int64_t r = 0; r < rows;) {
                const auto run = [&](auto dot_function, int64_t taken) {
                    dot_function(a + r * a_row + k0, a_row, b + j0 * b_row + k0, b_row, taken_columns, count,
                                 accumulate || k0 > 0, c + r * c_row + j0, c_row);
                    r += taken;
                };
                const int64_t left = rows - r;
                const bool fetch = FETCH && r == 0;  // the rows behind find them there
                if (left >= kRows)
                    run(fetch ? dot_rows<S, kRows, FETCH> : dot_rows<S, kRows, false>, kRows);
                else if (left >= 4 && kRows >= 4)
                    run(fetch ? dot_rows<S, 4, FETCH> : dot_rows<S, 4, false>, 4);
                else if (left >= 2)
                    run(fetch ? dot_rows<S, 2, FETCH> : dot_rows<S, 2, false>, 2);
                else
                    run(fetch ? dot_rows<S, 1, FETCH> : dot_rows<S, 1, false>, 1);
            }
        }
    }
}

}  // namespace dcd::DCD_ISA
