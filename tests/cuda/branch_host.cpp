// SPDX-License-Identifier: BSD-3-Clause
// The bodies of pool.cu and branch.cu on the CPU, behind functions that the tests call through ctypes.
#include "cuda/branch_body.h"
#include "cuda/quadrants.h"
#include "fibers.h"

namespace {

// What may be read. Counts how often each byte of the first range was.
struct Range {
    const char* begin;
    const char* end;
};
std::vector<Range> readable;
std::vector<uint8_t> counts;
std::string error;

void allow(const void* from, int64_t bytes) {
    if (from) readable.push_back({static_cast<const char*>(from), static_cast<const char*>(from) + bytes});
}

template <class F>
const char* guarded(const F& f) {
    error.clear();
    try {
        f();
    } catch (const std::exception& raised) {
        error = raised.what();
    }
    readable.clear();
    return error.empty() ? nullptr : error.c_str();
}

template <class F>
void with_element(int element, const F& f) {
    if (element == 0)
        f(float{});
    else if (element == 1)
        f(dcd::Half{});
    else
        f(dcd::BFloat{});
}

int element_size(int element) {
    return element == 0 ? 4 : 2;
}

}  // namespace

namespace dcd::cuda {

void check_read(const void* from, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % bytes) throw std::runtime_error("a read is not aligned");
    const char* at = static_cast<const char*>(from);
    for (size_t i = 0; i < readable.size(); ++i) {
        if (at < readable[i].begin || at + bytes > readable[i].end) continue;
        if (i == 0)
            for (size_t b = 0; b < bytes; ++b) ++counts[at - readable[0].begin + b];
        return;
    }
    throw std::runtime_error("a read is out of bounds");
}

}  // namespace dcd::cuda

using namespace dcd;
using namespace dcd::cuda;

