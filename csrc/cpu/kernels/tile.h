// SPDX-License-Identifier: BSD-3-Clause
// The one inner loop: a block of rows x lanes of  c = act(scale * (init + A B) + A2 B2 + bias + residual),
// held in registers from the first product to the store. Rows are broadcast from A, lanes are vectors of B.
//
// Contiguous maps take output channels as rows and pixels as lanes, channels_last maps the reverse; the
// synthesis of W_n, the latent projections and the input gradient are the same block with other operands (see
// pointwise.h).
#pragma once

#include <cstdint>

#include "../params.h"

namespace dcd::DCD_ISA {

template <class T>
struct Block {
    const T* a = nullptr;  // [rows, k], strides a_row, a_k
    int64_t a_row = 0, a_k = 0;
    const T* b = nullptr;  // [k, lanes], row stride b_k
    int64_t b_k = 0;
    int64_t k = 0;
    const T* a2 = nullptr;  // [rows, k2]
    int64_t a2_row = 0, a2_k = 0;
    const T* b2 = nullptr;  // [k2, lanes]
    int64_t b2_k = 0;
    int64_t k2 = 0;
    const T* init = nullptr;  // [rows, lanes]
    int64_t init_row = 0;
    // Per-channel factors. Along the rows: scale[row]. Along the lanes: scale[row * scale_row + lane].
    bool along_lanes = false;
    const T* scale = nullptr;
    int64_t scale_row = 0;
    const T* bias = nullptr;
    int64_t bias_row = 0;
    const T* residual = nullptr;  // [rows, lanes]
    int64_t residual_row = 0;
    T* c = nullptr;  // [rows, lanes]
    int64_t c_row = 0;
    int activation = kNone;
    // What the next panel of B will read: one line a step of k, or all of its lines where no other band
    // shares the work, for its rows are too far apart for the hardware to guess.
    const T* upcoming = nullptr;
    bool lone = false;
    // How many rows ahead of a band A or C is asked for, where it comes from memory: rows of pixels, of which
    // the hardware does not follow two or three streams at once. Its rows are contiguous then.
    int64_t fetch_a = 0, fetch_c = 0;

    Block at(int64_t row, int64_t lane) const {
        Block s = *this;
        if (a) s.a += row * a_row;
        if (b) s.b += lane;
        if (a2) s.a2 += row * a2_row;
        if (b2) s.b2 += lane;
        if (init) s.init += row * init_row + lane;
        if (scale) s.scale += along_lanes ? row * scale_row + lane : row;
        if (bias) s.bias += along_lanes ? row * bias_row + lane : row;
        if (residual) s.residual += row * residual_row + lane;
        s.c += row * c_row + lane;
        return s;
    }
};

template <class S>
static inline typename S::Vec activate(typename S::Vec x, int activation) {
    using T = typename S::Scalar;
    switch (activation) {
        case kRelu:
            return S::max(S::zero(), x);
        case kRelu6:
            return S::min(S::set1(T(6)), S::max(S::zero(), x));
        case kSilu:
            return S::div(x, S::add(S::set1(T(1)), S::exp(S::sub(S::zero(), x))));
        case kHardswish: {
            const auto gate = S::min(S::set1(T(6)), S::max(S::zero(), S::add(x, S::set1(T(3)))));
            return S::mul(x, S::mul(gate, S::set1(T(1) / T(6))));
        }
        default:
            return x;
    }
}

// ROWS x VECTORS accumulators; the last vector has `tail` valid lanes when TAIL.
template <class S, int ROWS, int VECTORS, bool TAIL>
struct Tile {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    static constexpr int W = S::kLanes;

    static inline V load(const T* p, int j, int tail) {
        return TAIL && j == VECTORS - 1 ? S::load_first(p + j * W, tail) : S::load(p + j * W);
    }

    template <int LINES>
    static inline void product(V (&acc)[ROWS][VECTORS], const T* a, int64_t a_row, int64_t a_k, const T* b,
                               int64_t b_k, int64_t k, int tail, const T* upcoming) {
        for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < LINES; ++j) S::prefetch(upcoming + j * W);
            upcoming += b_k;
            V x[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) x[j] = load(b, j, tail);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const V w = S::set1(a[r * a_row]);
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[r][j] = S::fma(w, x[j], acc[r][j]);
            }
            a += a_k;
            b += b_k;
        }
    }

    static void run(const Block<T>& s, int tail) {
        V acc[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) acc[r][j] = S::zero();
        if (s.init) {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[r][j] = load(s.init + r * s.init_row, j, tail);
        }
        if (s.lone)
            product<VECTORS>(acc, s.a, s.a_row, s.a_k, s.b, s.b_k, s.k, tail, s.upcoming);
        else
            product<1>(acc, s.a, s.a_row, s.a_k, s.b, s.b_k, s.k, tail, s.upcoming);
        if (s.scale)
            each(acc, s.scale, s.scale_row, s.along_lanes, tail, [](V a, V f) { return S::mul(a, f); });
        product<1>(acc, s.a2, s.a2_row, s.a2_k, s.b2, s.b2_k, s.k2, tail, s.b2);
        if (s.bias) each(acc, s.bias, s.bias_row, s.along_lanes, tail, [](V a, V f) { return S::add(a, f); });
        if (s.residual)
            each(acc, s.residual, s.residual_row, true, tail, [](V a, V f) { return S::add(a, f); });
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            T* c = s.c + r * s.c_row;
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) {
                const V y = s.activation == kNone ? acc[r][j] : activate<S>(acc[r][j], s.activation);
                if (TAIL && j == VECTORS - 1)
                    S::store_first(c + j * W, y, tail);
                else
                    S::store(c + j * W, y);
            }
        }
    }

  private:
    template <class F>
    static inline void each(V (&acc)[ROWS][VECTORS], const T* f, int64_t f_row, bool along_lanes, int tail,
                            F op) {
        if (along_lanes) {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[r][j] = op(acc[r][j], load(f + r * f_row, j, tail));
        } else {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const V w = S::set1(f[r]);
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[r][j] = op(acc[r][j], w);
            }
        }
    }
};

