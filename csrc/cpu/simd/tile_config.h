// SPDX-License-Identifier: BSD-3-Clause
// The operand of ldtilecfg (Intel SDM, volume 1, chapter 18): the shapes of eight tile registers.
#pragma once

#include <cstdint>

namespace dcd {

struct alignas(64) TileConfig {
    uint8_t palette = 1;  // tiles of at most 16 rows of 64 bytes
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void shape(int tile, int64_t tile_rows, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<uint16_t>(tile_rows ? bytes : 0);
    }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace dcd
