// SPDX-License-Identifier: BSD-3-Clause
// Gradients that pointwise and apply share, given G = dy behind the activation:
//   d_x = W_n^T G                                                    (input_gradient)
//   with T = Q^T x and H = P^T G, which are L numbers a pixel:
//   d_Phi_n = H T^T,  d_P = sum_n G (Phi_n T)^T,  d_Q = sum_n x (Phi_n^T H)^T (LatentGradients::from_pixels)
#pragma once

#include "dot.h"
#include "lowrank.h"

namespace dcd::DCD_ISA {

template <class S, class Params>
static void input_gradient(const Layer<typename S::Scalar>& layer, const Params& s, bool channels_last,
                           const Runtime& runtime) {
    using T = typename S::Scalar;
    const bool synthesised =
        s.latent && layer.weight &&
        residual_cost(s.in_channels, s.out_channels, s.latent, s.blocks, s.pixels).synthesis_pays();
    const SampleProduct<S> product(layer, Direction::kBackward, channels_last, synthesised);
    const int64_t parts = channel_parts(s.batch, runtime.threads, s.in_channels, Shape<S>::kLanes);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t n = task / parts, part = task % parts;
        const int64_t c0 = part * s.in_channels / parts, c1 = (part + 1) * s.in_channels / parts;
        Block<T> block;
        block.c = s.d_input.data + n * s.d_input.sample;
        block.c_row = channels_last ? s.d_input.pixel : s.d_input.channel;
        T* memory = static_cast<T*>(scratch(product.scratch_size(c1 - c0) * sizeof(T)));
        product.run(s.phi + n * layer.phi_size(), s.lam ? s.lam + n * s.out_channels : nullptr,
                    s.grad.data + n * s.grad.sample, channels_last ? s.grad.pixel : s.grad.channel, block,
                    s.pixels, c0, c1, memory);
    });
}

