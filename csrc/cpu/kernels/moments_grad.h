// SPDX-License-Identifier: BSD-3-Clause
// Gradients of the moments, given those of mean m and covariance C, of z = Q^T x over P pixels. With
// h = z - m and A = (dC + dC^T) / P:
//   dz = A h + dm / P,   d_x = Q dz,   d_Q = sum over samples and pixels of x dz^T
// one tile of pixels at a time, for which x is read once and stays in L2.
//
// The sum of h over a sample is zero, but not that of the rounded h: m is off by half a unit in its last
// place, which x far from zero makes much of. A sample of one tile is centred again. Of larger ones, A times
// the sum of h that was there is taken off dz afterwards where it counts: times a mean of x, in d_Q. Any mean
// close to that of the sample does; here it is that of the first pixels.
#pragma once

#include "moments.h"

namespace dcd::DCD_ISA {

template <class S>
class MomentsGradient {
  public:
    using T = typename S::Scalar;
    static constexpr int64_t W = S::kLanes;
    // Little is computed for what is read and written here: fetching ahead pays earlier than in a product.
    static constexpr int64_t kFetched = 96 * 1024;

    MomentsGradient(const MomentsGradParams<T>& s, const Latent<S>& latent, const Tiling& tiling,
                    bool channels_last, const T* q_t)
        : s_(s), latent_(latent), tiling_(tiling), channels_last_(channels_last), q_t_(q_t) {}

    int64_t scratch_size() const {
        const int64_t l = s_.latent, count = tiling_.largest();
        return 3 * Pieces<T>::rounded(l * count) + Pieces<T>::rounded(l * l) + 3 * Pieces<T>::rounded(l) +
               most(Pieces<T>::rounded(latent_.scratch_size()), Pieces<T>::rounded(s_.in_channels));
    }

    // One part of one sample. Writes the sum of h [L] if there are several tiles; writes d_q (adds unless
    // `first`) where it is not null: [Ci, L], or [L, Ci] when channels_last.
    void run(int64_t n, int64_t part, T* sums, T* d_q, bool first, T* memory) const {
        const int64_t l = s_.latent, count = tiling_.largest();
        Pieces<T> pieces(memory);
        T *h = pieces.take(l * count), *d_z = pieces.take(l * count), *d_z_t = pieces.take(l * count);
        T* core = pieces.take(l * l);
        T *shift = pieces.take(l), *bias = pieces.take(l), *tile_sums = pieces.take(l);
        T* spare = pieces.take(0);
        make_core(n, core);
        for (int64_t i = 0; i < l; ++i) {
            shift[i] = -s_.mean[n * l + i];
            bias[i] = s_.grad_mean ? s_.grad_mean[n * l + i] / T(s_.pixels) : T(0);
            sums[i] = 0;
        }
        tiling_.for_tiles(part, [&](int64_t p0, int64_t count) {
            if (channels_last_ && worth_fetching(s_.pixels, s_.in_channels, kFetched))
                fetch_rows<S>(latent_.at(n, p0 + count), count, s_.input.pixel, s_.in_channels);
            Block<T> block;
            block.bias = bias;
            block.c = d_z, block.c_row = count;
            if (s_.grad_covariance) {
                latent_.project(n, p0, count, shift, h, spare);
                latent_.row_sums(h, count, tile_sums);
                if (tiling_.tiles == 1) {
                    for (int64_t i = 0; i < l; ++i) tile_sums[i] /= -T(count);
                    latent_.add_to_rows(tile_sums, count, h);
                } else {
                    for (int64_t i = 0; i < l; ++i) sums[i] += tile_sums[i];
                }
                block.a = core, block.a_row = l, block.a_k = 1;
                block.b = h, block.b_k = count, block.k = l;
            }
            multiply<S>(block, l, count);
            if (d_q) add_products(n, p0, count, d_z, d_z_t, first, d_q);
            if (s_.d_input.data) write_input(n, p0, count, d_z);
            first = false;
        });
    }

