// SPDX-License-Identifier: BSD-3-Clause
// y = W_n x and its transpose d_x = W_n^T g, W_n = diag(lam) W0 + P Phi Q^T, for one sample, in either
// layout, by the cheaper of two orders of the same product:
//   factored     T = Q^T x, T' = Phi T, y = lam * (W0 x) + P T'; L (Ci + Co) + L^2 multiply-adds a pixel;
//   synthesised  a piece of W_n that fits in L2 is formed first, then a plain product; Co Ci L multiply-adds
//   a sample.
// No more of W_n than such a piece exists at any time.
#pragma once

#include "thin.h"

namespace dcd::DCD_ISA {

enum class Direction { kForward, kBackward };

// One direction of the product for one sample. `from` is x (forward) or G (backward), `to` is y or d_x.
template <class S>
class SampleProduct {
  public:
    using T = typename S::Scalar;
    // Elements of a piece of W_n: half of a 1 MB L2.
    static constexpr int64_t kPiece = 96 * 1024;
    // Most pixels for which the latent is held at a time.
    static constexpr int64_t kPixels = 8 * Shape<S>::kLanes + Thin<S>::kPixels;

    SampleProduct(const Layer<T>& layer, Direction direction, bool channels_last, bool synthesised)
        : layer_(layer),
          forward_(direction == Direction::kForward),
          channels_last_(channels_last),
          synthesised_(synthesised) {}

    int64_t from_channels() const { return forward_ ? layer_.in_channels : layer_.out_channels; }
    int64_t to_channels() const { return forward_ ? layer_.out_channels : layer_.in_channels; }

    // Elements of scratch that run() needs for `channels` output channels.
    int64_t scratch_size(int64_t channels) const {
        const int64_t l = layer_.all_latent();
        int64_t size = 0;
        if (synthesised_) {
            size += Pieces<T>::rounded(most(layer_.in_channels, layer_.out_channels) * layer_.latent);
            size += Pieces<T>::rounded(piece_width(channels) * from_stride() +
                                       to_stride(channels) * from_channels());
        } else {
            size += 2 * Pieces<T>::rounded(l * kPixels) + Pieces<T>::rounded(layer_.phi_size());
            if (!forward_) size += Pieces<T>::rounded(from_channels() * kPixels);
        }
        if (!channels_last_) size += Thin<S>::scratch_size(from_channels(), channels);
        return size + Pieces<T>::rounded(1);
    }

    // Channels [c0, c1) of `to`. `block` carries the epilogue: bias, residual, activation, and c with its
    // strides, all for channel 0 and pixel 0 (rows are channels, or pixels when channels_last).
    void run(const T* phi, const T* lam, const T* from, int64_t from_row, Block<T> epilogue, int64_t pixels,
             int64_t c0, int64_t c1, T* memory) const {
        epilogue.along_lanes = channels_last_;
        Pieces<T> pieces(memory);
        if (synthesised_)
            run_synthesised(phi, lam, from, from_row, epilogue, pixels, c0, c1, pieces);
        else
            run_factored(phi, lam, from, from_row, epilogue, pixels, c0, c1, pieces);
    }

  private:
    // --- synthesised
    // ---------------------------------------------------------------------------------------------

    // Output channels of one piece of W_n.
    int64_t piece_width(int64_t channels) const {
        const int64_t step = channels_last_ ? Shape<S>::kLanes : Shape<S>::kRows;
        const int64_t fit = kPiece / from_channels() / step * step;
        return least(channels, most(step, fit));
    }
    // A row of a piece is padded so that rows a power of two apart do not share one set of L1.
    static int64_t padded(int64_t n) { return Pieces<T>::rounded(n) + 64 / sizeof(T); }
    int64_t from_stride() const { return padded(from_channels()); }
    int64_t to_stride(int64_t channels) const { return padded(piece_width(channels)); }

