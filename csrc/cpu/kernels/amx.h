// SPDX-License-Identifier: BSD-3-Clause
// Products of bf16 by tiles: 16 rows x 16 lanes of sums in a register, up to 32 of the axis that is summed
// over in an instruction. fp32 is split, x = high + low: high high + high low + low high in the same sums, of
// which only low low, 2^-18 of the result, is missing.
#pragma once

#include <type_traits>

#include "../simd/tile_config.h"
#include "pairs.h"

namespace dcd::DCD_ISA {

// The tiles of one task: they are configured when shapes change, and released with the task.
template <class Tiles>
class TileUnit : public Tiles {
  public:
    TileUnit() = default;
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
    ~TileUnit() {
        if (step_) Tiles::release();
    }
    // Sums in tiles 0 to 3: two of `top` rows, two of `bottom`; rows in 4 and 5, lanes in 6 and 7, `step` of
    // the summed axis in each.
    void prepare(int64_t top, int64_t bottom, int64_t step) {
        if (top == top_ && bottom == bottom_ && step == step_) return;
        TileConfig config;
        for (int j = 0; j < 2; ++j) {
            config.shape(j, top, 64);
            config.shape(2 + j, bottom, 64);
            config.shape(6 + j, step / 2, 64);
        }
        config.shape(4, top, 2 * step);
        config.shape(5, bottom, 2 * step);
        Tiles::configure(config);
        top_ = top, bottom_ = bottom, step_ = step;
    }

  private:
    int64_t top_ = 0, bottom_ = 0, step_ = 0;
};

// See widened.h for what the members mean.
template <class Simd, class Tiles, bool SPLIT>
struct Amx {
    using S = Simd;
    using T = std::conditional_t<SPLIT, float, Bfloat16>;
    using Operand = uint16_t;
    static constexpr Products kProducts = Products::kAmx;
    static constexpr bool kFinishes = false;
    static constexpr bool kSplit = SPLIT;
    static constexpr int64_t kBand = 32;
    using Unit = TileUnit<Tiles>;

    // A short row is one narrow tile, a longer one whole tiles.
    static constexpr int64_t kStep = 32;
    static int64_t depth(int64_t k) { return k <= kStep ? (k + 1) / 2 * 2 : (k + kStep - 1) / kStep * kStep; }
    static int64_t row(int64_t k) { return (SPLIT ? 2 : 1) * depth(k); }
    static int64_t plane(int64_t k, int64_t lanes) { return Pairs<S>::lanes_size(depth(k), lanes); }
    static int64_t lanes_size(int64_t k, int64_t lanes) { return (SPLIT ? 2 : 1) * plane(k, lanes); }
    static bool direct(int64_t k) { return !SPLIT && k == depth(k); }
    static const uint16_t* as_rows(const Bfloat16* p) { return &p->bits; }
    static const uint16_t* as_rows(const float*) { return nullptr; }

    template <class F>
    static void to_rows(const F* from, int64_t from_row, int64_t rows, int64_t k, uint16_t* to) {
        if constexpr (SPLIT) {
            using P = Pairs<S>;
            P::template to_rows<Part::kHigh>(from, from_row, rows, k, depth(k), to, row(k));
            P::template to_rows<Part::kLow>(from, from_row, rows, k, depth(k), to + depth(k), row(k));
        } else {
            Pairs<S>::to_rows(from, from_row, rows, k, depth(k), to, row(k));
        }
    }
    template <class F>
    static void to_lanes(const F* from, int64_t from_k, int64_t k, int64_t lanes, uint16_t* to) {
        if constexpr (SPLIT) {
            using P = Pairs<S>;
            P::template to_lanes<Part::kHigh>(from, from_k, k, lanes, depth(k), to);
            P::template to_lanes<Part::kLow>(from, from_k, k, lanes, depth(k), to + plane(k, lanes));
        } else {
            Pairs<S>::to_lanes(from, from_k, k, lanes, depth(k), to);
        }
    }
    static void rows_to_lanes(const uint16_t* from, int64_t from_row, int64_t lanes, int64_t k,
                              uint16_t* to) {
        Pairs<S>::rows_to_lanes(from, from_row, lanes, depth(k), to);
        if (SPLIT) Pairs<S>::rows_to_lanes(from + depth(k), from_row, lanes, depth(k), to + plane(k, lanes));
    }
    static void lanes_to_rows(const uint16_t* from, int64_t rows, int64_t k, uint16_t* to) {
        Pairs<S>::lanes_to_rows(from, rows, depth(k), to, row(k));
        if (SPLIT) Pairs<S>::lanes_to_rows(from + plane(k, rows), rows, depth(k), to + depth(k), row(k));
    }

