// SPDX-License-Identifier: BSD-3-Clause
// Products whose lanes are output channels in panels of 16, see packed.h: the tile of tile.h for such
// operands. Rows are broadcast from A.
#pragma once

#include <utility>

#include "../packed.h"
#include "layer.h"

namespace dcd::DCD_ISA {

static inline int64_t panels_of(int64_t channels) {
    return (channels + kPanel - 1) / kPanel;
}

// c = act(scale * (init + A B) + A2 B2 + bias + residual). `x_panel` is the distance of two panels in x: 16
// where lanes lie next to each other.
template <class T>
struct PanelBlock {
    const T* a = nullptr;  // [rows, k], strides a_row, a_k
    int64_t a_row = 0, a_k = 1;
    const T* b = nullptr;  // [k, lanes], strides b_k, b_panel
    int64_t b_k = kPanel, b_panel = 0;
    int64_t k = 0;
    const T* a2 = nullptr;  // [rows, k2], unit stride along k2
    int64_t a2_row = 0;
    const T* b2 = nullptr;  // [k2, lanes], strides 16, b2_panel
    int64_t b2_panel = 0;
    int64_t k2 = 0;
    const T* init = nullptr;  // [rows, lanes]
    int64_t init_row = 0, init_panel = kPanel;
    const T *scale = nullptr, *bias = nullptr;  // [lanes]
    const T* residual = nullptr;                // [rows, lanes]
    int64_t residual_row = 0;
    T* c = nullptr;  // [rows, lanes]
    int64_t c_row = 0, c_panel = kPanel;
    int activation = kNone;
    const T* upcoming = nullptr;  // fetched on the way, a line a step of k
};

// Where vector `v` of the lanes begins, and how far it is to the next one of the same tile.
template <class S>
static inline int64_t lane_at(int64_t v, int64_t panel) {
    const int64_t lane = v * S::kLanes;
    return lane / kPanel * panel + lane % kPanel;
}
template <class S>
static inline int64_t lane_step(int64_t panel) {
    return S::kLanes == kPanel ? panel : S::kLanes;
}

// Bands of ROWS rows, one below the other.
template <class S, int ROWS, int VECTORS>
struct PanelTile {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    using Sums = V[ROWS][VECTORS];
    static constexpr int W = S::kLanes;
    static constexpr int64_t kLine = 64 / sizeof(T);

    // `lanes` of the VECTORS vectors are valid, at least one of the last. `fetch_step` leads from what one
    // band fetches to what the next one does.
    static void run(const PanelBlock<T>& s, int lanes, int64_t bands, int64_t fetch_step) {
        const T *a = s.a, *a2 = s.a2, *init = s.init, *residual = s.residual, *upcoming = s.upcoming;
        T* c = s.c;
        const bool full = lanes == VECTORS * W;
        for (int64_t band = 0; band < bands; ++band) {
            Sums acc;
            if (!init)
                each(acc, [](V, int, int) { return S::zero(); });
            else if (full)
                start<true>(acc, s, init, lanes);
            else
                start<false>(acc, s, init, lanes);
            product(acc, a, s.a_row, s.a_k, s.b, s.b_k, lane_step<S>(s.b_panel), s.k, upcoming);
            if (full)
                finish<true>(acc, s, a2, residual, c, lanes);
            else
                finish<false>(acc, s, a2, residual, c, lanes);
            a += ROWS * s.a_row, c += ROWS * s.c_row;
            if (a2) a2 += ROWS * s.a2_row;
            if (init) init += ROWS * s.init_row;
            if (residual) residual += ROWS * s.residual_row;
            upcoming += fetch_step;
        }
    }

