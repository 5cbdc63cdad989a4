// SPDX-License-Identifier: BSD-3-Clause
// Mean and covariance of z = Q^T x over a sample's pixels, in one pass over x. One tile of z exists at a
// time, and its sums are taken around M, the mean of the tiles before it (its own for the first): raw second
// moments lose every digit where the mean is a thousand deviations. With d = z - M and s the sum of d over a
// tile of n pixels behind N others,
//   scatter += sum of d d^T - s s^T / (N + n),   M += s / (N + n)         (after Chan, Golub and LeVeque)
// where what is subtracted is at most twice what the distance between the two means adds to the scatter.
#pragma once

#include "gradients.h"

namespace dcd::DCD_ISA {

// The pixels of all samples in pieces, whole tiles each. Neither depends on the number of threads, so that
// the results do not either.
struct Tiling {
    const int64_t batch, pixels, tile, slack, tiles, parts;

    // `tile` pixels at a time, the last tile up to `slack` more.
    Tiling(int64_t batch, int64_t pixels, int64_t tile, int64_t slack)
        : batch(batch),
          pixels(pixels),
          tile(tile),
          slack(slack),
          tiles(most<int64_t>(1, (pixels - slack + tile - 1) / tile)),
          parts(least(tiles, most<int64_t>(1, kPieces / batch))) {}

    // Fewer samples than this many are divided, for the threads that would have nothing to do.
    static constexpr int64_t kPieces = 16;
    int64_t pieces() const { return batch * parts; }
    int64_t largest() const { return least(tile + slack, pixels); }
    int64_t begin(int64_t part) const { return part == parts ? pixels : part * tiles / parts * tile; }

    // f(first pixel, count) for the tiles of a part.
    template <class F>
    void for_tiles(int64_t part, const F& f) const {
        const int64_t end = begin(part + 1);
        for (int64_t p0 = begin(part), count; p0 < end; p0 += count) {
            count = end - p0 <= tile + slack && end == pixels ? end - p0 : tile;
            f(p0, count);
        }
    }
};

// Tiles of the latent, z + shift = Q^T x + shift, as [L, pixels] in either layout.
template <class S>
class Latent {
  public:
    using T = typename S::Scalar;
    static constexpr int64_t W = S::kLanes;

    // q_t [L, Ci] is read only where by_dots().
    Latent(const Map<const T>& input, int64_t in_channels, int64_t latent, bool channels_last, const T* q,
           const T* q_t)
        : input_(input),
          in_channels_(in_channels),
          latent_(latent),
          channels_last_(channels_last),
          q_(q),
          q_t_(q_t) {}

    // Pixels are lanes, which for channels_last takes a transpose of x; or channels are, which takes a sum
    // over lanes for each latent and pays where there are many channels to a latent.
    static bool by_dots(int64_t in_channels, int64_t latent, bool channels_last) {
        return channels_last && 4 * latent + 32 < in_channels;
    }

    int64_t scratch_size() const {
        return channels_last_ ? kPanel * rounded(in_channels_) + W * W
                              : Thin<S>::scratch_size(in_channels_, latent_);
    }

    void project(int64_t n, int64_t p0, int64_t count, const T* shift, T* z, T* memory) const {
        const T* x = at(n, p0);
        Block<T> block;
        block.a = q_, block.a_row = 1, block.a_k = latent_, block.k = in_channels_;
        block.bias = shift;
        block.c_row = count;
        if (!channels_last_) {
            block.b = x, block.b_k = input_.channel;
            block.c = z;
            multiply_channel_rows<S>(block, latent_, count, nullptr, 0, memory);
        } else if (by_dots(in_channels_, latent_, true)) {
            dot<S, true>(q_t_, in_channels_, latent_, x, input_.pixel, count, in_channels_, false, z, count);
            if (shift) add_to_rows(shift, count, z);
        } else {
            for (int64_t i = 0; i < count; i += kPanel) {
                const int64_t width = least(kPanel, count - i);
                pixels_to_lanes(x + i * input_.pixel, width, memory + W * W, memory);
                block.b = memory + W * W, block.b_k = kPanel;
                block.c = z + i;
                multiply<S>(block, latent_, width);
            }
        }
    }

