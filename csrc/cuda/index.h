// SPDX-License-Identifier: BSD-3-Clause
// All index arithmetic of the depthwise kernels: which tile a block has, which element a thread copies, which
// tap meets which input. Compiled by nvcc into the kernels and by g++ into tests that loop over all of it.
//
// Three convolutions share one body, for they differ only in where outputs meet inputs:
//   kSame   stride 1, and its input's gradient (the taps in reverse)       y[o] = sum_t w[t] x[o + t - pad]
//   kDown   stride 2                                                       y[o] = sum_t w[t] x[2 o + t - pad]
//   kUp     the input's gradient of stride 2, o runs over the input        y[o] = sum_t w[t] x[(o + pad - t)
//   / 2]
// Outputs are computed in patches of a fixed size by one thread each; in kUp a patch starts where o + pad is
// even, so that the taps which meet an input are the same in every patch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#    define DCD_INDEX __host__ __device__ __forceinline__
#else
#    define DCD_INDEX inline
#endif

namespace dcd::cuda::dw {

enum Mode : int { kSame = 0, kDown = 1, kUp = 2 };

constexpr int kThreadShift = 7;
constexpr int kThreads = 1 << kThreadShift;  // of a block

DCD_INDEX int smaller(int a, int b) {
    return a < b ? a : b;
}
DCD_INDEX int larger(int a, int b) {
    return a > b ? a : b;
}
DCD_INDEX int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}  // a >= 0
DCD_INDEX int round_up(int a, int b) {
    return ceil_div(a, b) * b;
}
DCD_INDEX int floor_to(int a, int power) {
    return a & -power;
}  // a multiple of a power of two; a of any sign

// n / d and n % d for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, PLDI 1994, section 4).
struct Divider {
    uint32_t divisor, factor, shift;
    Divider() = default;
    DCD_INDEX explicit Divider(int d) : divisor(static_cast<uint32_t>(d)), factor(0), shift(0) {
        while ((uint64_t{1} << shift) < divisor) ++shift;
        factor =
            static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
    }
    DCD_INDEX int divide(int n) const {
        const uint32_t high = static_cast<uint32_t>(uint64_t{factor} * static_cast<uint32_t>(n) >> 32);
        return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
    }
    DCD_INDEX int remainder(int n, int quotient) const { return n - quotient * static_cast<int>(divisor); }
};

// --- where outputs meet inputs

// The first input that the outputs from `o` on meet.
DCD_INDEX int first_input(int mode, int kernel, int o, int pad) {
    return mode == kSame ? o - pad : mode == kDown ? 2 * o - pad : (o + pad) / 2 - (kernel - 1) / 2;
}

// How many inputs `count` neighbouring outputs meet.
DCD_INDEX constexpr int input_extent(int mode, int kernel, int count) {
    return mode == kSame   ? count + kernel - 1
           : mode == kDown ? 2 * (count - 1) + kernel
                           : count / 2 + (kernel - 1) / 2;
}

// By how many inputs `count` outputs move the first input.
DCD_INDEX constexpr int input_step(int mode, int count) {
    return mode == kSame ? count : mode == kDown ? 2 * count : count / 2;
}

// The tap at which output `o` of a patch meets input `i` of it; outside [0, kernel) they do not meet.
DCD_INDEX constexpr int tap_between(int mode, int kernel, int o, int i) {
    return mode == kSame ? i - o : mode == kDown ? i - 2 * o : o + kernel - 1 - 2 * i;
}

// Outputs before the first one that the first patch covers: what kUp needs to start evenly.
DCD_INDEX int lead_in(int mode, int pad) {
    return mode == kUp ? pad & 1 : 0;
}

// --- how a block's threads divide a tile

// LAST: neighbouring elements of a tile are channels (channels_last), 64 bytes of them for every pixel, and a
// thread has the channels of four bytes. Otherwise they are columns of one channel.
template <class T, bool LAST>
struct Arrangement {
    static constexpr int kLanes = 16;                              // LAST: threads side by side on one pixel
    static constexpr int kChannels = LAST ? 4 / sizeof(T) : 1;     // of a thread
    static constexpr int kGroup = LAST ? kLanes * kChannels : 32;  // most channels of a tile
    static constexpr int kPatchRows = LAST ? 2 : 4;
    static constexpr int kPatchColumns = LAST ? 4 : 2;
    static constexpr int kVector = 16 / sizeof(T);
};