  private:
    template <class F>
    static inline void each(Sums& acc, F f) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) acc[r][j] = f(acc[r][j], r, j);
    }

    template <bool FULL>
    static inline V load(const T* p, int j, int lanes) {
        return FULL || j < VECTORS - 1 ? S::load(p) : S::load_first(p, lanes - j * W);
    }

    template <bool FULL>
    static inline void start(Sums& acc, const PanelBlock<T>& s, const T* init, int lanes) {
        const int64_t step = lane_step<S>(s.init_panel);
        each(acc, [&](V, int r, int j) { return load<FULL>(init + r * s.init_row + j * step, j, lanes); });
    }

    template <bool FULL>
    static inline void finish(Sums& acc, const PanelBlock<T>& s, const T* a2, const T* residual, T* c,
                              int lanes) {
        V f[VECTORS];
        const auto factors = [&](const T* from) {
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) f[j] = load<FULL>(from + j * W, j, lanes);
        };
        if (s.scale) {
            factors(s.scale);
            each(acc, [&](V y, int, int j) { return S::mul(y, f[j]); });
        }
        if (s.k2) product(acc, a2, s.a2_row, 1, s.b2, kPanel, lane_step<S>(s.b2_panel), s.k2, s.b2);
        if (s.bias) {
            factors(s.bias);
            each(acc, [&](V y, int, int j) { return S::add(y, f[j]); });
        }
        if (residual)
            each(acc, [&](V y, int r, int j) {
                return S::add(y, load<FULL>(residual + r * s.residual_row + j * W, j, lanes));
            });
        if (s.activation != kNone) each(acc, [&](V y, int, int) { return activate<S>(y, s.activation); });
        const int64_t step = lane_step<S>(s.c_panel);
        each(acc, [&](V y, int r, int j) {
            T* to = c + r * s.c_row + j * step;
            if (FULL || j < VECTORS - 1)
                S::store(to, y);
            else
                S::store_first(to, y, lanes - j * W);
            return y;
        });
    }

    static inline void product(Sums& acc, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k,
                               int64_t b_step, int64_t k, const T* upcoming) {
        for (int64_t i = 0; i < k; ++i) {
            S::prefetch(upcoming);
            upcoming += kLine;
            V x[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) x[j] = S::load(b + j * b_step);
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
};

// Register blocks: rows that go with one, two or three vectors of lanes.
template <class S>
struct PanelShape {
    static constexpr bool kWide = S::kRegisters == 32;
    static constexpr int rows(int vectors) { return kWide ? (vectors == 3 ? 8 : 14) : 6; }
    static constexpr int kMost = kWide ? 3 : 2;  // vectors of a tile
};

template <class S>
using PanelTileFn = void (*)(const PanelBlock<typename S::Scalar>&, int, int64_t, int64_t);

template <class S, int VECTORS, int... ROWS>
static PanelTileFn<S> panel_tile(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr PanelTileFn<S> tiles[] = {&PanelTile<S, ROWS + 1, VECTORS>::run...};
    return tiles[rows - 1];
}

template <class S, int VECTORS>
static PanelTileFn<S> panel_tile(int rows) {
    return panel_tile<S, VECTORS>(rows, std::make_integer_sequence<int, PanelShape<S>::rows(VECTORS)>());
}

template <class S>
static PanelTileFn<S> panel_tile(int rows, int vectors) {
    if (vectors == 1) return panel_tile<S, 1>(rows);
    if constexpr (PanelShape<S>::kMost == 3)
        if (vectors == 3) return panel_tile<S, 3>(rows);
    return panel_tile<S, 2>(rows);
}

// A stretch of memory that will be read soon; tiles with nothing better to fetch advance in it.
template <class T>
struct Ahead {
    const T *next = nullptr, *end = nullptr;
    const T* take(int64_t lines, const T* otherwise) {
        if (next >= end) return otherwise;
        const T* taken = next;
        next += lines * int64_t(64 / sizeof(T));
        return taken;
    }
};

// What distinguishes samples that share A's layout and B: distances in elements.
struct SampleSteps {
    int64_t count = 1, a = 0, a2 = 0, scale = 0, bias = 0, residual = 0, c = 0;
};

// rows x lanes of each sample. Lanes and pieces of k are the outer loops: a piece of B stays in L1 while all
// rows pass.
template <class S>
static void multiply_panels(const PanelBlock<typename S::Scalar>& s, int64_t rows, int64_t lanes,
                            const SampleSteps& samples, Ahead<typename S::Scalar>& ahead) {
    using T = typename S::Scalar;
    constexpr int W = S::kLanes, kMost = PanelShape<S>::kMost;
    // Pieces of k cost a pass over the output each: only where a panel is a good part of L2.
    constexpr int64_t kLongest = 1024;
    constexpr int64_t kShort = 32;
    const int64_t vectors = (lanes + W - 1) / W;
    const int64_t pieces = most<int64_t>(1, (s.k + kLongest - 1) / kLongest);
    for (int64_t v = 0; v < vectors;) {
        const int64_t left = vectors - v;
        // Pairs, but triples where a lone vector would be left over, which would wait for its broadcasts, and
        // where k is so short that fewer passes over the rows pay.
        const bool triple = kMost == 3 && (left % 2 || (s.k <= kShort && vectors % 3 == 0));
        const int taken = static_cast<int>(least<int64_t>(left, triple ? 3 : 2));
        const int valid = static_cast<int>(least<int64_t>(lanes - v * W, taken * W));
        const int64_t bands = (rows + PanelShape<S>::rows(taken) - 1) / PanelShape<S>::rows(taken);
        PanelBlock<T> group = s;
        group.b = s.b ? s.b + lane_at<S>(v, s.b_panel) : nullptr;
        group.b2 = s.b2 ? s.b2 + lane_at<S>(v, s.b2_panel) : nullptr;
        group.c = s.c + lane_at<S>(v, s.c_panel);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t k0 = piece * s.k / pieces, k1 = (piece + 1) * s.k / pieces;
            const bool first = piece == 0, last = piece == pieces - 1;
            // The next piece of B, or the first of the next lanes: where the rows here end.
            const bool more = s.b && (!last || v + taken < vectors);
            const T* next_b = !more   ? nullptr
                              : !last ? group.b + k1 * s.b_k
                                      : s.b + lane_at<S>(v + taken, s.b_panel);
            PanelBlock<T> tile = group;
            tile.b += k0 * s.b_k, tile.k = k1 - k0;
            if (!last) {
                tile.scale = tile.bias = nullptr;
                tile.k2 = 0, tile.activation = kNone;
            }
            int64_t fetched = more && s.b_k == kPanel ? (taken * W + kPanel - 1) / kPanel : 0;
            for (int64_t n = 0; n < samples.count; ++n) {
                if (last && s.scale) tile.scale = s.scale + n * samples.scale + v * W;
                if (last && s.bias) tile.bias = s.bias + n * samples.bias + v * W;
                // Equal shares, the taller ones first: a thin band would wait for its few sums.
                const int64_t height0 = rows / bands, taller = rows % bands;
                for (int64_t i = 0, together; i < bands; i += together) {
                    const int64_t r0 = i * height0 + least(i, taller), height = height0 + (i < taller);
                    together = i < taller ? taller - i : bands - i;
                    if (fetched > 0) together = least(together, fetched);
                    tile.a = s.a ? s.a + n * samples.a + r0 * s.a_row + k0 * s.a_k : nullptr;
                    tile.c = group.c + n * samples.c + r0 * s.c_row;
                    if (!first)
                        tile.init = tile.c, tile.init_row = s.c_row, tile.init_panel = s.c_panel;
                    else if (s.init)
                        tile.init = s.init + r0 * s.init_row + lane_at<S>(v, s.init_panel);
                    if (last && s.a2) tile.a2 = s.a2 + n * samples.a2 + r0 * s.a2_row;
                    if (last && s.residual)
                        tile.residual = s.residual + n * samples.residual + r0 * s.residual_row + v * W;
                    else
                        tile.residual = nullptr;
                    int64_t step;
                    if (fetched > 0) {
                        fetched -= together;
                        tile.upcoming = next_b + fetched * s.b_panel, step = s.b_panel;
                    } else {
                        tile.upcoming = ahead.take(together * tile.k, tile.b);
                        step = tile.upcoming == tile.b ? 0 : tile.k * int64_t(64 / sizeof(T));
                    }
                    panel_tile<S>(static_cast<int>(height), taken)(tile, valid, together, step);
                }
            }
        }
        v += taken;
    }
}

}  // namespace dcd::DCD_ISA