    // Takes x (A sums)^T off d_q, x the mean over the first pixels of the sample.
    void settle(int64_t n, const T* sums, T* d_q, T* memory) const {
        const int64_t l = s_.latent, ci = s_.in_channels, near = least(W, s_.pixels);
        if (!s_.grad_covariance || tiling_.tiles == 1) return;
        Pieces<T> pieces(memory);
        T *core = pieces.take(l * l), *excess = pieces.take(l), *mean = pieces.take(ci);
        make_core(n, core);
        for (int64_t i = 0; i < l; ++i) {
            excess[i] = 0;
            for (int64_t j = 0; j < l; ++j) excess[i] -= core[i * l + j] * sums[j] / T(near);
        }
        const T* x = latent_.at(n, 0);
        if (channels_last_)
            for (int64_t i = 0; i < near; ++i) add_scaled<S>(x + i * s_.input.pixel, T(1), ci, i == 0, mean);
        else
            for (int64_t c = 0; c < ci; ++c)
                mean[c] = S::sum(S::load_first(x + c * s_.input.channel, static_cast<int>(near)));
        Block<T> block;
        block.k = 1;
        block.a = channels_last_ ? excess : mean, block.a_row = 1;
        block.b = channels_last_ ? mean : excess;
        block.residual = block.c = d_q;
        block.residual_row = block.c_row = channels_last_ ? ci : l;
        multiply<S>(block, channels_last_ ? l : ci, channels_last_ ? ci : l);
    }

  private:
    // A [L, L]
    void make_core(int64_t n, T* core) const {
        const int64_t l = s_.latent;
        if (!s_.grad_covariance) return;
        const T* g = s_.grad_covariance + n * l * l;
        for (int64_t i = 0; i < l; ++i)
            for (int64_t j = 0; j < l; ++j) core[i * l + j] = (g[i * l + j] + g[j * l + i]) / T(s_.pixels);
    }

    void add_products(int64_t n, int64_t p0, int64_t count, const T* d_z, T* d_z_t, bool first,
                      T* d_q) const {
        const int64_t l = s_.latent, ci = s_.in_channels;
        const T* x = latent_.at(n, p0);
        if (channels_last_) {
            // d_q^T += dz x, channels are lanes; runs of pixels as short as those of outer()
            constexpr int64_t kRun = 256;
            for (int64_t i = 0; i < count; i += kRun, first = false) {
                Block<T> block;
                block.a = d_z + i, block.a_row = count, block.a_k = 1;
                block.b = x + i * s_.input.pixel, block.b_k = s_.input.pixel,
                block.k = least(kRun, count - i);
                block.c = d_q, block.c_row = ci;
                if (!first) block.residual = d_q, block.residual_row = ci;
                multiply<S>(block, l, ci);
            }
        } else if (small(count)) {
            // latents are lanes
            transpose<S>(d_z, count, l, count, d_z_t, l);
            Block<T> block;
            block.a = x, block.a_row = s_.input.channel, block.a_k = 1;
            block.b = d_z_t, block.b_k = l, block.k = count;
            block.c = d_q, block.c_row = l;
            if (!first) block.residual = d_q, block.residual_row = l;
            multiply<S>(block, ci, l);
        } else {
            dot<S>(x, s_.input.channel, ci, d_z, count, l, count, !first, d_q, l);
        }
    }

    // Few pixels: the sum over lanes that ends a dot product costs as much as three vectors of them, lanes
    // that no latent fills cost their share.
    bool small(int64_t count) const {
        const int64_t l = s_.latent;
        return count * ((l + W - 1) / W) * W < l * (count + 3 * W);
    }