// One image, cut into tiles; the same for all samples.
struct Tiling {
    int group;  // channels of a tile, 1 << group_shift
    int group_shift;
    int rows, columns;  // outputs of a tile, multiples of a patch
    int in_rows, in_columns;
    int pitch;                    // columns between the rows of a tile in shared memory
    int lead_rows, lead_columns;  // lead_in
    int vector;                   // elements copied at once
    Divider groups;               // of channels
    Divider sample;               // blocks of a sample: tiles() * groups
    Divider image;                // tiles()
    Divider row_tiles, column_tiles;
    Divider patch_columns;   // patches side by side in a tile
    Divider in_row_divider;  // in_rows
    Divider line;            // LAST: in_columns; else: vectors in a row of a tile
    DCD_INDEX int tiles() const {
        return static_cast<int>(row_tiles.divisor) * static_cast<int>(column_tiles.divisor);
    }
    DCD_INDEX int tile_elements() const { return group * in_rows * pitch; }
};

// Block `index` of a convolution: tiles first, then groups of channels, then samples.
struct BlockPlace {
    int sample, group, tile;
};
DCD_INDEX BlockPlace block_place(const Tiling& t, int index) {
    const int sample = t.sample.divide(index), rest = t.sample.remainder(index, sample);
    const int group = t.image.divide(rest);
    return {sample, group, t.image.remainder(rest, group)};
}

// Tile number `tile` of an image, side by side first, for neighbours share a halo.
struct TilePlace {
    int row, column;  // first output, lead included: may be -1
};
DCD_INDEX TilePlace tile_place(const Tiling& t, int tile) {
    const int row = t.column_tiles.divide(tile), column = t.column_tiles.remainder(tile, row);
    return {row * t.rows - t.lead_rows, column * t.columns - t.lead_columns};
}

// Of the threads that share a channel, this one's number and how many there are; `channel` is its first one
// in the tile.
struct ThreadPlace {
    int channel, member, members;
};
template <class T, bool LAST>
DCD_INDEX ThreadPlace thread_place(const Tiling& t, int thread) {
    using A = Arrangement<T, LAST>;
    if (LAST) return {thread % A::kLanes * A::kChannels, thread / A::kLanes, kThreads / A::kLanes};
    const int shift = kThreadShift - t.group_shift;
    return {thread >> shift, thread & ((1 << shift) - 1), 1 << shift};
}

// --- shared memory of a tile

// LAST: [row][column][channel]; else [channel][row][column], each row moved so that a column which is a
// multiple of `vector` in the image is one here.
template <class T, bool LAST>
DCD_INDEX int tile_offset(const Tiling& t, int channel, int row, int column) {
    if (LAST) return (row * t.pitch + column) * Arrangement<T, LAST>::kGroup + channel;
    return (channel * t.in_rows + row) * t.pitch + column;
}
template <bool LAST>
DCD_INDEX int alignment_shift(const Tiling& t, int first_column) {
    return LAST ? 0 : first_column - floor_to(first_column, t.vector);
}

// Vector `i` of the tile, `vector` elements long as the tiling says (a constant, where that is known): where
// it lies in the tile and which element of the image is its first.
struct Piece {
    int target;                // element of the tile
    int channel, row, column;  // in the tile; row and column count from the tile's first input
};
template <class T, bool LAST>
DCD_INDEX Piece piece(const Tiling& t, int i, int shift, int vector) {
    if (LAST) {
        const int parts = Arrangement<T, LAST>::kGroup / vector;  // a power of two
        const int pixel = i / parts, part = i & (parts - 1);
        const int row = t.line.divide(pixel), column = t.line.remainder(pixel, row);
        return {i * vector, part * vector, row, column};
    }
    const int line = t.line.divide(i), part = t.line.remainder(i, line);
    const int channel = t.in_row_divider.divide(line), row = t.in_row_divider.remainder(line, channel);
    return {i * vector, channel, row, part * vector - shift};
}
DCD_INDEX int pieces(const Tiling& t, int vector) {
    return t.tile_elements() / vector;
}

// --- how samples and tiles are shared out

struct Range {
    int64_t begin, end;
};
// Part `i` of [0, count) in `parts` parts whose sizes differ by one at most.
DCD_INDEX Range part_of(int64_t count, int parts, int i) {
    const int64_t size = count / parts, longer = count % parts;
    const int64_t begin = i * size + (i < longer ? i : longer);
    return {begin, begin + size + (i < longer ? 1 : 0)};
}

}  // namespace dcd::cuda::dw
