// SPDX-License-Identifier: BSD-3-Clause
// Sums over the contiguous axis: c[r, j] (+)= sum_k a[r, k] b[j, k], lanes along k. What reductions over
// pixels of contiguous maps and products with a row-major weight need, without transposing either operand.
#pragma once

#include "tile.h"

namespace dcd::DCD_ISA {

template <class S, int ROWS, int COLUMNS>
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
    const auto step = [&](auto load) {
        V x[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) x[r] = load(a + r * a_row);
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) {
            const V y = load(b + j * b_row);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sum[r][j] = S::fma(x[r], y, sum[r][j]);
        }
    };
    int64_t i = 0;
    for (; i + W <= k; i += W) step([i](const T* p) { return S::load(p + i); });
    if (i < k) step([i, k](const T* p) { return S::load_first(p + i, static_cast<int>(k - i)); });
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

template <class S, int ROWS>
static void dot_rows(const typename S::Scalar* a, int64_t a_row, const typename S::Scalar* b, int64_t b_row,
                     int64_t columns, int64_t k, bool accumulate, typename S::Scalar* c, int64_t c_row) {
    int64_t j = 0;
    if constexpr (ROWS == 1)  // four sums alone would wait for each other
        for (; j + 8 <= columns; j += 8)
            dot_tile<S, ROWS, 8>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
    for (; j + 4 <= columns; j += 4)
        dot_tile<S, ROWS, 4>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
    for (; j < columns; ++j)
        dot_tile<S, ROWS, 1>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
}

// c [rows, columns]; a [rows, k], b [columns, k] with unit stride along k.
template <class S>
static void dot(const typename S::Scalar* a, int64_t a_row, int64_t rows, const typename S::Scalar* b,
                int64_t b_row, int64_t columns, int64_t k, bool accumulate, typename S::Scalar* c,
                int64_t c_row) {
    constexpr int kRows = S::kRegisters == 32 ? 6 : 3;
    // Blocks of k that keep all of b's rows in L2 while the rows of a pass over them; a single pass needs
    // none.
    const int64_t fit = 64 * 1024 / (columns > 0 ? columns : 1) / S::kLanes * S::kLanes;
    const int64_t step = rows <= kRows ? (k > 0 ? k : 1) : fit < 16 * S::kLanes ? 16 * S::kLanes : fit;
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += step) {
        const int64_t count = k - k0 < step ? k - k0 : step;
        const bool add = accumulate || k0 > 0;
        for (int64_t r = 0; r < rows;) {
            const auto run = [&](auto dot_function, int64_t taken) {
                dot_function(a + r * a_row + k0, a_row, b + k0, b_row, columns, count, add, c + r * c_row,
                             c_row);
                r += taken;
            };
            const int64_t left = rows - r;
            if (left >= kRows)
                run(dot_rows<S, kRows>, kRows);
            else if (left >= 4 && kRows >= 4)
                run(dot_rows<S, 4>, 4);
            else if (left >= 2)
                run(dot_rows<S, 2>, 2);
            else
                run(dot_rows<S, 1>, 1);
        }
    }
}

}  // namespace dcd::DCD_ISA