    const T* at(int64_t n, int64_t p0) const { return input_.data + n * input_.sample + p0 * input_.pixel; }

    void add_to_rows(const T* shift, int64_t count, T* z) const {
        for (int64_t r = 0; r < latent_; ++r, z += count) {
            const auto s = S::set1(shift[r]);
            int64_t i = 0;
            for (; i + W <= count; i += W) S::store(z + i, S::add(S::load(z + i), s));
            for (; i < count; ++i) z[i] += shift[r];
        }
    }

    void row_sums(const T* z, int64_t count, T* sums) const {
        for (int64_t r = 0; r < latent_; ++r, z += count) {
            auto a = S::zero(), b = a, c = a, d = a;
            int64_t i = 0;
            for (; i + 4 * W <= count; i += 4 * W) {
                a = S::add(a, S::load(z + i)), b = S::add(b, S::load(z + i + W));
                c = S::add(c, S::load(z + i + 2 * W)), d = S::add(d, S::load(z + i + 3 * W));
            }
            for (; i + W <= count; i += W) a = S::add(a, S::load(z + i));
            if (i < count) b = S::add(b, S::load_first(z + i, static_cast<int>(count - i)));
            sums[r] = S::sum(S::add(S::add(a, b), S::add(c, d)));
        }
    }

  private:
    static constexpr int64_t kPanel = Shape<S>::kLanes;
    static int64_t rounded(int64_t count) { return (count + W - 1) / W * W; }

    // out [Ci, kPanel], both rounded up to whole vectors, from x [count, Ci]
    void pixels_to_lanes(const T* x, int64_t count, T* out, T* square) const {
        for (int64_t c = 0; c < in_channels_; c += W)
            for (int64_t r = 0; r < count; r += W) {
                const T* from = x + r * input_.pixel + c;
                const int64_t rows = least(W, count - r), columns = least(W, in_channels_ - c);
                T* to = out + c * kPanel + r;
                if (rows == W && columns == W) {
                    S::transpose(from, input_.pixel, to, kPanel);
                    continue;
                }
                for (int64_t i = 0; i < rows; ++i)
                    S::store(square + i * W,
                             S::load_first(from + i * input_.pixel, static_cast<int>(columns)));
                S::transpose(square, W, to, kPanel);
            }
    }

    const Map<const T> input_;
    const int64_t in_channels_, latent_;
    const bool channels_last_;
    const T *q_, *q_t_;
};

// Mean and scatter of a set of pixels that grows; of the scatter the lower triangle, until finish().
template <class S>
class RunningMoments {
  public:
    using T = typename S::Scalar;

    // `seen`: how many pixels mean and scatter are of already.
    RunningMoments(int64_t latent, T* mean, T* scatter, int64_t seen)
        : latent_(latent), mean_(mean), scatter_(scatter), seen_(seen) {}

    static int64_t scratch_size(const Latent<S>& latent, int64_t channels, int64_t count) {
        return Pieces<T>::rounded(channels * count) + 2 * Pieces<T>::rounded(channels) +
               latent.scratch_size() + Pieces<T>::rounded(1);
    }

    void add_part(const Latent<S>& latent, const Tiling& tiling, int64_t n, int64_t part, T* memory) {
        Pieces<T> pieces(memory);
        T* d = pieces.take(latent_ * tiling.largest());
        T *shift = pieces.take(latent_), *sums = pieces.take(latent_);
        T* spare = pieces.take(0);
        tiling.for_tiles(part, [&](int64_t p0, int64_t count) {
            const bool first = seen_ == 0;
            latent.project(n, p0, count, first ? nullptr : shift, d, spare);
            latent.row_sums(d, count, sums);
            if (first) {
                for (int64_t i = 0; i < latent_; ++i) shift[i] = -(mean_[i] = sums[i] / T(count));
                latent.add_to_rows(shift, count, d);
                latent.row_sums(d, count, sums);
            }
            // Rows a few at a time, each as far as the diagonal.
            constexpr int64_t kBand = S::kRegisters == 32 ? 4 : 3;
            for (int64_t r = 0; r < latent_; r += kBand) {
                const int64_t rows = least(kBand, latent_ - r);
                dot<S>(d + r * count, count, rows, d, count, least(latent_, (r + rows + 3) / 4 * 4), count,
                       !first, scatter_ + r * latent_, latent_);
            }
            grow(count, sums);
            for (int64_t i = 0; i < latent_; ++i) shift[i] = -mean_[i];
        });
    }

