// SPDX-License-Identifier: BSD-3-Clause
// The weights of one sample, W_n = diag(lam) W + Q Phi^T P^T, some planes of them at a time: first P Phi of
// these planes, then a few rows of W_n in registers.
#pragma once

#include "frame.h"

namespace dcd::DCD_ISA::net {

// Multiply-adds that the dynamic residual adds to one sample; whole vectors of the latent are computed.
// A synthesised weight is loaded and stored besides, which was measured to cost half as much again. In bf16
// rows are synthesised in pairs, none of which may be of two blocks.
static inline bool synthesis_pays(const NetworkStep& s, int64_t pixels, bool narrow) {
    const int64_t wide = planes_of(s.latent) * kBlock, taps = s.kernel_h * s.kernel_w;
    const bool split = narrow && s.blocks > 1 && s.in_channels / s.blocks % 2;
    return taps == 1 && !s.latent_kernel && !split &&
           3 * s.out_channels * (s.in_channels / s.blocks * (s.latent + s.blocks) + s.latent * s.latent) <
               2 * pixels * (s.in_channels * wide + s.blocks * s.latent * wide + s.latent * s.out_channels);
}

// The blocks of the residual that planes [plane, plane + planes) of the output belong to.
struct Blocks {
    int64_t first, last;
    Blocks(int64_t plane, int64_t planes, int64_t out_channels, int64_t blocks) {
        const int64_t rows = out_channels / blocks;
        first = plane * kBlock / rows;
        last = (smaller((plane + planes) * kBlock, out_channels) - 1) / rows;
    }
};

// [planes, rows, 16]: the matrix of `rows` rows that W_n, or a filter of a depthwise layer, is for one
// sample: lam fixed + left Phi^T P^T. left [blocks, planes L, rows, 16], fixed [planes, rows, 16], p [planes,
// latents of all blocks, 16]; or pairs of rows and of latents, each of one block.
template <class W>
struct Synthesis {
    const W *left, *fixed, *p;
    int64_t rows, latent;
    const float *lam, *phi;  // [planes, 16] or null; [blocks, planes L (row), L (column), 16 (row)]
    int64_t out_channels, blocks, p_plane;

    int64_t depth() const { return depth_of(rows, kIsNarrow<W>); }
    static int64_t scratch_size(int64_t latent, int64_t rows, int64_t planes) {
        return planes * kBlock * (latent + depth_of(rows, kIsNarrow<W>) + 1);
    }
};

// fused [planes, L, 16] = P Phi of one block
template <class S, class W>
static void fuse(const Synthesis<W>& s, int64_t block, int64_t plane, int64_t planes, float* fused) {
    const int64_t none = 0, wide = planes_of(s.latent) * kBlock;
    Product<W> fuse;
    fuse.taps = &none, fuse.tap_count = 1, fuse.channels = s.latent;
    fuse.weight = s.p + plane * s.p_plane + depth_of(block * wide, kIsNarrow<W>) * kBlock;
    fuse.weight_plane = s.p_plane;
    fuse.input_plane = s.latent * kBlock, fuse.output_plane = s.latent * kBlock;
    product_rows<S, Types<float, W, float>>(
        fuse, 0, planes, {s.phi + block * wide * s.latent, nullptr, nullptr, fused}, {}, s.latent, 0, 1);
}

// What a tile reads and writes: its first row, or pair of rows, of the first of its planes.
template <class W>
struct SynthesisPlaces {
    const float* lam;    // [planes, 16] or null
    const W* left;       // [planes L, depth, 16]
    const W* fixed;      // [planes, depth, 16], as is `to`
    const float* fused;  // [planes, L, 16]
    W* to;
    int64_t depth, latent;  // latent: 0 for rows of other blocks
    int64_t ahead;          // where `fixed` is fetched, from where it is read
};

// Rows that are fetched before they are needed: the sums are short, and nothing has read `fixed` before, nor,
// for the first planes, `left`.
constexpr int64_t kAhead = 64;

// ROWS rows, or pairs of rows, each summed in fp32 and rounded once.
template <class S, class WEIGHT, int ROWS, int PLANES>
struct SynthesisTile {
    using V = typename S::Vec;
    static constexpr bool kPairs = kIsNarrow<WEIGHT>;
    static constexpr int W = S::kLanes, VECTORS = TileLimits<S>::kVectors, ALL = PLANES * VECTORS,
                         PARTS = kPairs ? 2 : 1;

    __attribute__((always_inline)) static inline V load(const WEIGHT* p, int part) {
        if constexpr (kPairs)
            return part ? S::seconds(p) : S::firsts(p);
        else
            return S::load(p);
    }
    __attribute__((always_inline)) static inline V spread(const WEIGHT* p, int part) {
        if constexpr (kPairs)
            return part ? S::set_second(p) : S::set_first(p);
        else
            return S::set1(*p);
    }
    __attribute__((always_inline)) static inline void fetch(const WEIGHT* rows) {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) __builtin_prefetch(rows + i * kBlock, 0, 3);
    }