extern "C" {

int64_t host_pool_tiles(int64_t pixels) {
    return pool_tiles(pixels);
}

float host_to_float(int element, uint32_t bits) {
    return element == 1 ? to_float(Half{static_cast<uint16_t>(bits)})
                        : to_float(BFloat{static_cast<uint16_t>(bits)});
}

int64_t host_quadrant_tiles(int64_t height, int64_t width) {
    return quadrant_tiles(height, width);
}

// input lies within `bytes` bytes at `allocation`; read_counts [bytes]; plan [5]
const char* host_pool(int element, const void* input, const int64_t* strides, int64_t batch, int64_t channels,
                      int64_t pixels, float* sums, const void* allocation, int64_t bytes,
                      uint8_t* read_counts, int64_t* plan_out) {
    return guarded([&] {
        PoolParams s{};
        s.input = input, s.sums = sums;
        s.sample = strides[0], s.channel = strides[1], s.pixel = strides[2];
        s.batch = batch, s.channels = channels, s.pixels = pixels;
        s.tiles = static_cast<int>(pool_tiles(pixels)), s.tile_pixels = pool_tile_pixels(pixels, s.tiles);
        if (!pool_reads_in_place(s)) throw std::runtime_error("cannot be read in place");
        const PoolPlan plan = plan_pool(s, element_size(element));
        const int64_t told[] = {plan.planes, plan.wide, plan.lanes, plan.blocks, plan.rows};
        std::copy(told, told + 5, plan_out);
        counts.assign(static_cast<size_t>(bytes), 0);
        allow(allocation, bytes);
        with_element(element, [&](auto zero) {
            using E = decltype(zero);
            const int v = plan.wide && !plan.planes ? kVector<E> : 1;
            for (int64_t y = 0; y < plan.rows; ++y)
                for (int64_t x = 0; x < plan.blocks; ++x) {
                    fibers::Cluster cluster(1, kPoolThreads, kPoolThreads * v);
                    cluster.run([&](int block, int thread) {
                        const fibers::Machine m{&cluster, block, thread, x, y, plan.rows};
                        if (plan.planes && plan.lanes == kWarp)
                            pool_planes<E, kWarp>(m, s);
                        else if (plan.planes)
                            pool_planes<E, 8>(m, s);
                        else if (plan.wide)
                            pool_pixels<E, kVector<E>>(m, s, plan.lanes, cluster.shared(0));
                        else
                            pool_pixels<E, 1>(m, s, plan.lanes, cluster.shared(0));
                    });
                }
        });
        std::copy(counts.begin(), counts.end(), read_counts);
    });
}

// The same for the four bins of 2x2; sizes: batch, channels, height, width
const char* host_quadrants(int element, const void* input, const int64_t* strides, const int64_t* sizes,
                           float* sums, const void* allocation, int64_t bytes, uint8_t* read_counts,
                           int64_t* plan_out) {
    return guarded([&] {
        PoolParams pool{};
        pool.input = input, pool.sums = sums;
        pool.sample = strides[0], pool.channel = strides[1], pool.pixel = strides[2];
        pool.batch = sizes[0], pool.channels = sizes[1], pool.pixels = sizes[2] * sizes[3];
        pool.tiles = static_cast<int>(quadrant_tiles(sizes[2], sizes[3]));
        const QuadrantParams s = quadrant_params(pool, sizes[2], sizes[3]);
        if (!pool_reads_in_place(pool)) throw std::runtime_error("cannot be read in place");
        const PoolPlan plan = plan_pool(s.pool, element_size(element));
        const int64_t told[] = {plan.planes, plan.wide, plan.lanes, plan.blocks, plan.rows};
        std::copy(told, told + 5, plan_out);
        counts.assign(static_cast<size_t>(bytes), 0);
        allow(allocation, bytes);
        with_element(element, [&](auto zero) {
            using E = decltype(zero);
            const int v = plan.wide && !plan.planes ? kVector<E> : 1;
            for (int64_t y = 0; y < plan.rows; ++y)
                for (int64_t x = 0; x < plan.blocks; ++x) {
                    fibers::Cluster cluster(1, kPoolThreads, kPoolThreads * v);
                    cluster.run([&](int block, int thread) {
                        const fibers::Machine m{&cluster, block, thread, x, y, plan.rows};
                        if (plan.planes && plan.lanes == kWarp)
                            pool_plane_quadrants<E, kWarp>(m, s);
                        else if (plan.planes)
                            pool_plane_quadrants<E, 8>(m, s);
                        else if (plan.wide)
                            pool_pixel_quadrants<E, kVector<E>>(m, s, plan.lanes, cluster.shared(0));
                        else
                            pool_pixel_quadrants<E, 1>(m, s, plan.lanes, cluster.shared(0));
                    });
                }
        });
        std::copy(counts.begin(), counts.end(), read_counts);
    });
}

// sizes: batch, tiles, inputs, hidden, outputs, lam_channels; codes: gate, lam; device: processors, shared
// bytes, clusters; plan [5]: samples, ranks, and whether each matrix is read 16 bytes at a time
const char* host_branch(int element, const float* sums, float scale, const void* const* matrices,
                        const void* const* biases, const int64_t* sizes, const int* codes,
                        const int64_t* device, float* lam, float* phi, int64_t* plan_out) {
    return guarded([&] {
        BranchParams s{};
        s.sums = sums, s.scale = scale, s.lam = lam, s.others = phi;
        s.squeeze = matrices[0], s.gate = matrices[1], s.expand = matrices[2], s.phi = matrices[3];
        s.squeeze_bias = biases[0], s.gate_bias = biases[1], s.expand_bias = biases[2],
        s.phi_bias = biases[3];
        s.batch = sizes[0], s.tiles = static_cast<int>(sizes[1]), s.inputs = static_cast<int>(sizes[2]);
        s.hidden = static_cast<int>(sizes[3]), s.outputs = static_cast<int>(sizes[4]);
        s.lam_channels = static_cast<int>(sizes[5]), s.gate_code = codes[0], s.lam_code = codes[1];
        const int size = element_size(element);
        const BranchPlan plan =
            plan_branch(s, size, {static_cast<int>(device[0]), device[1], device[2] != 0});
        const int64_t told[] = {plan.samples, plan.ranks, plan.wide_squeeze, plan.wide_gate,
                                plan.wide_expand};
        std::copy(told, told + 5, plan_out);
        if (plan.shared_bytes > device[1]) throw std::runtime_error("too much shared memory");
        counts.assign(static_cast<size_t>(4 * s.batch * s.tiles * s.inputs), 0);
        allow(s.sums, 4 * s.batch * s.tiles * s.inputs);
        allow(s.squeeze, int64_t{size} * s.hidden * s.inputs);
        allow(s.gate, int64_t{size} * s.hidden * s.hidden);
        const int others = s.phi ? s.outputs - s.lam_channels : 0, rows = s.outputs - others;
        allow(s.expand, int64_t{size} * rows * s.hidden);
        allow(s.phi, int64_t{size} * others * s.hidden);
        allow(s.squeeze_bias, int64_t{size} * s.hidden);
        allow(s.gate_bias, int64_t{size} * s.hidden);
        allow(s.expand_bias, int64_t{size} * rows);
        allow(s.phi_bias, int64_t{size} * others);
        with_element(element, [&](auto zero) {
            using E = decltype(zero);
            for (int64_t first = 0; first < plan.clusters; ++first) {
                fibers::Cluster cluster(plan.ranks, kBranchThreads,
                                        static_cast<size_t>(plan.shared_bytes) / 4);
                cluster.run([&](int block, int thread) {
                    const fibers::Machine m{&cluster, block, thread, first * plan.ranks + block, 0, 1};
                    float* shared = cluster.shared(block);
                    if (plan.samples == 1)
                        branch<E, 1>(m, s, plan, shared);
                    else if (plan.samples == 4)
                        branch<E, 4>(m, s, plan, shared);
                    else if (plan.samples == 8)
                        branch<E, 8>(m, s, plan, shared);
                    else
                        branch<E, 16>(m, s, plan, shared);
                });
            }
        });
        for (const uint8_t count : counts)
            if (count != 1) throw std::runtime_error("a partial sum is not read exactly once");
    });
}

// slots [columns] of the vectors' elements in shared memory
void host_slots(int element, int lanes, int columns, int* slots) {
    with_element(element, [&](auto zero) {
        using E = decltype(zero);
        for (int k = 0; k < columns; ++k)
            slots[k] = lanes == kLongRow ? slot<E, kLongRow>(k) : slot<E, kShortRow>(k);
    });
}
}
