// SPDX-License-Identifier: BSD-3-Clause
// Operands of bf16 products: pairs of bf16 along the axis that is summed over, 32 bits each. Rows hold their
// pairs one behind the other, as memory does. Lanes come in vectors of 16: [vectors, pairs, 16 lanes, 2].
#pragma once

#include <immintrin.h>

#include <cstring>

#include "mixed_finish.h"

namespace dcd::DCD_ISA {

// Needs the AVX-512 of simd/avx512.h. `depth` is the length of a row with its padding, an even number. PART
// is what of each number is taken: all of a bf16 or a rounded fp32, or half of an fp32 that is split in two.
enum class Part { kWhole, kHigh, kLow };

template <class S>
struct Pairs {
    static_assert(S::kLanes == 16);
    static constexpr int64_t kLanes = 16;
    static int64_t vectors(int64_t lanes) { return (lanes + kLanes - 1) / kLanes; }
    static int64_t lanes_size(int64_t depth, int64_t lanes) { return vectors(lanes) * kLanes * depth; }

    // from [rows, k], zeros behind k
    template <Part PART = Part::kWhole, class F>
    static void to_rows(const F* from, int64_t from_row, int64_t rows, int64_t k, int64_t depth, uint16_t* to,
                        int64_t to_row) {
        for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
            for (int64_t i = 0; i < k; i += kLanes)
                _mm256_mask_storeu_epi16(to + i, first(k - i), load<PART>(from + i, k - i));
            for (int64_t i = k; i < depth; ++i) to[i] = 0;
        }
    }

    // from [k, lanes]; pairs behind k and lanes behind the last are zero
    template <Part PART = Part::kWhole, class F>
    static void to_lanes(const F* from, int64_t from_k, int64_t k, int64_t lanes, int64_t depth,
                         uint16_t* to) {
        const auto put = [&](int64_t i, int64_t j) {
            const F* at = from + i * from_k + j;
            const int64_t count = lanes - j;
            const __m256i zero = _mm256_setzero_si256();
            const __m256i even = i < k ? load<PART>(at, count) : zero;
            const __m256i odd = i + 1 < k ? load<PART>(at + from_k, count) : zero;
            const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                                  _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
            _mm512_storeu_si512(to + j * depth + i * kLanes, pairs);
        };
        // Whole rows one after the other are read the fastest, but vectors far apart fall on one set of L1.
        constexpr int64_t kShort = 32;
        if (depth <= kShort) {
            for (int64_t i = 0; i < depth; i += 2)
                for (int64_t j = 0; j < lanes; j += kLanes) put(i, j);
        } else {
            for (int64_t j = 0; j < lanes; j += kLanes)
                for (int64_t i = 0; i < depth; i += 2) put(i, j);
        }
    }

    // Lanes are the rows of `from`, `depth` long: 32-bit numbers of which this is the transpose.
    static void rows_to_lanes(const uint16_t* from, int64_t from_row, int64_t lanes, int64_t depth,
                              uint16_t* to) {
        alignas(64) uint16_t padded[2 * kLanes * kLanes];
        for (int64_t j = 0; j < lanes; j += kLanes, from += kLanes * from_row)
            for (int64_t i = 0; i < depth; i += 2 * kLanes) {
                const int64_t rows = least(kLanes, lanes - j), columns = least(2 * kLanes, depth - i);
                const uint16_t* block = from + i;
                int64_t row = from_row;
                if (rows < kLanes || columns < 2 * kLanes || row % 2) {
                    std::memset(padded, 0, sizeof(padded));
                    for (int64_t r = 0; r < rows; ++r)
                        std::memcpy(padded + r * 2 * kLanes, block + r * row,
                                    static_cast<size_t>(columns) * sizeof(*padded));
                    block = padded, row = 2 * kLanes;
                }
                if (columns < 2 * kLanes) {
                    alignas(64) uint16_t turned[2 * kLanes * kLanes];
                    transpose_pairs(block, row, turned, 2 * kLanes);
                    std::memcpy(to, turned, static_cast<size_t>(columns * kLanes) * sizeof(*to));
                } else {
                    transpose_pairs(block, row, to, 2 * kLanes);
                }
                to += columns * kLanes;
            }
    }

    // The way back; `to` has whole vectors of rows, an even number apart.
    static void lanes_to_rows(const uint16_t* from, int64_t rows, int64_t depth, uint16_t* to,
                              int64_t to_row) {
        for (int64_t j = 0; j < rows; j += kLanes, to += kLanes * to_row)
            for (int64_t i = 0; i < depth; i += 2 * kLanes) {
                const int64_t columns = least(2 * kLanes, depth - i);
                if (columns == 2 * kLanes) {
                    transpose_pairs(from, 2 * kLanes, to + i, to_row);
                } else {
                    alignas(64) uint16_t block[2 * kLanes * kLanes] = {}, turned[2 * kLanes * kLanes];
                    std::memcpy(block, from, static_cast<size_t>(columns * kLanes) * sizeof(*block));
                    transpose_pairs(block, 2 * kLanes, turned, 2 * kLanes);
                    for (int64_t r = 0; r < kLanes; ++r)
                        std::memcpy(to + r * to_row + i, turned + r * 2 * kLanes,
                                    static_cast<size_t>(columns) * sizeof(*to));
                }
                from += columns * kLanes;
            }
    }

    static __mmask16 first(int64_t count) {
        return count >= kLanes ? __mmask16(0xffff) : S::first(static_cast<int>(count));
    }

  private:
    template <Part PART>
    static __m256i load(const Bfloat16* p, int64_t count) {
        static_assert(PART == Part::kWhole);
        return _mm256_maskz_loadu_epi16(first(count), p);
    }
    template <Part PART>
    static __m256i load(const float* p, int64_t count) {
        const __m512 x = _mm512_maskz_loadu_ps(first(count), p);
        if (PART == Part::kWhole) return S::narrowed(x);
        // Rounded to the nearest, but cut off where that is infinite: there both parts are cut off.
        constexpr int kNanOrInfinite = 0x99, kInfinite = 0x18;
        const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(x, kNanOrInfinite));
        __m512 high = S::widened(S::narrowed(x));
        const __mmask16 over = _mm512_mask_fpclass_ps_mask(finite, high, kInfinite);
        high = cut(x, over, high);
        if (PART == Part::kHigh) return S::narrowed(high);
        // Nothing is left of what is not finite: infinity less itself would be NaN.
        const __m512 low = _mm512_maskz_sub_ps(finite, x, high);
        return S::narrowed(cut(low, over, low));
    }
    // The first 16 bits of x where asked, else `other`.
    static __m512 cut(__m512 x, __mmask16 where, __m512 other) {
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-0x10000));
        return _mm512_mask_mov_ps(other, where, _mm512_castsi512_ps(bits));
    }
    // A square of 16 pairs; rows are a number of bf16 apart.
    static void transpose_pairs(const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row) {
        S::transpose(reinterpret_cast<const float*>(from), from_row / 2, reinterpret_cast<float*>(to),
                     to_row / 2);
    }
};

}  // namespace dcd::DCD_ISA
