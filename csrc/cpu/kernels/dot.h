// Sums over the contiguous axis: c[r, j] (+)= sum_k a[r, k] b[j, k], lanes along k. What reductions over pixels of
// contiguous maps and products with a row-major weight need, without transposing either operand.
#pragma once

#include "tile.h"

namespace dcd::DCD_ISA {

template <class S>
struct DotShape {
  static constexpr int kRows = S::kRegisters == 32 ? 4 : 3;
  static constexpr int kColumns = S::kRegisters == 32 ? 6 : 4;
};

template <class S, int ROWS, int COLUMNS>
static void dot_tile(const typename S::Scalar* a, int64_t a_row, const typename S::Scalar* b, int64_t b_row, int64_t k,
                     bool accumulate, typename S::Scalar* c, int64_t c_row) {
  using V = typename S::Vec;
  constexpr int W = S::kLanes;
  V sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) sum[r][j] = S::zero();
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    V x[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = S::load(a + r * a_row + i);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const V y = S::load(b + j * b_row + i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r][j] = S::fma(x[r], y, sum[r][j]);
    }
  }
  if (i < k) {
    const int rest = static_cast<int>(k - i);
    V x[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = S::load_first(a + r * a_row + i, rest);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const V y = S::load_first(b + j * b_row + i, rest);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r][j] = S::fma(x[r], y, sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      typename S::Scalar& target = c[r * c_row + j];
      target = S::sum(sum[r][j]) + (accumulate ? target : 0);
    }
}

template <class S, int ROWS>
static void dot_row(const typename S::Scalar* a, int64_t a_row, const typename S::Scalar* b, int64_t b_row,
                    int64_t columns, int64_t k, bool accumulate, typename S::Scalar* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + DotShape<S>::kColumns <= columns; j += DotShape<S>::kColumns)
    dot_tile<S, ROWS, DotShape<S>::kColumns>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
  for (; j + 2 <= columns; j += 2) dot_tile<S, ROWS, 2>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
  if (j < columns) dot_tile<S, ROWS, 1>(a, a_row, b + j * b_row, b_row, k, accumulate, c + j, c_row);
}

// c [rows, columns]; a [rows, k], b [columns, k] with unit stride along k.
template <class S>
static void dot(const typename S::Scalar* a, int64_t a_row, int64_t rows, const typename S::Scalar* b, int64_t b_row,
                int64_t columns, int64_t k, bool accumulate, typename S::Scalar* c, int64_t c_row) {
  // Blocks of k that keep all of b's rows in L2 while the rows of a pass over them.
  const int64_t fit = 64 * 1024 / (columns > 0 ? columns : 1) / S::kLanes * S::kLanes;
  const int64_t step = fit < 16 * S::kLanes ? 16 * S::kLanes : fit;
  for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += step) {
    const int64_t count = k - k0 < step ? k - k0 : step;
    const bool add = accumulate || k0 > 0;
    int64_t r = 0;
    for (; r + DotShape<S>::kRows <= rows; r += DotShape<S>::kRows)
      dot_row<S, DotShape<S>::kRows>(a + r * a_row + k0, a_row, b + k0, b_row, columns, count, add, c + r * c_row,
                                     c_row);
    for (; r < rows; ++r)
      dot_row<S, 1>(a + r * a_row + k0, a_row, b + k0, b_row, columns, count, add, c + r * c_row, c_row);
  }
}

}  // namespace dcd::DCD_ISA