    void run_synthesised(const T* phi, const T* lam, const T* from, int64_t from_row,
                         const Block<T>& epilogue, int64_t pixels, int64_t c0, int64_t c1,
                         Pieces<T>& pieces) const {
        T* fused = pieces.take(most(layer_.in_channels, layer_.out_channels) * layer_.latent);
        const bool transposed = forward_ && channels_last_;
        if (transposed)
            fuse_transposed(phi, c0, c1, fused);
        else
            fuse(phi, fused);
        const int64_t width = piece_width(c1 - c0);
        T* piece = pieces.take(width * from_stride() + to_stride(c1 - c0) * from_channels());
        T* thin = channels_last_ ? nullptr : pieces.take(Thin<S>::scratch_size(from_channels(), c1 - c0));
        for (int64_t first = c0; first < c1; first += width) {
            const int64_t last = least(first + width, c1);
            Block<T> block = epilogue.at(channels_last_ ? 0 : first, channels_last_ ? first : 0);
            int64_t stride;
            if (transposed) {
                stride = padded(last - first);
                synthesise_transposed(fused, lam, first, last, piece, stride);
            } else if (forward_) {
                stride = from_stride();
                synthesise(fused, lam, first, last, 0, layer_.in_channels, piece, stride);
            } else {
                stride = padded(last - first);
                synthesise(fused, lam, 0, layer_.out_channels, first, last, piece, stride);
            }
            block.k = from_channels();
            if (channels_last_) {
                block.a = from, block.a_row = from_row, block.a_k = 1;
                block.b = piece, block.b_k = stride;
                multiply_pixel_rows(block, pixels, last - first);
            } else {
                block.a = piece, block.a_row = forward_ ? stride : 1, block.a_k = forward_ ? 1 : stride;
                block.b = from, block.b_k = from_row;
                multiply_channel_rows<S>(block, last - first, pixels, nullptr, 0, thin);
            }
        }
    }

    // fused[o, j] = sum_a P[o, a] Phi[a, j]
    void fuse(const T* phi, T* fused) const {
        const int64_t l = layer_.latent, rows = layer_.out_block();
        for (int64_t b = 0; b < layer_.blocks; ++b) {
            Block<T> block;
            block.a = layer_.p + b * rows * l, block.a_row = l, block.a_k = 1;
            block.b = phi + b * l * l, block.b_k = l, block.k = l;
            block.c = fused + b * rows * l, block.c_row = l;
            multiply<S>(block, rows, l);
        }
    }

    // fused[j, o] = sum_a Phi[a, j] P[o, a] for o in [c0, c1)
    void fuse_transposed(const T* phi, int64_t c0, int64_t c1, T* fused) const {
        const int64_t l = layer_.latent, co = layer_.out_channels;
        for_blocks(c0, c1, layer_.out_block(), [&](int64_t b, int64_t first, int64_t last) {
            Block<T> block;
            block.a = phi + b * l * l, block.a_row = 1, block.a_k = l;
            block.b = layer_.p_t + first, block.b_k = co, block.k = l;
            block.c = fused + first, block.c_row = co;
            multiply<S>(block, l, last - first);
        });
    }

    // piece[o - o0, i - i0] = lam[o] W0[o, i] + sum_j fused[o, j] Q[i, j]
    void synthesise(const T* fused, const T* lam, int64_t o0, int64_t o1, int64_t i0, int64_t i1, T* piece,
                    int64_t stride) const {
        const int64_t ci = layer_.in_channels, l = layer_.latent;
        for_blocks(o0, o1, layer_.out_block(), [&](int64_t b, int64_t first, int64_t last) {
            for_block_and_rest(b, layer_.in_block(), i0, i1, [&](bool inside, int64_t left, int64_t right) {
                Block<T> block;
                block.init = layer_.weight + first * ci + left, block.init_row = ci;
                block.scale = lam ? lam + first : nullptr;
                if (inside) {
                    block.a2 = fused + first * l, block.a2_row = l, block.a2_k = 1;
                    block.b2 = layer_.q_t + left, block.b2_k = ci, block.k2 = l;
                }
                block.c = piece + (first - o0) * stride + left - i0, block.c_row = stride;
                multiply<S>(block, last - first, right - left);
            });
        });
    }

    // piece[i, o - o0] = lam[o] W0[o, i] + sum_j Q[i, j] fused[j, o]
    void synthesise_transposed(const T* fused, const T* lam, int64_t o0, int64_t o1, T* piece,
                               int64_t stride) const {
        const int64_t ci = layer_.in_channels, co = layer_.out_channels, l = layer_.latent;
        for_blocks(o0, o1, layer_.out_block(), [&](int64_t b, int64_t first, int64_t last) {
            for_block_and_rest(b, layer_.in_block(), 0, ci, [&](bool inside, int64_t top, int64_t bottom) {
                Block<T> block;
                block.along_lanes = true;
                block.init = layer_.weight_t + top * co + first, block.init_row = co;
                block.scale = lam ? lam + first : nullptr;
                if (inside) {
                    block.a2 = layer_.q + top * l, block.a2_row = l, block.a2_k = 1;
                    block.b2 = fused + first, block.b2_k = co, block.k2 = l;
                }
                block.c = piece + top * stride + first - o0, block.c_row = stride;
                multiply<S>(block, bottom - top, last - first);
            });
        });
    }

