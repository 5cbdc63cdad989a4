// SPDX-License-Identifier: BSD-3-Clause
// The dynamic branch's tiles of pooling, which the CPU and the GPU share, and the activations of the GPU's
// kernels: those of the CPU are in cpu/kernels/branch.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "branch_codes.h"

#ifdef __CUDACC__
#    define DCD_FORMULA __host__ __device__ __forceinline__
#else
#    define DCD_FORMULA inline
#endif

namespace dcd {

// What the kernel's shared memory has room for.
constexpr int64_t kBranchMaxInputs = 8192, kBranchMaxHidden = 1024;

// Channel sums are taken in this many tiles of pixels: few enough that the partial sums are less than one
// hundredth of the image, many enough that one large image keeps a GPU busy. No image without pixels has
// none, so that there is always something to add up.
constexpr int64_t kPoolTilePixels = 512, kPoolMaxTiles = 16;

inline int64_t pool_tiles(int64_t pixels) {
    const int64_t tiles = (pixels + kPoolTilePixels - 1) / kPoolTilePixels;
    return tiles < 1 ? 1 : tiles > kPoolMaxTiles ? kPoolMaxTiles : tiles;
}

// Pixels of each tile but the last ones, which may have fewer or none. Eights, so that tiles of an aligned
// plane are aligned.
inline int64_t pool_tile_pixels(int64_t pixels, int64_t tiles) {
    return ((pixels + tiles - 1) / tiles + 7) / 8 * 8;
}

// Adaptive pooling to 2x2 has four bins, of channel c at 4c + 2·(bin row) + bin column. Along an axis they
// begin at 0 and at half_down(size) and are both half_up(size) long: on odd sizes they share the middle.
inline constexpr int64_t kQuadrants = 4;

DCD_FORMULA int64_t half_down(int64_t size) {
    return size / 2;
}

DCD_FORMULA int64_t half_up(int64_t size) {
    return (size + 1) / 2;
}

// Their sums are taken in tiles of so many rows of each bin (the last tile may have fewer), so that a tile is
// as large as one of the whole image, and has work for all four.
inline int64_t quadrant_tile_rows(int64_t height, int64_t width) {
    const int64_t across = half_up(width) > 1 ? half_up(width) : 1;
    const int64_t enough = (kPoolTilePixels / kQuadrants + across - 1) / across;
    const int64_t few_tiles = (half_up(height) + kPoolMaxTiles - 1) / kPoolMaxTiles;
    return enough > few_tiles ? enough : few_tiles;
}

inline int64_t quadrant_tiles(int64_t height, int64_t width) {
    const int64_t rows = quadrant_tile_rows(height, width), tiles = (half_up(height) + rows - 1) / rows;
    return tiles < 1 ? 1 : tiles;
}

// Comparisons, not fmin and fmax: those would turn NaN into a number.
template <class T>
DCD_FORMULA T relu6(T x) {
    return x < T(0) ? T(0) : x > T(6) ? T(6) : x;
}

template <class T>
DCD_FORMULA T sigmoid(T x) {
    return T(1) / (T(1) + std::exp(-x));
}

// The activation between the FCs; kGateSE's needs the gate's logits and is se_gate.
template <class T>
DCD_FORMULA T gate_activation(T x, int gate) {
    switch (gate) {
        case kGateRelu:
            return x < T(0) ? T(0) : x;
        case kGateRelu6:
            return relu6(x);
        case kGateSilu:
            return x * sigmoid(x);
        case kGateHardswish:
            return x * relu6(x + T(3)) / T(6);
        default:
            return x;
    }
}

template <class T>
DCD_FORMULA T se_gate(T hidden, T logit) {
    return hidden * (relu6(logit + T(3)) / T(3));
}

template <class T>
DCD_FORMULA T lam_activation(T logit, int code) {
    switch (code) {
        case kLamHardsigmoid2:
            return relu6(logit + T(3)) / T(3);
        case kLamSigmoid2:
            return T(2) * sigmoid(logit);
        case kLamHardsigmoid:
            return relu6(logit + T(3)) / T(6);
        case kLamSigmoid:
            return sigmoid(logit);
        default:
            return T(1) + logit;
    }
}

}  // namespace dcd