    // Those of other pixels, behind some; sums is overwritten.
    void merge(const RunningMoments& other, T* sums) {
        for (int64_t i = 0; i < latent_; ++i) sums[i] = T(other.seen_) * (other.mean_[i] - mean_[i]);
        for (int64_t i = 0; i < latent_; ++i)
            for (int64_t j = 0; j <= i; ++j)
                scatter_[i * latent_ + j] +=
                    other.scatter_[i * latent_ + j] + sums[i] * (other.mean_[j] - mean_[j]);
        grow(other.seen_, sums);
    }

    void finish() {
        const T share = T(1) / T(seen_);
        for (int64_t i = 0; i < latent_; ++i)
            for (int64_t j = 0; j <= i; ++j)
                scatter_[i * latent_ + j] = scatter_[j * latent_ + i] = scatter_[i * latent_ + j] * share;
    }

  private:
    // What the scatter has of `count` pixels was taken around the mean so far, from which they differ by
    // sums.
    void grow(int64_t count, const T* sums) {
        seen_ += count;
        for (int64_t i = 0; i < latent_; ++i) {
            const T step = sums[i] / T(seen_);
            mean_[i] += step;
            for (int64_t j = 0; j <= i; ++j) scatter_[i * latent_ + j] -= step * sums[j];
        }
    }

    const int64_t latent_;
    T *mean_, *scatter_;
    int64_t seen_;
};

// Pixels of a tile: as many latents as stay in L1, and in whole panels.
template <class S>
static int64_t moments_tile(int64_t latent) {
    constexpr int64_t kStep = Shape<S>::kLanes, kHeld = 32 * 1024 / sizeof(typename S::Scalar);
    return most(kStep, least<int64_t>(2048, kHeld / latent) / kStep * kStep);
}

template <class S>
static void moments(const MomentsParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    const bool channels_last = s.channels_last && s.pixels > 1;
    const bool dots = Latent<S>::by_dots(s.in_channels, s.latent, channels_last);
    const Tiling tiling(s.batch, s.pixels, moments_tile<S>(s.latent), Thin<S>::kPixels);
    const int64_t l = s.latent, square = l * l;
    // The parts of a sample behind its first one, until they are merged.
    const int64_t others = s.batch * (tiling.parts - 1);
    Pieces<T> shared(
        static_cast<T*>(scratch((Pieces<T>::rounded(dots ? l * s.in_channels : 0) +
                                 Pieces<T>::rounded(others * (l + square)) + Pieces<T>::rounded(l) + 1) *
                                    sizeof(T),
                                Scratch::kShared)));
    T* q_t = shared.take(dots ? l * s.in_channels : 0);
    T* other = shared.take(others * (l + square));
    T* spare = shared.take(l);
    if (dots) transpose<S>(s.q, l, s.in_channels, l, q_t, s.in_channels);
    const Latent<S> latent(s.input, s.in_channels, l, channels_last, s.q, q_t);
    const auto moments_of = [&](int64_t n, int64_t part, int64_t seen) {
        T* rest = other + (n * (tiling.parts - 1) + part - 1) * (l + square);
        return RunningMoments<S>(l, part ? rest : s.mean + n * l, part ? rest + l : s.covariance + n * square,
                                 seen);
    };
    const int64_t size = RunningMoments<S>::scratch_size(latent, l, tiling.largest());
    parallel(runtime, tiling.pieces(), [&](int64_t piece) {
        const int64_t n = piece / tiling.parts, part = piece % tiling.parts;
        T* memory = static_cast<T*>(scratch(size * sizeof(T)));
        moments_of(n, part, 0).add_part(latent, tiling, n, part, memory);
    });
    for (int64_t n = 0; n < s.batch; ++n) {
        RunningMoments<S> whole = moments_of(n, 0, tiling.begin(1));
        for (int64_t part = 1; part < tiling.parts; ++part)
            whole.merge(moments_of(n, part, tiling.begin(part + 1) - tiling.begin(part)), spare);
        whole.finish();
    }
}

}  // namespace dcd::DCD_ISA