// Zeroed memory that outlives a parallel section; not scratch, for its size grows with the batch.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(count > 0 ? static_cast<T*>(allocate_zeroed(count * static_cast<int64_t>(sizeof(T))))
                          : nullptr) {}
    ~Buffer() { release(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

// c[r, j] (+)= sum over pixels of a[r] b[j], for rows of channels and the given layout.
template <class S>
static void outer(bool channels_last, const typename S::Scalar* a, int64_t a_row, int64_t rows,
                  const typename S::Scalar* b, int64_t b_row, int64_t columns, int64_t pixels,
                  bool accumulate, typename S::Scalar* c, int64_t c_row) {
    using T = typename S::Scalar;
    if (!channels_last) {
        dot<S>(a, a_row, rows, b, b_row, columns, pixels, accumulate, c, c_row);
        return;
    }
    // Runs of pixels whose b stays in L2, and short enough that a lane's sum keeps its digits.
    const int64_t step = most<int64_t>(64, least<int64_t>(256, 64 * 1024 / most<int64_t>(columns, 1)));
    for (int64_t p0 = 0; p0 < pixels; p0 += step) {
        Block<T> block;
        block.a = a + p0 * a_row, block.a_row = 1, block.a_k = a_row;
        block.b = b + p0 * b_row, block.b_k = b_row;
        block.k = least(step, pixels - p0);
        block.c = c, block.c_row = c_row;
        // added behind the run's own sum, not carried through it: thousands of terms one by one lose digits
        if (accumulate || p0 > 0) block.residual = c, block.residual_row = c_row;
        // the next run's, which the hardware does not expect
        if (p0 + step < pixels) {
            if (worth_fetching(pixels, a_row)) fetch_rows<S>(block.a + step * a_row, step, a_row, rows);
            if (worth_fetching(pixels, b_row)) fetch_rows<S>(block.b + step * b_row, step, b_row, columns);
        }
        multiply<S>(block, rows, columns);
    }
}

// out[j] += factor * in[j], or = where it is the first
template <class S>
static void add_scaled(const typename S::Scalar* in, typename S::Scalar factor, int64_t count, bool first,
                       typename S::Scalar* out) {
    const auto f = S::set1(factor);
    int64_t i = 0;
    for (; i + S::kLanes <= count; i += S::kLanes)
        S::store(out + i, first ? S::mul(f, S::load(in + i)) : S::fma(f, S::load(in + i), S::load(out + i)));
    for (; i < count; ++i) out[i] = (first ? 0 : out[i]) + factor * in[i];
}

// Rows of a gradient that one task owns, so that no two tasks write the same sum.
static constexpr int64_t kChunk = 48;
static inline int64_t chunks(int64_t channels) {
    return (channels + kChunk - 1) / kChunk;
}

template <class S>
class LatentGradients {
  public:
    using T = typename S::Scalar;

    LatentGradients(const Layer<T>& layer, int64_t batch, int64_t pixels, bool channels_last)
        : layer_(layer), batch_(batch), pixels_(pixels), channels_last_(channels_last) {}

    // Any of d_p [Co, L], d_phi [N, …], d_q [Ci, L] may be null.
    void from_pixels(const Map<const T>& input, const Map<const T>& grad, const T* phi, T* d_p, T* d_phi,
                     T* d_q, const Runtime& runtime) const {
        if (!d_p && !d_phi && !d_q) return;
        const int64_t all = layer_.all_latent(), l = layer_.latent, size = all * least(pixels_, kPixels);
        const Buffer<T> mixed(d_p ? batch_ * all * pixels_ : 0);  // Phi_n T; see latent_at() for the layout
        const Buffer<T> back(d_q ? batch_ * all * pixels_ : 0);   // Phi_n^T H
        const SampleProduct<S> forward(layer_, Direction::kForward, channels_last_, false);
        const SampleProduct<S> backward(layer_, Direction::kBackward, channels_last_, false);
        parallel(runtime, batch_, [&](int64_t n) {
            Pieces<T> pieces(static_cast<T*>(scratch(
                (3 * Pieces<T>::rounded(size) + Pieces<T>::rounded(layer_.phi_size()) + 1) * sizeof(T))));
            T *latent = pieces.take(size), *latent_grad = pieces.take(size), *spare = pieces.take(size);
            const T* phi_n = phi + n * layer_.phi_size();
            const T* core = forward.core_for(phi_n, pieces.take(layer_.phi_size()));
            for_pixels([&](int64_t p0, int64_t count) {
                const T *x = at(input, n, p0), *g = at(grad, n, p0);
                if (d_p || d_phi)
                    forward.project(x, step(input), count, core, 0, layer_.out_channels, latent,
                                    d_p ? latent_at(mixed.get(), n, p0) : spare);
                if (d_q || d_phi)
                    backward.project(g, step(grad), count, phi_n, 0, layer_.in_channels, latent_grad,
                                     d_q ? latent_at(back.get(), n, p0) : spare);
                if (!d_phi) return;
                T* out = d_phi + n * layer_.phi_size();
                const int64_t row = latent_row(count);
                if (!layer_.q) {
                    outer<S>(channels_last_, latent_grad, row, l, x, step(input), layer_.in_channels, count,
                             p0 > 0, out, layer_.in_channels);
                    return;
                }
                for (int64_t b = 0; b < layer_.blocks; ++b)
                    outer<S>(channels_last_, part(latent_grad, b, row), row, l, part(latent, b, row), row, l,
                             count, p0 > 0, out + b * l * l, l);
            });
        });
        if (d_p) sum_over_samples(grad, mixed.get(), layer_.out_channels, layer_.out_block(), d_p, runtime);
        if (d_q) sum_over_samples(input, back.get(), layer_.in_channels, layer_.in_block(), d_q, runtime);
    }

  private:
    // Pixels whose latents stay in L2; their sums stay short too.
    static constexpr int64_t kPixels = 2048;

    template <class F>
    void for_pixels(const F& f) const {
        for (int64_t p0 = 0; p0 < pixels_; p0 += kPixels) f(p0, least(kPixels, pixels_ - p0));
    }
    int64_t step(const Map<const T>& map) const { return channels_last_ ? map.pixel : map.channel; }
    const T* at(const Map<const T>& map, int64_t n, int64_t p0) const {
        return map.data + n * map.sample + p0 * map.pixel;
    }
    // The latents of one run of pixels lie together: [B L, pixels], or [pixels, B L] when channels_last.
    T* latent_at(T* latents, int64_t n, int64_t p0) const {
        return latents + (n * pixels_ + p0) * layer_.all_latent();
    }
    int64_t latent_row(int64_t count) const { return channels_last_ ? layer_.all_latent() : count; }
    const T* part(const T* latent, int64_t b, int64_t row) const {
        return latent + b * layer_.latent * (channels_last_ ? 1 : row);
    }

    // d[c, j] = sum over samples and pixels of map[c] latent[j]
    void sum_over_samples(const Map<const T>& map, T* latents, int64_t channels, int64_t block, T* d,
                          const Runtime& runtime) const {
        const int64_t l = layer_.latent;
        parallel(runtime, chunks(channels), [&](int64_t chunk) {
            const int64_t c0 = chunk * kChunk, c1 = least(c0 + kChunk, channels);
            for (int64_t n = 0; n < batch_; ++n)
                for_pixels([&](int64_t p0, int64_t count) {
                    const int64_t row = latent_row(count);
                    for_blocks(c0, c1, block, [&](int64_t b, int64_t first, int64_t last) {
                        outer<S>(channels_last_, at(map, n, p0) + first * map.channel, step(map),
                                 last - first, part(latent_at(latents, n, p0), b, row), row, l, count,
                                 n > 0 || p0 > 0, d + first * l, l);
                    });
                });
        });
    }

    const Layer<T>& layer_;
    const int64_t batch_, pixels_;
    const bool channels_last_;
};

}  // namespace dcd::DCD_ISA
