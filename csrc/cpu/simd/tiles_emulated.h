// SPDX-License-Identifier: BSD-3-Clause
// Tile registers in memory, with the operations of simd/tiles_amx.h as the SDM defines them, down to the
// order of the roundings; what would fault there throws here. So the kernels run where there is no AMX.
#pragma once

#include <math.h>

#include <cfloat>
#include <cstring>
#include <stdexcept>

#include "tile_config.h"

namespace dcd::DCD_ISA {

// No inline function of the standard library: this file's version, for this file's processor, could be linked
// everywhere.
class Tiles {
  public:
    // Loading a configuration zeroes every tile.
    void configure(const TileConfig& config) {
        need(config.palette == 1 && config.start_row == 0, "tiles: palette or start row");
        for (const uint8_t byte : config.reserved) need(byte == 0, "tiles: reserved bytes");
        for (int t = 0; t < 16; ++t) {
            need(config.rows[t] <= 16 && config.row_bytes[t] <= 64,
                 "tiles: a tile beyond 16 rows of 64 bytes");
            need((config.rows[t] == 0) == (config.row_bytes[t] == 0), "tiles: a tile with one size zero");
            need(t < 8 || config.rows[t] == 0, "tiles: a ninth tile");
        }
        config_ = config;
        std::memset(data_, 0, sizeof(data_));
        configured_ = true;
    }
    void release() { configured_ = false; }

    template <int TILE>
    void zero() {
        need_tile(TILE);
        std::memset(data_[TILE], 0, sizeof(data_[TILE]));
    }
    // Bytes and rows beyond the shape become zero.
    template <int TILE>
    void load(const void* from, int64_t row_bytes) {
        zero<TILE>();
        for (int r = 0; r < config_.rows[TILE]; ++r)
            std::memcpy(data_[TILE][r], static_cast<const char*>(from) + r * row_bytes,
                        config_.row_bytes[TILE]);
    }
    template <int TILE>
    void store(void* to, int64_t row_bytes) {
        need_tile(TILE);
        for (int r = 0; r < config_.rows[TILE]; ++r)
            std::memcpy(static_cast<char*>(to) + r * row_bytes, data_[TILE][r], config_.row_bytes[TILE]);
    }
    // TDPBF16PS: sums of the even and of the odd members of the pairs, each by fused multiply-adds, then one
    // addition of both and one to the tile; everything denormal is zero.
    template <int C, int A, int B>
    void dot_bf16() {
        static_assert(C != A && C != B && A != B);
        need_tile(C), need_tile(A), need_tile(B);
        const int rows = config_.rows[C], pairs = config_.row_bytes[A] / 4, lanes = config_.row_bytes[C] / 4;
        need(config_.rows[A] == rows && config_.rows[B] == pairs && config_.row_bytes[B] == 4 * lanes &&
                 config_.row_bytes[A] % 4 == 0 && config_.row_bytes[C] % 4 == 0,
             "tiles: shapes that do not fit each other");
        for (int m = 0; m < rows; ++m) {
            float sum[16], even[16] = {}, odd[16] = {};
            for (int k = 0; k < pairs; ++k)
                for (int n = 0; n < lanes; ++n) {
                    even[n] = flushed(fmaf(number(A, m, 2 * k), number(B, k, 2 * n), even[n]));
                    odd[n] = flushed(fmaf(number(A, m, 2 * k + 1), number(B, k, 2 * n + 1), odd[n]));
                }
            std::memcpy(sum, data_[C][m], sizeof(sum));
            for (int n = 0; n < lanes; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
            std::memcpy(data_[C][m], sum, sizeof(sum));
        }
    }

  private:
    static void need(bool fits, const char* what) {
        if (!fits) throw std::logic_error(what);
    }
    void need_tile(int tile) const {
        need(configured_ && config_.rows[tile] > 0, "tiles: a tile that is not configured");
    }
    static float flushed(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }
    float number(int tile, int row, int place) const {
        uint16_t half;
        std::memcpy(&half, data_[tile][row] + 2 * place, sizeof(half));
        const uint32_t bits = uint32_t(half) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof(x));
        return flushed(x);
    }

    bool configured_ = false;
    TileConfig config_;
    alignas(64) char data_[8][16][64];
};

}  // namespace dcd::DCD_ISA
