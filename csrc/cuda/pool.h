// SPDX-License-Identifier: BSD-3-Clause
// Channel sums of an image: what the pooling kernels are told, and how their work is laid out.
#pragma once

#include <cstdint>

#include "../branch.h"
#include "elements.h"

namespace dcd::cuda {

enum class Element : int { kFloat, kHalf, kBFloat };

struct PoolParams {
    const void* input;               // [N, C, P]
    int64_t sample, channel, pixel;  // its strides, in elements
    int64_t batch, channels, pixels;
    int tiles;            // T = pool_tiles(P)
    int64_t tile_pixels;  // of each tile but the last ones
    float* sums;          // [N, T, C]
};

// A grid of kPoolThreads-thread blocks: x within a sample, y over the samples.
struct PoolPlan {
    bool planes;     // a channel's pixels lie side by side, else a pixel's channels do
    bool wide;       // 16-byte loads of a pixel's channels (planes always take as many as there are)
    int lanes;       // planes: threads that share a tile. Else: threads side by side on a pixel's channels
    int64_t blocks;  // along x
    int64_t rows;    // along y; a block takes every rows-th sample
};

constexpr int kPoolThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kPoolMaxItems = (int64_t{1} << 31) - kPoolThreads;  // C·T: their index is an int

// Whether one of the two kernels can read the image where it lies.
inline bool pool_reads_in_place(const PoolParams& s) {
    return s.pixel == 1 || s.pixels == 1 || s.channel == 1 || s.channels == 1;
}

inline PoolPlan plan_pool(const PoolParams& s, int element_size) {
    PoolPlan plan{};
    plan.rows = s.batch < kMaxGridY ? s.batch : kMaxGridY;
    const int vector = 16 / element_size;
    // a single pixel is a row of channels, if these lie side by side
    plan.planes = s.pixels == 1 ? s.channel != 1 : s.pixel == 1;
    if (plan.planes) {
        plan.wide = true;
        // Few loads of 16 bytes a tile: a whole warp would spend its time adding up its lanes.
        plan.lanes = s.tile_pixels <= 32 * vector ? 8 : kWarp;
        const int64_t tiles_a_block = kPoolThreads / plan.lanes;
        plan.blocks = (s.channels * s.tiles + tiles_a_block - 1) / tiles_a_block;
        return plan;
    }
    const auto aligned = [&](int64_t stride) { return stride % vector == 0; };
    plan.wide = reinterpret_cast<uintptr_t>(s.input) % 16 == 0 && aligned(s.channels) &&
                (s.pixels == 1 || aligned(s.pixel)) && (s.batch == 1 || aligned(s.sample));
    const int64_t vectors = plan.wide ? s.channels / vector : s.channels;
    // 128 bytes side by side are enough for the memory; the rest of the block takes other pixels, as long as
    // there are a few for each thread.
    int lanes = 1;
    const auto too_few_pixels = [&] { return kPoolThreads / lanes * int64_t{4} > s.tile_pixels; };
    while (lanes < kWarp && lanes < vectors && (lanes < 8 || too_few_pixels())) lanes *= 2;
    plan.lanes = lanes;
    plan.blocks = (vectors + lanes - 1) / lanes * s.tiles;
    return plan;
}

// A run of elements in memory as its 16-byte loads and what is left before and behind them.
struct Run {
    int head;         // single elements up to the first multiple of 16 bytes
    int64_t vectors;  // 16-byte loads
    int tail;         // single elements behind them
};

template <class E>
DCD_INDEX Run split_run(const E* from, int64_t count) {
    constexpr int v = kVector<E>;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(E) % v);
    Run run;
    run.head = (v - past) % v;
    if (run.head > count) run.head = static_cast<int>(count);
    run.vectors = (count - run.head) / v;
    run.tail = static_cast<int>(count - run.head - run.vectors * v);
    return run;
}

// Pixels of tile t.
DCD_INDEX int64_t tile_count(const PoolParams& s, int64_t t) {
    const int64_t left = s.pixels - t * s.tile_pixels;
    return left < 0 ? 0 : left < s.tile_pixels ? left : s.tile_pixels;
}