    void write_input(int64_t n, int64_t p0, int64_t count, const T* d_z) const {
        const int64_t l = s_.latent, ci = s_.in_channels;
        Block<T> block;
        block.k = l;
        block.c = s_.d_input.data + n * s_.d_input.sample + p0 * s_.d_input.pixel;
        if (channels_last_) {
            block.a = d_z, block.a_row = 1, block.a_k = count;
            block.b = q_t_, block.b_k = ci;
            block.c_row = s_.d_input.pixel;
            block.fetch_c = rows_ahead<S>(s_.pixels, ci, kFetched);
            multiply<S>(block, count, ci);
            return;
        }
        block.a = s_.q, block.a_row = l, block.a_k = 1;
        block.b = d_z, block.b_k = count;
        block.c_row = s_.d_input.channel;
        // A few rows at a time, so that each is written from end to end; they are too far apart for the
        // hardware to fetch ahead.
        constexpr int64_t kRows = Shape<S>::kRows, kPanel = Shape<S>::kLanes;
        for (int64_t c = 0; c < ci; c += kRows) {
            const int64_t rows = least(kRows, ci - c);
            for (int64_t p = 0; p < count; p += kPanel) {
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t i = 0; i < kPanel; i += W)
                        S::prefetch(block.c + (c + r) * block.c_row + p + 2 * kPanel + i);
                multiply<S>(block.at(c, p), rows, least(kPanel, count - p));
            }
        }
    }

    const MomentsGradParams<T>& s_;
    const Latent<S>& latent_;
    const Tiling& tiling_;
    const bool channels_last_;
    const T* q_t_;  // [L, Ci] when channels_last
};

template <class S>
static void moments_grad(const MomentsGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    const bool channels_last = s.channels_last && s.pixels > 1;
    const int64_t l = s.latent, ci = s.in_channels;
    // Rows of d_input are worth writing if they are long; beyond that, x stays in half of a 1 MB L2.
    constexpr int64_t kStep = Shape<S>::kLanes, kLong = 256, kHeld = 96 * 1024;
    const int64_t tile = least(moments_tile<S>(l), most(kLong, kHeld / ci) / kStep * kStep);
    const Tiling tiling(s.batch, s.pixels, tile, Thin<S>::kPixels);
    // Each task's share of d_q, summed afterwards in a fixed order.
    const int64_t shares = least(tiling.pieces(), Tiling::kPieces);
    const int64_t share = s.d_q ? Pieces<T>::rounded(l * ci) : 0;
    Pieces<T> shared(static_cast<T*>(scratch((Pieces<T>::rounded(channels_last ? l * ci : 0) +
                                              shares * share + Pieces<T>::rounded(tiling.pieces() * l) + 1) *
                                                 sizeof(T),
                                             Scratch::kShared)));
    T* q_t = shared.take(channels_last ? l * ci : 0);
    T* d_q = shared.take(shares * share);
    T* sums = shared.take(tiling.pieces() * l);
    if (channels_last) transpose<S>(s.q, l, ci, l, q_t, ci);
    const Latent<S> latent(s.input, ci, l, channels_last, s.q, q_t);
    const MomentsGradient<S> gradient(s, latent, tiling, channels_last, q_t);
    const int64_t size = gradient.scratch_size();
    parallel(runtime, shares, [&](int64_t i) {
        T* memory = static_cast<T*>(scratch(size * sizeof(T)));
        const int64_t begin = i * tiling.pieces() / shares, end = (i + 1) * tiling.pieces() / shares;
        T* own = s.d_q ? d_q + i * share : nullptr;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t n = piece / tiling.parts;
            gradient.run(n, piece % tiling.parts, sums + piece * l, own, piece == begin, memory);
            if (own && tiling.parts == 1) gradient.settle(n, sums + piece * l, own, memory);
        }
    });
    if (!s.d_q) return;
    if (tiling.parts > 1) {
        T* memory = static_cast<T*>(scratch(size * sizeof(T)));
        for (int64_t n = 0; n < s.batch; ++n) {
            T* all = sums + n * tiling.parts * l;
            for (int64_t part = 1; part < tiling.parts; ++part)
                add_scaled<S>(all + part * l, T(1), l, false, all);
            gradient.settle(n, all, d_q, memory);
        }
    }
    for (int64_t i = 1; i < shares; ++i) add_scaled<S>(d_q + i * share, T(1), l * ci, false, d_q);
    if (channels_last)
        transpose<S>(d_q, ci, l, ci, s.d_q, l);
    else
        add_scaled<S>(d_q, T(1), l * ci, true, s.d_q);
}

}  // namespace dcd::DCD_ISA
