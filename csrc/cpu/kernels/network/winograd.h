// SPDX-License-Identifier: BSD-3-Clause
// 3 x 3 layers of stride 1 by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray 2016,
// section 4.1):
//   Y = A^T [ sum over channels (G g G^T) . (B^T d B) ] A
// A tile of 2 x 2 outputs, which nine taps would make with 36 products a channel, takes the 16 of its 4 x 4
// inputs d. Transforming these takes sums alone, and the weights G g G^T are constants. lam, the dynamic
// residual and what else follows the convolution are applied to Y while it is in registers.
#pragma once

#include "dense.h"

namespace dcd::DCD_ISA::net {

constexpr int64_t kPatch = 4;  // inputs of a tile, a dimension

// Some tiles of one sample, transformed: [16 points, planes, tiles, 16].
struct Points {
    int64_t planes, tiles, stride;  // stride: of neighbouring points
    Points(int64_t planes, int64_t tiles) : planes(planes), tiles(tiles) {
        // an odd number of cache lines, so that a tile's points do not compete for one set of the cache
        stride = (planes * tiles | 1) * kBlock;
    }
    int64_t plane() const { return tiles * kBlock; }
    int64_t size() const { return kPoints * stride; }
};

template <class V>
struct Quad {
    V a, b, c, d;
};

template <class S>
class Winograd {
  public:
    using T = typename S::Scalar;
    using V = typename S::Vec;
    static constexpr int W = S::kLanes, VECTORS = TileLimits<S>::kVectors, PLANES = TileLimits<S>::kPlanes;

    Winograd(const Frame<T>& frame, const NetworkStep& s, int64_t sample)
        : step_(s),
          dense_(frame, s, sample),
          from_(frame.image(s.input, sample)),
          to_(frame.image(s.output, sample)),
          skip_(s.skip < 0 ? Image<T>{} : frame.image(s.skip, sample)),
          across_((to_.width + 1) / 2),
          tiles_(across_ * ((to_.height + 1) / 2)) {}

    int64_t tiles() const { return tiles_; }

    static int64_t scratch_size(const NetworkStep& s, int64_t tiles) {
        return Points(planes_of(s.in_channels), tiles).size() + Points(PLANES, tiles).size();
    }

    // Tiles [t0, t1) of planes [p0, p1) of the output.
    void run(int64_t t0, int64_t t1, int64_t p0, int64_t p1, T* memory) const {
        const Points in(planes_of(step_.in_channels), t1 - t0), out(PLANES, t1 - t0);
        T* products = memory + in.size();
        for (int64_t plane = 0; plane < in.planes; ++plane)
            for (int64_t t = t0; t < t1; ++t)
                transform(plane, t, memory + plane * in.plane() + (t - t0) * kBlock, in.stride);
        const int64_t none = 0;
        Product<T> product = dense_.product(p0, p1 - p0);
        const T* weight = product.weight;
        product.taps = &none, product.tap_count = 1, product.input_plane = in.plane();
        product.output_plane = out.plane(), product.latent = 0, product.activation = kNone;
        product.lam = product.static_bias = product.bias = nullptr;
        for (int64_t plane = p0; plane < p1; plane += PLANES) {
            const int64_t count = smaller(PLANES, p1 - plane);
            for (int64_t point = 0; point < kPoints; ++point) {
                product.weight = weight + point * step_.in_channels * kBlock;
                product_rows<S>(product, plane, count,
                                {memory + point * in.stride, nullptr, nullptr, products + point * out.stride},
                                {}, in.tiles, 0, 1);
            }
            // planes of different blocks would be multiplied with each other's latents
            const int64_t at_once = dense_.of_one_block(plane, count) ? count : 1;
            for (int64_t c = 0; c < count; c += at_once) {
                const Product<T> whole = dense_.product(plane + c, at_once);
                const T* latent = dense_.latent(plane + c, at_once);
                for (int64_t t = t0; t < t1; ++t) {
                    const T* at = products + c * out.plane() + (t - t0) * kBlock;
                    at_once == 1 ? finish<1>(whole, latent, plane + c, t, at, out)
                                 : finish<PLANES>(whole, latent, plane + c, t, at, out);
                }
            }
        }
    }

  private:
    // B^T of four values
    static inline Quad<V> spread(V a, V b, V c, V d) {
        return {S::sub(a, c), S::add(b, c), S::sub(c, b), S::sub(b, d)};
    }

    // B^T d B of one tile of one plane
    void transform(int64_t plane, int64_t tile, T* points, int64_t stride) const {
        const int64_t y = tile / across_ * 2, x = tile % across_ * 2;
        const T* at = from_.data + plane * from_.plane + (y - step_.padding_h) * from_.row +
                      (x - step_.padding_w) * kBlock;
        // where an output does not exist, nor need its last input: any will do
        const int64_t last_row = (y + 1 < to_.height ? 3 : 2) * from_.row,
                      last_column = (x + 1 < to_.width ? 3 : 2) * kBlock;
        for (int v = 0; v < VECTORS; ++v, at += W, points += W) {
            V rows[kPatch][kPatch];  // B^T d, by columns
#pragma GCC unroll 4
            for (int64_t j = 0; j < kPatch; ++j) {
                const T* column = at + (j < 3 ? j * kBlock : last_column);
                const Quad<V> sums = spread(S::load(column), S::load(column + from_.row),
                                            S::load(column + 2 * from_.row), S::load(column + last_row));
                rows[0][j] = sums.a, rows[1][j] = sums.b, rows[2][j] = sums.c, rows[3][j] = sums.d;
            }
#pragma GCC unroll 4
            for (int64_t i = 0; i < kPatch; ++i) {
                const Quad<V> sums = spread(rows[i][0], rows[i][1], rows[i][2], rows[i][3]);
                T* to = points + i * kPatch * stride;
                S::store(to, sums.a), S::store(to + stride, sums.b);
                S::store(to + 2 * stride, sums.c), S::store(to + 3 * stride, sums.d);
            }
        }
    }