// One lane's share of the sum over tile `item % T` of channel `item / T`. Groups of `lanes` threads own an
// item.
template <class E>
DCD_BODY float sum_plane(const PoolParams& s, int64_t sample, int item, int lane, int lanes) {
    const int channel = item / s.tiles, tile = item - channel * s.tiles;
    const E* from =
        static_cast<const E*>(s.input) + sample * s.sample + channel * s.channel + tile * s.tile_pixels;
    const Run run = split_run(from, tile_count(s, tile));
    float sum = 0.0f;
    if (lane < run.head) sum = to_float(load_one(from + lane));
    const E* behind = from + run.head + run.vectors * kVector<E>;
    if (lane < run.tail) sum += to_float(load_one(behind + lane));
    from += run.head;
    DCD_UNROLL_BY_4
    for (int64_t i = lane; i < run.vectors; i += lanes) {
        float values[kVector<E>];
        load_vector(from + i * kVector<E>, values);
        float part = (values[0] + values[1]) + (values[2] + values[3]);
        if constexpr (kVector<E> == 8) part += (values[4] + values[5]) + (values[6] + values[7]);
        sum += part;
    }
    return sum;
}

// One thread's share of the sums of V neighbouring channels: every `step`-th pixel of the tile.
template <class E, int V>
DCD_BODY void sum_pixels(const PoolParams& s, int64_t sample, int64_t tile, int64_t channel, int64_t first,
                         int64_t step, float (&sums)[V]) {
    DCD_UNROLL
    for (int i = 0; i < V; ++i) sums[i] = 0.0f;
    if (channel >= s.channels) return;
    const E* from = static_cast<const E*>(s.input) + sample * s.sample + channel * s.channel +
                    tile * s.tile_pixels * s.pixel;
    const int64_t count = tile_count(s, tile);
    DCD_UNROLL_BY_4
    for (int64_t p = first; p < count; p += step) {
        if constexpr (V == 1) {
            sums[0] += to_float(load_one(from + p * s.pixel));
        } else {
            float values[V];
            load_vector(from + p * s.pixel, values);
            DCD_UNROLL
            for (int i = 0; i < V; ++i) sums[i] += values[i];
        }
    }
}

// The kernels. M is the machine: on the GPU its intrinsics (machine.h), in the tests a block that runs
// serially.

// Each group of LANES threads: the sum of one tile of one plane.
template <class E, int LANES, class M>
DCD_BODY void pool_planes(const M& m, const PoolParams& s) {
    const int items = static_cast<int>(s.channels * s.tiles);
    const int64_t place = m.block_x() * (kPoolThreads / LANES) + m.thread() / LANES;
    const int item = place < items ? static_cast<int>(place) : items;
    const int lane = m.thread() % LANES;
    for (int64_t n = m.block_y(); n < s.batch; n += m.grid_y()) {
        // every thread of a warp takes part in the exchange, also where there is no item for it
        float sum = item < items ? sum_plane<E>(s, n, item, lane, LANES) : 0.0f;
        DCD_UNROLL
        for (int apart = LANES / 2; apart; apart /= 2) sum += m.exchange(sum, apart);
        if (lane == 0 && item < items) {
            const int channel = item / s.tiles, tile = item - channel * s.tiles;
            s.sums[(n * s.tiles + tile) * s.channels + channel] = sum;
        }
    }
}

// Each block: the sums of lanes·V channels over one tile. `shared` has room for kPoolThreads / kWarp times as
// many numbers.
template <class E, int V, class M>
DCD_BODY void pool_pixels(const M& m, const PoolParams& s, int lanes, float* shared) {
    const int64_t channel_blocks = (s.channels + lanes * V - 1) / (lanes * V);
    const int64_t tile = m.block_x() / channel_blocks;
    const int64_t first = (m.block_x() - tile * channel_blocks) * lanes * V;
    const int across = m.thread() % lanes, row = m.thread() / lanes;
    const int warp = m.thread() / kWarp, width = lanes * V;
    for (int64_t n = m.block_y(); n < s.batch; n += m.grid_y()) {
        float sums[V];
        sum_pixels<E, V>(s, n, tile, first + across * V, row, kPoolThreads / lanes, sums);
        for (int apart = lanes; apart < kWarp; apart *= 2) {
            DCD_UNROLL
            for (int i = 0; i < V; ++i) sums[i] += m.exchange(sums[i], apart);
        }
        if (m.thread() % kWarp < lanes) {
            DCD_UNROLL
            for (int i = 0; i < V; ++i) shared[warp * width + across * V + i] = sums[i];
        }
        m.sync();
        const int64_t channel = first + m.thread();
        if (m.thread() < width && channel < s.channels) {
            float sum = 0.0f;
            DCD_UNROLL
            for (int w = 0; w < kPoolThreads / kWarp; ++w) sum += shared[w * width + m.thread()];
            s.sums[(n * s.tiles + tile) * s.channels + channel] = sum;
        }
        m.sync();  // before the next sample's sums go there
    }
}

// Starts the kernel that plan_pool chooses on the given stream (a cudaStream_t). Returns null, or what CUDA
// says.
const char* launch_pool(const PoolParams& s, Element element, void* stream);

}  // namespace dcd::cuda