    // --- factored
    // ------------------------------------------------------------------------------------------------

    // x is read twice, by the projection and by the static product: no more of it than stays in L2 in
    // between.
    int64_t pixels_at_a_time(int64_t left) const {
        constexpr int64_t kStep = Shape<S>::kLanes;
        const int64_t fit =
            channels_last_ ? 8 : most<int64_t>(1, least<int64_t>(8, kPiece / 2 / kStep / from_channels()));
        const int64_t count = least(left, fit * kStep);
        return left - count <= Thin<S>::kPixels ? left : count;
    }

    void run_factored(const T* phi, const T* lam, const T* from, int64_t from_row, const Block<T>& epilogue,
                      int64_t pixels, int64_t c0, int64_t c1, Pieces<T>& pieces) const {
        const int64_t l = layer_.latent, all = layer_.all_latent();
        const int64_t k = layer_.weight ? from_channels() : 0;
        T* latent = pieces.take(all * kPixels);
        T* mixed = pieces.take(all * kPixels);
        const T* core = core_for(phi, pieces.take(layer_.phi_size()));
        // lam belongs to the output channels, the reduction axis of the backward product: there it scales the
        // operand.
        T* scaled = !forward_ && lam && k ? pieces.take(k * kPixels) : nullptr;
        T* thin = channels_last_ ? nullptr : pieces.take(Thin<S>::scratch_size(from_channels(), c1 - c0));
        // Without Q the backward product ends with Phi^T in Q's place and nothing is left to mix.
        const bool bare = !forward_ && !layer_.q;
        const T* left = forward_ ? layer_.p : layer_.q;
        const T* left_t = forward_ ? layer_.p_t : bare ? phi : layer_.q_t;
        const auto left_t_at = [&](int64_t channel) { return l ? left_t + channel : nullptr; };
        for (int64_t p0 = 0, count; p0 < pixels; p0 += count) {
            count = pixels_at_a_time(pixels - p0);
            const T* x = from + (channels_last_ ? p0 * from_row : p0);
            if (l) project(x, from_row, count, core, c0, c1, latent, mixed);
            const T* tail = bare ? latent : mixed;
            int64_t row = from_row;
            const T* operand = x;
            if (scaled) {
                row = channels_last_ ? k : count;
                scale_by_lam(x, from_row, count, lam, scaled, row);
                operand = scaled;
            }
            for_blocks(c0, c1, forward_ ? layer_.out_block() : layer_.in_block(),
                       [&](int64_t b, int64_t first, int64_t last) {
                           Block<T> block = channels_last_ ? epilogue.at(p0, first) : epilogue.at(first, p0);
                           block.k = k, block.k2 = l;
                           block.scale = forward_ && lam ? lam + first : nullptr;
                           if (channels_last_) {
                               if (forward_ && k && !layer_.weight_t) {
                                   const int64_t ci = layer_.in_channels;
                                   dot<S>(operand, row, count, layer_.weight + first * ci, ci, last - first,
                                          k, false, block.c, block.c_row);
                                   block.init = block.c, block.init_row = block.c_row, block.k = 0;
                               }
                               block.a = operand, block.a_row = row, block.a_k = 1;
                               block.b =
                                   block.k ? (forward_ ? layer_.weight_t : layer_.weight) + first : nullptr;
                               block.b_k = to_channels();
                               block.a2 = tail + b * l, block.a2_row = all, block.a2_k = 1;
                               block.b2 = left_t_at(first), block.b2_k = to_channels();
                               multiply_pixel_rows(block, count, last - first);
                           } else {
                               const int64_t ci = layer_.in_channels;
                               block.a = k ? layer_.weight + first * (forward_ ? ci : 1) : nullptr;
                               block.a_row = forward_ ? ci : 1, block.a_k = forward_ ? 1 : ci;
                               block.b = operand, block.b_k = row;
                               block.a2 = bare ? phi + (l ? first : 0) : left + first * l;
                               block.a2_row = bare ? 1 : l, block.a2_k = bare ? ci : 1;
                               block.b2 = tail + b * l * count, block.b2_k = count;
                               multiply_channel_rows<S>(block, last - first, count, left_t_at(first),
                                                        to_channels(), thin);
                           }
                       });
        }
    }