    // A^T m A of one tile of some planes, and what follows the convolution
    template <int COUNT>
    void finish(const Product<T>& s, const T* latents, int64_t plane, int64_t tile, const T* points,
                const Points& m) const {
        constexpr int ALL = COUNT * VECTORS;
        const int64_t y = tile / across_ * 2, x = tile % across_ * 2;
        const int64_t height = smaller(2, to_.height - y), width = smaller(2, to_.width - x);
        V acc[4][ALL];
#pragma GCC unroll 4
        for (int v = 0; v < ALL; ++v) {
            const T* at = points + v / VECTORS * m.plane() + v % VECTORS * W;
            V rows[2][kPatch];
#pragma GCC unroll 4
            for (int64_t j = 0; j < kPatch; ++j, at += m.stride) {
                const V a = S::load(at), b = S::load(at + kPatch * m.stride),
                        c = S::load(at + 2 * kPatch * m.stride), d = S::load(at + 3 * kPatch * m.stride);
                rows[0][j] = S::add(S::add(a, b), c), rows[1][j] = S::sub(S::sub(b, c), d);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                acc[2 * i][v] = S::add(S::add(rows[i][0], rows[i][1]), rows[i][2]);
                acc[2 * i + 1][v] = S::sub(S::sub(rows[i][1], rows[i][2]), rows[i][3]);
            }
        }
        const auto each = [&acc](const T* numbers, const auto& f) {
#pragma GCC unroll 4
            for (int v = 0; v < ALL; ++v) {
                const V number = S::load(numbers + v * W);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) acc[i][v] = f(acc[i][v], number);
            }
        };
        if (s.static_bias) each(s.static_bias + plane * kBlock, [](V a, V b) { return S::add(a, b); });
        if (s.lam) each(s.lam + plane * kBlock, [](V a, V lam) { return S::mul(a, lam); });
        if (s.latent) {
            const T* latent[4];
            for (int64_t i = 0; i < 4; ++i) {  // an output that does not exist takes that of a neighbour
                const int64_t row = y + smaller(i / 2, height - 1), column = x + smaller(i % 2, width - 1);
                latent[i] = latents + (row * to_.width + column) * kBlock;
            }
            const T* p = s.p + plane * s.p_plane;
            for (int64_t l = 0; l < s.latent; ++l, p += kBlock) {
                const int64_t at = l / kBlock * s.latent_plane + l % kBlock;
                V column[ALL];
#pragma GCC unroll 4
                for (int v = 0; v < ALL; ++v)
                    column[v] = S::load(p + v / VECTORS * s.p_plane + v % VECTORS * W);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const V value = S::set1(latent[i][at]);
#pragma GCC unroll 4
                    for (int v = 0; v < ALL; ++v) acc[i][v] = S::fma(value, column[v], acc[i][v]);
                }
            }
        }
        if (s.bias) each(s.bias + plane * kBlock, [](V a, V b) { return S::add(a, b); });
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j)
                for (int v = 0; v < ALL; ++v) {
                    const auto of = [&](const Image<T>& image) {
                        return image.data + (plane + v / VECTORS) * image.plane + (y + i) * image.row +
                               (x + j) * kBlock + v % VECTORS * W;
                    };
                    V value = acc[2 * i + j][v];
                    if (skip_.data) value = S::add(value, S::load(of(skip_)));
                    S::store(of(to_), activate<S>(value, s.activation));
                }
    }

    const NetworkStep& step_;
    const Dense<S> dense_;
    const Image<T> from_, to_, skip_;
    const int64_t across_, tiles_;
};

template <class S>
static void winograd(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t sample) {
    using T = typename S::Scalar;
    // transformed inputs and products stay in the second-level cache
    constexpr int64_t kBytes = 256 * 1024;
    const Winograd<S> work(frame, s, sample);
    const int64_t threads = frame.runtime.threads < 1 ? 1 : frame.runtime.threads;
    const int64_t most = kBytes / ((planes_of(s.in_channels) + TileLimits<S>::kPlanes) * kPoints * kBlock *
                                   static_cast<int64_t>(sizeof(T)));
    const int64_t at_once = most < TileLimits<S>::kPixels ? TileLimits<S>::kPixels : most;
    const int64_t blocks = (work.tiles() + at_once - 1) / at_once;
    // with fewer blocks than threads the planes are shared out, and every thread transforms the inputs
    const int64_t planes = planes_of(s.out_channels),
                  pairs = (planes + TileLimits<S>::kPlanes - 1) / TileLimits<S>::kPlanes;
    const int64_t parts = blocks >= 2 * threads ? 1 : smaller(pairs, threads);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, blocks * parts, [&](int64_t task) {
        const int64_t block = task / parts, part = task % parts;
        const int64_t t0 = block * work.tiles() / blocks, t1 = (block + 1) * work.tiles() / blocks;
        T* memory =
            static_cast<T*>(scratch(Winograd<S>::scratch_size(s, t1 - t0) * static_cast<int64_t>(sizeof(T))));
        work.run(t0, t1, part * pairs / parts * TileLimits<S>::kPlanes,
                 smaller(planes, (part + 1) * pairs / parts * TileLimits<S>::kPlanes), memory);
    });
}

}  // namespace dcd::DCD_ISA::net
