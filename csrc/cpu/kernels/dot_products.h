// SPDX-License-Identifier: BSD-3-Clause
// Products of bf16 by vdpbf16ps: a lane adds two products to its sum.
#pragma once

#include "pairs.h"

namespace dcd::DCD_ISA {

// Rows and lanes of one product, their summed axis in pairs.
struct PairProduct {
    const uint16_t* rows = nullptr;
    int64_t row = 0;
    const uint16_t* lanes = nullptr;
    int64_t vector = 0;  // from one vector of lanes to the next
    int64_t pairs = 0;
};

// ROWS x VECTORS sums, in registers from the first product to the store; `last` are the lanes that the last
// vector has.
template <int ROWS, int VECTORS>
struct DotTile {
    using Sums = __m512[ROWS][VECTORS];

    static inline void add(Sums& sum, const PairProduct& s) {
        for (int64_t k = 0; k < s.pairs; ++k) {
            __m512bh x[VECTORS];
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; ++j)
                x[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(s.lanes + j * s.vector + k * 32));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                std::memcpy(&pair, s.rows + r * s.row + 2 * k, sizeof(pair));
                const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
                for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], w, x[j]);
            }
        }
    }

    static inline __mmask16 mask(int j, __mmask16 last) {
        return j == VECTORS - 1 ? last : __mmask16(0xffff);
    }

    template <class F>
    static inline void each(Sums& sum, const float* factor, bool along_lanes, __mmask16 last, F op) {
        if (along_lanes) {
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; ++j) {
                const __m512 f = _mm512_maskz_loadu_ps(mask(j, last), factor + 16 * j);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) sum[r][j] = op(sum[r][j], f);
            }
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const __m512 f = _mm512_set1_ps(factor[r]);
#pragma GCC unroll 3
                for (int j = 0; j < VECTORS; ++j) sum[r][j] = op(sum[r][j], f);
            }
        }
    }

    static inline void start(Sums& sum, const PairProduct& product) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
        add(sum, product);
    }

    // c = the product, whole vectors of it
    static void run(const PairProduct& product, float* c, int64_t c_row) {
        Sums sum;
        start(sum, product);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(c + r * c_row + 16 * j, sum[r][j]);
    }

    // f.to = act(lam * product + second + bias + residual); the sums of f are not read
    template <class S>
    static void finish(const PairProduct& product, const PairProduct& second, const Finish<Bfloat16>& f,
                       int64_t lanes) {
        const auto add_up = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
        const __mmask16 last = S::first(static_cast<int>(lanes - 16 * (VECTORS - 1)));
        Sums sum;
        start(sum, product);
        if (f.lam)
            each(sum, f.lam, f.along_lanes, last, [](__m512 a, __m512 b) { return _mm512_mul_ps(a, b); });
        add(sum, second);
        if (f.bias) each(sum, f.bias, f.along_lanes, last, add_up);
        if (f.residual) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
                for (int j = 0; j < VECTORS; ++j)
                    sum[r][j] = _mm512_add_ps(sum[r][j],
                                              S::widened(_mm256_maskz_loadu_epi16(
                                                  mask(j, last), f.residual + r * f.residual_row + 16 * j)));
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; ++j) {
                __m512 y = sum[r][j];
                if (f.activation != kNone) y = activate<S>({y}, f.activation).v;
                _mm256_mask_storeu_epi16(f.to + r * f.to_row + 16 * j, mask(j, last), S::narrowed(y));
            }
    }
};

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
        const PairProduct product = product_of(rows, row, lanes, first, k);
        for_columns(count, [&](int64_t v0, int64_t vectors, int64_t) {
            tile_of(row_count, vectors)(at(product, 0, v0), c + v0 * 16, c_row);
        });
    }

    // One step of mixed.h: both products and the writing of the map at once.
    static constexpr bool kFinishes = true;
    static PairProduct product_of(const uint16_t* rows, int64_t row, const uint16_t* lanes, int64_t first,
                                  int64_t k) {
        const int64_t depth = DotProducts::row(k);
        return {rows, row, lanes + first * depth, 16 * depth, depth / 2};
    }
    // `memory`: as much as a row of each product.
    static void multiply_and_finish(const PairProduct& product, const PairProduct& second, const Finish<T>& f,
                                    int64_t rows, int64_t lanes, uint16_t* memory) {
        // A last pixel alone (49 are 3 vectors and 1) is done with lanes along the summed axis.
        const bool thin = !f.along_lanes && lanes > 16 && lanes % 16 == 1;
        const int64_t whole = thin ? lanes - 1 : lanes;
        uint16_t* const lone = memory;
        uint16_t* const lone_second = memory + 2 * product.pairs;
        if (thin) take_lane(product, whole, lone), take_lane(second, whole, lone_second);
        // Panels of lanes come from L2 for every band of rows, at no loss, and rows are written as a whole.
        const int64_t bands = (rows + kBand - 1) / kBand;
        for (int64_t i = 0; i < bands; ++i) {
            const int64_t r0 = i * rows / bands, r1 = (i + 1) * rows / bands;
            if (f.along_lanes && i + 1 < bands) fetch(at(product, r1, 0), (i + 2) * rows / bands - r1);
            for_columns(whole, [&](int64_t v0, int64_t vectors, int64_t count) {
                finishing_tile_of(r1 - r0, vectors)(at(product, r0, v0), at(second, r0, v0),
                                                    at(f, r0, 16 * v0), count);
            });
            if (!thin) continue;
            float sums[kBand], added[kBand];
            sum_rows(at(product, r0, 0), lone, r1 - r0, sums);
            if (second.pairs) sum_rows(at(second, r0, 0), lone_second, r1 - r0, added);
            Finish<T> last = at(f, r0, whole);
            last.sums = sums, last.second = second.pairs ? added : nullptr, last.row = 1;
            finish_rows<S, T, false>(last, r1 - r0, 1);
        }
    }

  private:
    // Rows of the next band: several at once, each with a page of its own, are more than the hardware
    // follows.
    static void fetch(const PairProduct& product, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < product.pairs; k += 16)
                _mm_prefetch(reinterpret_cast<const char*>(product.rows + r * product.row + 2 * k),
                             _MM_HINT_T0);
    }
    // One lane of a product as a row.
    static void take_lane(const PairProduct& product, int64_t lane, uint16_t* to) {
        const uint16_t* from = product.lanes + lane / 16 * product.vector + lane % 16 * 2;
        for (int64_t k = 0; k < product.pairs; ++k) std::memcpy(to + 2 * k, from + 32 * k, 2 * sizeof(*to));
    }
    // sums[r] = row r times x, r < rows
    static void sum_rows(const PairProduct& product, const uint16_t* x, int64_t rows, float* sums) {
        if (rows == kBand)
            sum_rows_of<kBand>(product, x, sums);
        else
            for (int64_t r = 0; r < rows; ++r) sum_rows_of<1>(at(product, r, 0), x, sums + r);
    }
    template <int ROWS>
    static void sum_rows_of(const PairProduct& product, const uint16_t* x, float* sums) {
        __m512 sum[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sum[r] = _mm512_setzero_ps();
        for (int64_t k = 0; k < product.pairs; k += 16) {
            const __mmask16 pairs = Pairs<S>::first(product.pairs - k);
            const __m512bh v = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(pairs, x + 2 * k));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
                sum[r] = _mm512_dpbf16_ps(sum[r],
                                          reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(
                                              pairs, product.rows + r * product.row + 2 * k)),
                                          v);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_reduce_add_ps(sum[r]);
    }

    // f(first vector, vectors, lanes) for panels of at most three vectors, in equal shares
    template <class F>
    static void for_columns(int64_t lanes, const F& f) {
        const int64_t vectors = Pairs<S>::vectors(lanes), columns = (vectors + 2) / 3;
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t v0 = j * vectors / columns, v1 = (j + 1) * vectors / columns;
            f(v0, v1 - v0, least(lanes, 16 * v1) - 16 * v0);
        }
    }
    static PairProduct at(PairProduct product, int64_t row, int64_t vector) {
        product.rows += row * product.row, product.lanes += vector * product.vector;
        return product;
    }
    static Finish<T> at(Finish<T> f, int64_t row, int64_t lane) {
        const int64_t factor = f.along_lanes ? lane : row;
        if (f.lam) f.lam += factor;
        if (f.bias) f.bias += factor;
        if (f.residual) f.residual += row * f.residual_row + lane;
        f.to += row * f.to_row + lane;
        return f;
    }

    using TileFn = void (*)(const PairProduct&, float*, int64_t);
    using FinishingTileFn = void (*)(const PairProduct&, const PairProduct&, const Finish<T>&, int64_t);
#define DCD_ROWS(n, run) {&DotTile<n, 1>::run, &DotTile<n, 2>::run, &DotTile<n, 3>::run}
#define DCD_TILES(run)                                                       \
    {DCD_ROWS(1, run), DCD_ROWS(2, run), DCD_ROWS(3, run), DCD_ROWS(4, run), \
     DCD_ROWS(5, run), DCD_ROWS(6, run), DCD_ROWS(7, run), DCD_ROWS(8, run)}
    static TileFn tile_of(int64_t rows, int64_t vectors) {
        static constexpr TileFn tiles[kBand][3] = DCD_TILES(run);
        return tiles[rows - 1][vectors - 1];
    }
    static FinishingTileFn finishing_tile_of(int64_t rows, int64_t vectors) {
        static constexpr FinishingTileFn tiles[kBand][3] = DCD_TILES(template finish<S>);
        return tiles[rows - 1][vectors - 1];
    }
#undef DCD_TILES
#undef DCD_ROWS
};

}  // namespace dcd::DCD_ISA