    static void run(const SynthesisPlaces<WEIGHT>& s) {
        const int64_t plane = s.depth * kBlock;
        const auto at = [](int j, int64_t size) { return (j / VECTORS) * size + (j % VECTORS) * W; };
        V sums[ROWS][PARTS][ALL];
#pragma GCC unroll 2
        for (int c = 0; c < PLANES; ++c) fetch(s.fixed + s.ahead + c * plane);
#pragma GCC unroll 8
        for (auto& row : sums)
#pragma GCC unroll 2
            for (auto& part : row)
#pragma GCC unroll 8
                for (V& sum : part) sum = S::zero();
        const WEIGHT* left = s.left;
        for (int64_t l = 0; l < s.latent; l += kBlock, left += plane) {
            fetch(left + kAhead * kBlock);
            const float* fused = s.fused + l * kBlock;
            const int64_t count = smaller(kBlock, s.latent - l);
            for (int64_t k = 0; k < count; ++k, fused += kBlock) {
                V weight[ALL];
#pragma GCC unroll 8
                for (int j = 0; j < ALL; ++j) weight[j] = S::load(fused + at(j, s.latent * kBlock));
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
                    for (int part = 0; part < PARTS; ++part) {
                        const V value = spread(left + i * kBlock + k, part);
#pragma GCC unroll 8
                        for (int j = 0; j < ALL; ++j)
                            sums[i][part][j] = S::fma(value, weight[j], sums[i][part][j]);
                    }
            }
        }
        // `fixed`, the largest of the summands, comes last: less is rounded
#pragma GCC unroll 8
        for (int j = 0; j < ALL; ++j) {
            const V lam = s.lam ? S::load(s.lam + j * W) : S::set1(1);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                const WEIGHT* fixed = s.fixed + at(j, plane) + i * kBlock;
                WEIGHT* to = s.to + at(j, plane) + i * kBlock;
                if constexpr (kPairs)
                    S::store_pairs(to, S::fma(lam, load(fixed, 0), sums[i][0][j]),
                                   S::fma(lam, load(fixed, 1), sums[i][1][j]));
                else
                    S::store(to, S::fma(lam, load(fixed, 0), sums[i][0][j]));
            }
        }
    }
};

// Rows, or pairs of rows, [begin, end) of PLANES planes; places are of row 0.
template <class S, int PLANES, class W, int... ROWS>
static void synthesise_rows(const SynthesisPlaces<W>& places, int64_t begin, int64_t end,
                            std::integer_sequence<int, ROWS...>) {
    using Run = void (*)(const SynthesisPlaces<W>&);
    static constexpr Run kRun[] = {&SynthesisTile<S, W, ROWS + 1, PLANES>::run...};
    constexpr int64_t kMost = sizeof...(ROWS);
    const int64_t rows = end - begin, tiles = (rows + kMost - 1) / kMost;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = begin + t * rows / tiles, next = begin + (t + 1) * rows / tiles;
        SynthesisPlaces<W> own = places;
        own.left += row * kBlock, own.fixed += row * kBlock, own.to += row * kBlock;
        // behind the last row come the next planes
        const int64_t depth = own.depth;
        own.ahead = (depth <= kAhead        ? PLANES * depth
                     : row + kAhead < depth ? kAhead
                                            : kAhead + (PLANES - 1) * depth) *
                    kBlock;
        kRun[next - row - 1](own);
    }
}

// For planes [plane, plane + planes): `to` gets the rows, `fused` [planes, L, 16] the product P Phi of the
// last block. Each row is of one block; those of others than these planes' are lam fixed alone.
template <class S, class W>
static void synthesise(const Synthesis<W>& s, int64_t plane, int64_t planes, float* fused, W* to) {
    // pairs have two sums each
    constexpr int kPlanes = kIsNarrow<W> ? 1 : TileLimits<S>::kPlanes;
    constexpr int kSums = (S::kRegisters == 32 ? 16 : 8) / TileLimits<S>::kVectors / TileLimits<S>::kPlanes;
    using Counts = std::make_integer_sequence<int, kSums>;
    const int64_t depth = s.depth(), latents = planes_of(s.latent) * depth * kBlock;
    const Blocks blocks(plane, planes, s.out_channels, s.blocks);
    const auto begin_of = [&](int64_t block) { return block * depth / s.blocks; };
    const auto rows = [&](int64_t block, int64_t latent, int64_t begin, int64_t end) {
        for (int64_t c = 0; c < planes; c += kPlanes) {
            const SynthesisPlaces<W> places{s.lam ? s.lam + (plane + c) * kBlock : nullptr,
                                            s.left + block * latents,
                                            s.fixed + (plane + c) * depth * kBlock,
                                            fused + c * s.latent * kBlock,
                                            to + c * depth * kBlock,
                                            depth,
                                            latent,
                                            0};
            if (planes - c >= kPlanes)
                synthesise_rows<S, kPlanes>(places, begin, end, Counts{});
            else
                synthesise_rows<S, 1>(places, begin, end, Counts{});
        }
    };
    for (int64_t block = blocks.first; block <= blocks.last; ++block) {
        fuse<S>(s, block, plane, planes, fused);
        rows(block, s.latent, begin_of(block), begin_of(block + 1));
    }
    rows(0, 0, 0, begin_of(blocks.first)), rows(0, 0, begin_of(blocks.last + 1), depth);
}

}  // namespace dcd::DCD_ISA::net