  public:
    // Phi as project() reads it: channels_last has pixels as rows, so there T' = T Phi^T takes the transpose,
    // which is made in `space` (phi_size() elements).
    const T* core_for(const T* phi, T* space) const {
        const int64_t l = layer_.latent;
        if (!channels_last_ || !forward_) return phi;
        if (!layer_.q) {
            transpose<S>(phi, layer_.in_channels, l, layer_.in_channels, space, l);
        } else {
            for (int64_t b = 0; b < layer_.blocks; ++b)
                transpose<S>(phi + b * l * l, l, l, l, space + b * l * l, l);
        }
        return space;
    }

    // latent = right^T x and mixed = core latent for the blocks that channels [c0, c1) of the result touch;
    // [B L, pixels], or [pixels, B L] when channels_last. right is Q (forward) or P (backward). Without Q
    // there is no latent forward and no mixed backward.
    void project(const T* x, int64_t x_row, int64_t count, const T* core, int64_t c0, int64_t c1, T* latent,
                 T* mixed) const {
        const int64_t l = layer_.latent, all = layer_.all_latent();
        const int64_t k = forward_ ? layer_.in_block() : layer_.out_block();
        const T* right = forward_ ? layer_.q : layer_.p;
        for_blocks(c0, c1, forward_ ? layer_.out_block() : layer_.in_block(),
                   [&](int64_t b, int64_t, int64_t) {
                       Block<T> first, second;
                       first.k = k, second.k = right ? l : k;
                       if (channels_last_) {
                           first.a = x + b * k, first.a_row = x_row, first.a_k = 1;
                           first.b = right + b * k * l, first.b_k = l;
                           first.c = latent + b * l, first.c_row = all;
                           second.a = right ? first.c : x, second.a_row = right ? all : x_row, second.a_k = 1;
                           second.b = core + b * l * l, second.b_k = l;
                           second.c = mixed + b * l, second.c_row = all;
                           if (right) multiply<S>(first, count, l);
                           if (layer_.q || !right) multiply<S>(second, count, l);
                       } else {
                           first.a = right + b * k * l, first.a_row = 1, first.a_k = l;
                           first.b = x + b * k * x_row, first.b_k = x_row;
                           first.c = latent + b * l * count, first.c_row = count;
                           const int64_t row = right ? l : k;
                           second.a = core + b * l * l, second.a_row = forward_ ? row : 1,
                           second.a_k = forward_ ? 1 : l;
                           second.b = right ? first.c : x, second.b_k = right ? count : x_row;
                           second.c = mixed + b * l * count, second.c_row = count;
                           if (right) multiply<S>(first, l, count);
                           if (layer_.q || !right) multiply<S>(second, l, count);
                       }
                   });
    }

  private:
    void scale_by_lam(const T* x, int64_t x_row, int64_t count, const T* lam, T* out, int64_t out_row) const {
        const int64_t k = from_channels();
        if (channels_last_) {
            for (int64_t r = 0; r < count; ++r)
                for (int64_t c = 0; c < k; ++c) out[r * out_row + c] = lam[c] * x[r * x_row + c];
        } else {
            for (int64_t c = 0; c < k; ++c)
                for (int64_t r = 0; r < count; ++r) out[c * out_row + r] = lam[c] * x[c * x_row + r];
        }
    }

    // --- loops
    // ---------------------------------------------------------------------------------------------------

    // Pixels are the rows here: as many at a time as stay in L2 while every panel of channels passes over
    // them.
    static void multiply_pixel_rows(const Block<T>& block, int64_t pixels, int64_t channels) {
        const int64_t rows = Shape<S>::kRows;
        const int64_t step = most(rows, kPiece / 2 / most<int64_t>(block.k, 1) / rows * rows);
        Block<T> ahead = block;
        // the wider of the two, which is what the loop waits for
        if (block.k >= channels)
            ahead.fetch_a = rows_ahead<S>(pixels, block.k);
        else
            ahead.fetch_c = rows_ahead<S>(pixels, channels);
        for (int64_t p0 = 0; p0 < pixels; p0 += step)
            multiply<S>(ahead.at(p0, 0), least(step, pixels - p0), channels);
    }

    const Layer<T>& layer_;
    const bool forward_, channels_last_, synthesised_;
};

}  // namespace dcd::DCD_ISA