    static void multiply(Unit& unit, const uint16_t* rows, int64_t row, int64_t row_count,
                         const uint16_t* lanes, int64_t all_lanes, int64_t first, int64_t count, int64_t k,
                         float* c, int64_t c_row) {
        const int64_t top = row_count > 16 ? (row_count + 1) / 2 : row_count, bottom = row_count - top;
        unit.prepare(top, bottom, least(kStep, depth(k)));
        const int64_t vector = 16 * depth(k), vectors = Pairs<S>::vectors(count);
        const Panel panel{rows, row, lanes + first / 16 * vector, vector, k, plane(k, all_lanes), top};
        for (int64_t v = 0; v < vectors; v += 2) {
            const bool wide = v + 1 < vectors;
            float* to = c + 16 * v;
            if (bottom && wide)
                block<true, true>(unit, panel, v, to, c_row);
            else if (bottom)
                block<true, false>(unit, panel, v, to, c_row);
            else if (wide)
                block<false, true>(unit, panel, v, to, c_row);
            else
                block<false, false>(unit, panel, v, to, c_row);
        }
    }

  private:
    struct Panel {
        const uint16_t* rows;
        int64_t row;
        const uint16_t* lanes;
        int64_t vector, k, plane, top;
    };

    // TALL: there are rows below the top tile. WIDE: two vectors of lanes.
    template <bool TALL, bool WIDE>
    static void block(Unit& unit, const Panel& panel, int64_t v, float* c, int64_t c_row) {
        unit.template zero<0>();
        if constexpr (WIDE) unit.template zero<1>();
        if constexpr (TALL) unit.template zero<2>();
        if constexpr (TALL && WIDE) unit.template zero<3>();
        const uint16_t* lanes = panel.lanes + v * panel.vector;
        const int64_t low = depth(panel.k);
        if constexpr (SPLIT) {  // the small products first
            add<TALL, WIDE>(unit, panel, panel.rows + low, lanes);
            add<TALL, WIDE>(unit, panel, panel.rows, lanes + panel.plane);
        }
        add<TALL, WIDE>(unit, panel, panel.rows, lanes);
        const int64_t bytes = c_row * static_cast<int64_t>(sizeof(float));
        unit.template store<0>(c, bytes);
        if constexpr (WIDE) unit.template store<1>(c + 16, bytes);
        if constexpr (TALL) unit.template store<2>(c + panel.top * c_row, bytes);
        if constexpr (TALL && WIDE) unit.template store<3>(c + panel.top * c_row + 16, bytes);
    }

    template <bool TALL, bool WIDE>
    static void add(Unit& unit, const Panel& panel, const uint16_t* rows, const uint16_t* lanes) {
        const int64_t all = depth(panel.k), step = least(kStep, all), bytes = 2 * panel.row;
        for (int64_t k = 0; k < all; k += step) {
            unit.template load<4>(rows + k, bytes);
            unit.template load<6>(lanes + 16 * k, 64);
            unit.template dot_bf16<0, 4, 6>();
            if constexpr (WIDE) {
                unit.template load<7>(lanes + panel.vector + 16 * k, 64);
                unit.template dot_bf16<1, 4, 7>();
            }
            if constexpr (TALL) {
                unit.template load<5>(rows + panel.top * panel.row + k, bytes);
                unit.template dot_bf16<2, 5, 6>();
            }
            if constexpr (TALL && WIDE) unit.template dot_bf16<3, 5, 7>();
        }
    }
};

}  // namespace dcd::DCD_ISA