// The register block of an instruction set: 24 accumulators of 32 registers, 12 of 16.
template <class S>
struct Shape {
    static constexpr int kRows = S::kRegisters == 32 ? 8 : 4;
    static constexpr int kVectors = 3;
    static constexpr int kLanes = kVectors * S::kLanes;
};

template <class S>
using TileFn = void (*)(const Block<typename S::Scalar>&, int);

template <class S, int ROWS, int VECTORS>
static TileFn<S> tile_of(bool tail) {
    return tail ? &Tile<S, ROWS, VECTORS, true>::run : &Tile<S, ROWS, VECTORS, false>::run;
}

template <class S, int ROWS>
static TileFn<S> tile_of(int vectors, bool tail) {
    switch (vectors) {
        case 1:
            return tile_of<S, ROWS, 1>(tail);
        case 2:
            return tile_of<S, ROWS, 2>(tail);
        default:
            return tile_of<S, ROWS, 3>(tail);
    }
}

template <class S>
static TileFn<S> tile_of(int rows, int vectors, bool tail) {
    if constexpr (Shape<S>::kRows == 8) {
        switch (rows) {
            case 8:
                return tile_of<S, 8>(vectors, tail);
            case 7:
                return tile_of<S, 7>(vectors, tail);
            case 6:
                return tile_of<S, 6>(vectors, tail);
            case 5:
                return tile_of<S, 5>(vectors, tail);
            default:
                break;
        }
    }
    switch (rows) {
        case 4:
            return tile_of<S, 4>(vectors, tail);
        case 3:
            return tile_of<S, 3>(vectors, tail);
        case 2:
            return tile_of<S, 2>(vectors, tail);
        default:
            return tile_of<S, 1>(vectors, tail);
    }
}

// Asks for rows of `count` elements that will be read soon.
template <class S>
static inline void fetch_rows(const typename S::Scalar* from, int64_t rows, int64_t row, int64_t count) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < count; i += S::kLanes) S::prefetch(from + r * row + i);
}

// Whether a map of these sizes comes from memory rather than from L2, where asking ahead costs a tenth.
static inline bool worth_fetching(int64_t pixels, int64_t channels, int64_t least_size = 256 * 1024) {
    return pixels * channels >= least_size;
}

// How many rows of `channels` elements are 4 kB, at least a band of them; 0: not worth it.
template <class S>
static inline int64_t rows_ahead(int64_t pixels, int64_t channels, int64_t least_size = 256 * 1024) {
    if (!worth_fetching(pixels, channels, least_size)) return 0;
    const int64_t rows = 1024 / channels;
    return rows > Shape<S>::kRows ? rows : Shape<S>::kRows;
}

// rows x lanes of the block, lanes in the outer loop so that one panel of B serves all rows while it is in
// L1.
template <class S>
static void multiply(const Block<typename S::Scalar>& block, int64_t rows, int64_t lanes) {
    constexpr int W = S::kLanes;
    const int64_t vectors = (lanes + W - 1) / W;
    const int64_t columns = (vectors + Shape<S>::kVectors - 1) / Shape<S>::kVectors;
    const int64_t bands = (rows + Shape<S>::kRows - 1) / Shape<S>::kRows;
    for (int64_t j = 0; j < columns; ++j) {
        // Equal shares instead of full tiles and a thin rest: a thin tile waits for the latency of its few
        // sums.
        const int64_t v0 = j * vectors / columns, v1 = (j + 1) * vectors / columns;
        const int64_t width = v1 * W < lanes ? v1 * W : lanes;
        const int tail = static_cast<int>(width - (v1 - 1) * W);
        for (int64_t i = 0; i < bands; ++i) {
            const int64_t r0 = i * rows / bands, r1 = (i + 1) * rows / bands;
            Block<typename S::Scalar> tile = block.at(r0, v0 * W);
            if (j == 0 && block.fetch_a)
                fetch_rows<S>(block.a + (r0 + block.fetch_a) * block.a_row, r1 - r0, block.a_row, block.k);
            if (j == 0 && block.fetch_c)
                fetch_rows<S>(block.c + (r0 + block.fetch_c) * block.c_row, r1 - r0, block.c_row, lanes);
            // Each band fetches one vector of the next panel; the panel that is in L1 already is a prefetch
            // that costs nothing.
            const bool more = block.b && v1 + i < vectors && i < Shape<S>::kVectors;
            tile.upcoming = more ? block.b + (v1 + i) * W : tile.b;
            tile.lone = more && bands == 1;
            tile_of<S>(static_cast<int>(r1 - r0), static_cast<int>(v1 - v0), tail != W)(tile, tail);
        }
    }
}

}  // namespace dcd::DCD_ISA
