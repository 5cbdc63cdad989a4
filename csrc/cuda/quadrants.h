// SPDX-License-Identifier: BSD-3-Clause
// Channel sums over the four bins of adaptive pooling to 2x2, which overlap on odd sizes: what pool.h is for
// whole images. The image is read once; what two bins share comes from the cache the second time.
#pragma once

#include "pool.h"

namespace dcd::cuda {

struct QuadrantParams {
    PoolParams pool;  // sums [N, T, C, 2, 2]
    int height, width;
    int tile_rows;  // of each bin, in every tile but the last one
};

// Within a sample and channel, pixels are counted in ints.
constexpr int64_t kQuadrantMaxPixels = (int64_t{1} << 31) - 1;

// `pool` is complete but for the size of its tiles.
inline QuadrantParams quadrant_params(const PoolParams& pool, int64_t height, int64_t width) {
    QuadrantParams s{pool, static_cast<int>(height), static_cast<int>(width), 0};
    const int64_t rows = quadrant_tile_rows(height, width);
    s.tile_rows = static_cast<int>(rows < half_up(height) ? rows : half_up(height));
    s.pool.tile_pixels = int64_t{2} * s.tile_rows * width;
    return s;
}

// Rows of each bin in tile t.
DCD_INDEX int tile_row_count(const QuadrantParams& s, int t) {
    const int left = static_cast<int>(half_up(s.height)) - t * s.tile_rows;
    return left < 0 ? 0 : left < s.tile_rows ? left : s.tile_rows;
}

// One lane's share of both bins of the rows that begin at `from`, `count` pixels in all.
template <class E>
DCD_BODY void sum_rows(const E* from, int64_t count, int width, int lane, int lanes, float& left,
                       float& right) {
    constexpr int v = kVector<E>;
    const int left_end = (width + 1) / 2, right_begin = width / 2;
    left = right = 0.0f;
    const auto add = [&](float value, int column) {
        // not times 0 or 1, which would spread NaN and infinity
        if (column < left_end) left += value;
        if (column >= right_begin) right += value;
    };
    const Run run = split_run(from, count);
    if (lane < run.head) add(to_float(load_one(from + lane)), lane % width);
    const int vectors_end = run.head + static_cast<int>(run.vectors) * v;
    if (lane < run.tail) add(to_float(load_one(from + vectors_end + lane)), (vectors_end + lane) % width);
    from += run.head;
    int first = (run.head + lane * v) % width;
    const int step = lanes * v % width;
    const auto add_vectors = [&](auto next) {
        DCD_UNROLL_BY_4
        for (int64_t i = lane; i < run.vectors; i += lanes) {
            float values[v];
            load_vector(from + i * v, values);
            int column = first;
            DCD_UNROLL
            for (int k = 0; k < v; ++k) {
                add(values[k], column);
                column = next(column);
            }
            first += step;
            if (first >= width) first -= width;
        }
    };
    // Where no vector goes on in the next row, a fifth of the work is spared.
    if (run.head == 0 && width % v == 0)
        add_vectors([](int column) { return column + 1; });
    else
        add_vectors([&](int column) { return column + 1 == width ? 0 : column + 1; });
}

// Each group of LANES threads: the four sums of one tile of one plane.
template <class E, int LANES, class M>
DCD_BODY void pool_plane_quadrants(const M& m, const QuadrantParams& s) {
    const PoolParams& pool = s.pool;
    const int items = static_cast<int>(pool.channels * pool.tiles);
    const int64_t place = m.block_x() * (kPoolThreads / LANES) + m.thread() / LANES;
    const int item = place < items ? static_cast<int>(place) : items;
    const int lane = m.thread() % LANES;
    const int channel = item / pool.tiles, tile = item - channel * pool.tiles;
    for (int64_t n = m.block_y(); n < pool.batch; n += m.grid_y()) {
        float sums[kQuadrants] = {};
        // every thread of a warp takes part in the exchange, also where there is no item for it
        if (item < items) {
            const E* plane = static_cast<const E*>(pool.input) + n * pool.sample + channel * pool.channel;
            const int64_t count = int64_t{tile_row_count(s, tile)} * s.width;
            DCD_UNROLL
            for (int below = 0; below < 2; ++below) {
                const int64_t row = below * (s.height / 2) + tile * s.tile_rows;
                sum_rows(plane + row * s.width, count, s.width, lane, LANES, sums[2 * below],
                         sums[2 * below + 1]);
            }
        }
        DCD_UNROLL
        for (int b = 0; b < kQuadrants; ++b) {
            DCD_UNROLL
            for (int apart = LANES / 2; apart; apart /= 2) sums[b] += m.exchange(sums[b], apart);
        }
        if (lane < kQuadrants && item < items) {
            const float mine = lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
            pool.sums[((n * pool.tiles + tile) * pool.channels + channel) * kQuadrants + lane] = mine;
        }
    }
}

// One thread's share of one bin's sums of V neighbouring channels: every `step`-th of its pixels in the tile.
template <class E, int V>
DCD_BODY void sum_bin_pixels(const QuadrantParams& s, int64_t sample, int tile, int bin, int64_t channel,
                             int first, int step, float (&sums)[V]) {
    DCD_UNROLL
    for (int i = 0; i < V; ++i) sums[i] = 0.0f;
    const PoolParams& pool = s.pool;
    if (channel >= pool.channels) return;
    const int across = (s.width + 1) / 2, count = tile_row_count(s, tile) * across;
    const int row = bin / 2 * (s.height / 2) + tile * s.tile_rows + first / across;
    int column = first % across;
    const E* from = static_cast<const E*>(pool.input) + sample * pool.sample + channel * pool.channel +
                    (int64_t{row} * s.width + bin % 2 * (s.width / 2) + column) * pool.pixel;
    const int columns = step % across;
    const int64_t further = (int64_t{step / across} * s.width + columns) * pool.pixel;
    const int64_t to_next_row = int64_t{s.width - across} * pool.pixel;
    DCD_UNROLL_BY_4
    for (int p = first; p < count; p += step) {
        if constexpr (V == 1) {
            sums[0] += to_float(load_one(from));
        } else {
            float values[V];
            load_vector(from, values);
            DCD_UNROLL
            for (int i = 0; i < V; ++i) sums[i] += values[i];
        }
        from += further;
        column += columns;
        if (column >= across) column -= across, from += to_next_row;
    }
}

// Each block: the four sums of lanes·V channels over one tile, a quarter of the warps on each. `shared` has
// room for kPoolThreads / kWarp times lanes·V numbers.
template <class E, int V, class M>
DCD_BODY void pool_pixel_quadrants(const M& m, const QuadrantParams& s, int lanes, float* shared) {
    constexpr int warps = kPoolThreads / kWarp, bins = static_cast<int>(kQuadrants);
    const PoolParams& pool = s.pool;
    const int width = lanes * V;
    const int64_t channel_blocks = (pool.channels + width - 1) / width;
    const int tile = static_cast<int>(m.block_x() / channel_blocks);
    const int64_t first = (m.block_x() - tile * channel_blocks) * width;
    const int warp = m.thread() / kWarp, across = m.thread() % lanes;
    const int row = warp / bins * (kWarp / lanes) + m.thread() % kWarp / lanes;
    for (int64_t n = m.block_y(); n < pool.batch; n += m.grid_y()) {
        float sums[V];
        sum_bin_pixels<E, V>(s, n, tile, warp % bins, first + across * V, row, kPoolThreads / bins / lanes,
                             sums);
        for (int apart = lanes; apart < kWarp; apart *= 2) {
            DCD_UNROLL
            for (int i = 0; i < V; ++i) sums[i] += m.exchange(sums[i], apart);
        }
        if (m.thread() % kWarp < lanes) {
            DCD_UNROLL
            for (int i = 0; i < V; ++i) shared[warp * width + across * V + i] = sums[i];
        }
        m.sync();
        for (int i = m.thread(); i < bins * width; i += kPoolThreads) {
            const int64_t channel = first + i / bins;
            if (channel >= pool.channels) break;
            float sum = 0.0f;
            DCD_UNROLL
            for (int w = 0; w < warps / bins; ++w) sum += shared[(w * bins + i % bins) * width + i / bins];
            pool.sums[((n * pool.tiles + tile) * pool.channels + channel) * bins + i % bins] = sum;
        }
        m.sync();  // before the next sample's sums go there
    }
}

// Starts the kernel that plan_pool chooses on the given stream (a cudaStream_t). Returns null, or what CUDA
// says.
const char* launch_quadrants(const QuadrantParams& s, Element element, void* stream);

}  // namespace dcd::cuda
