// SPDX-License-Identifier: BSD-3-Clause
// Gradients of y = W_n x, given G = dy behind the activation. With S_n = G x^T, of which one band of rows
// exists at a time:  d_W0 = sum_n lam_n S_n,  d_lam_n = rowsum(S_n W0) (never a division by lam),  and for
// large maps also
//   d_Phi_n = P^T S_n Q,  d_P = sum_n S_n Q Phi_n^T,  d_Q = sum_n S_n^T P Phi_n,
// which costs Co Ci L a sample where gradients.h costs L (Ci + Co) a pixel.
#pragma once

#include "gradients.h"
#include "pointwise.h"

namespace dcd::DCD_ISA {

template <class S>
static void weight_gradients(const PointwiseGradParams<typename S::Scalar>& s,
                             const Layer<typename S::Scalar>& layer, bool channels_last, bool with_latent,
                             const Runtime& runtime) {
    using T = typename S::Scalar;
    const int64_t ci = s.in_channels, co = s.out_channels, l = s.latent, phi_size = layer.phi_size();
    const bool want_p = with_latent && s.d_p, want_phi = with_latent && s.d_phi,
               want_q = with_latent && s.d_q;
    if (!s.d_weight && !s.d_lam && !want_p && !want_phi && !want_q) return;
    const int64_t bands = chunks(co);
    // Each band's share of what all rows add to: summed afterwards in a fixed order.
    const Buffer<T> phi_shares(want_phi ? bands * s.batch * phi_size : 0);
    const Buffer<T> q_shares(want_q ? bands * l * ci : 0);  // [band, L, Ci]
    parallel(runtime, bands, [&](int64_t band) {
        const int64_t o0 = band * kChunk, o1 = least(o0 + kChunk, co), rows = o1 - o0;
        Pieces<T> pieces(
            static_cast<T*>(scratch((Pieces<T>::rounded(rows * ci) + 2 * Pieces<T>::rounded(rows * l) +
                                     Pieces<T>::rounded(l * l) + 1) *
                                    sizeof(T))));
        T* outer_product = pieces.take(rows * ci);  // S_n, [rows, Ci]
        T* times_q = pieces.take(rows * l);         // S_n Q
        T* fused = pieces.take(rows * l);           // P Phi_n
        T* phi_t = pieces.take(l * l);
        T* q_share = q_shares.get() + band * l * ci;
        for (int64_t n = 0; n < s.batch; ++n) {
            outer<S>(channels_last, s.grad.data + n * s.grad.sample + o0 * s.grad.channel,
                     channels_last ? s.grad.pixel : s.grad.channel, rows, s.input.data + n * s.input.sample,
                     channels_last ? s.input.pixel : s.input.channel, ci, s.pixels, false, outer_product, ci);
            const T* lam = s.lam ? s.lam + n * co : nullptr;
            for (int64_t r = 0; r < rows; ++r) {
                const T* row = outer_product + r * ci;
                if (s.d_lam)
                    dot<S>(row, 0, 1, s.weight + (o0 + r) * ci, 0, 1, ci, false, s.d_lam + n * co + o0 + r,
                           1);
                if (s.d_weight)
                    add_scaled<S>(row, lam ? lam[o0 + r] : T(1), ci, n == 0, s.d_weight + (o0 + r) * ci);
            }
            if (!want_p && !want_phi && !want_q) continue;
            for_blocks(o0, o1, layer.out_block(), [&](int64_t b, int64_t first, int64_t last) {
                const int64_t count = last - first, width = layer.in_block();
                const T* phi = s.phi + n * phi_size + b * l * l;
                const T* block_of_s = outer_product + (first - o0) * ci + b * width;
                if (want_p || want_phi)
                    dot<S>(block_of_s, ci, count, layer.q_t + b * width, ci, l, width, false, times_q, l);
                if (want_p) {
                    transpose<S>(phi, l, l, l, phi_t, l);
                    Block<T> block;
                    block.a = times_q, block.a_row = l, block.a_k = 1;
                    block.b = phi_t, block.b_k = l, block.k = l;
                    block.c = s.d_p + first * l, block.c_row = l;
                    if (n > 0) block.init = block.c, block.init_row = l;
                    multiply<S>(block, count, l);
                }
                if (want_phi) {
                    Block<T> block;
                    block.a = s.p + first * l, block.a_row = 1, block.a_k = l;
                    block.b = times_q, block.b_k = l, block.k = count;
                    block.c = phi_shares.get() + (band * s.batch + n) * phi_size + b * l * l, block.c_row = l;
                    block.init = block.c, block.init_row = l;
                    multiply<S>(block, l, l);
                }
                if (want_q) {
                    Block<T> fuse;
                    fuse.a = s.p + first * l, fuse.a_row = l, fuse.a_k = 1;
                    fuse.b = phi, fuse.b_k = l, fuse.k = l;
                    fuse.c = fused, fuse.c_row = l;
                    multiply<S>(fuse, count, l);
                    Block<T> block;
                    block.a = fused, block.a_row = 1, block.a_k = l;
                    block.b = block_of_s, block.b_k = ci, block.k = count;
                    block.c = q_share + b * width, block.c_row = ci;
                    block.init = block.c, block.init_row = ci;
                    multiply<S>(block, l, width);
                }
            });
        }
    });
    if (want_phi)
        for (int64_t band = 0; band < bands; ++band)
            add_scaled<S>(phi_shares.get() + band * s.batch * phi_size, T(1), s.batch * phi_size, band == 0,
                          s.d_phi);
    if (want_q) {
        for (int64_t band = 1; band < bands; ++band)
            add_scaled<S>(q_shares.get() + band * l * ci, T(1), l * ci, false, q_shares.get());
        transpose<S>(q_shares.get(), ci, l, ci, s.d_q, l);
    }
}

template <class S>
static void pointwise_grad(const PointwiseGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    const bool channels_last = s.channels_last && s.pixels > 1;
    const Layer<T> layer =
        make_layer<S>(s.in_channels, s.out_channels, s.latent, s.blocks, s.weight, s.p, s.q, false);
    if (s.d_input.data) input_gradient<S>(layer, s, channels_last, runtime);
    const int64_t l = s.latent;
    const bool latent_from_s =
        l && s.in_channels * s.out_channels / s.blocks < s.pixels * (s.in_channels + s.out_channels);
    weight_gradients<S>(s, layer, channels_last, latent_from_s, runtime);
    if (l && !latent_from_s)
        LatentGradients<S>(layer, s.batch, s.pixels, channels_last)
            .from_pixels(s.input, s.grad, s.phi, s.d_p, s.d_phi, s.d_q, runtime);
}

}  // namespace dcd::DCD_ISA
