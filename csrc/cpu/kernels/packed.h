// SPDX-License-Identifier: BSD-3-Clause
// y = act(W_n x + bias + residual) from packed weights: the two orders of lowrank.h on the panels of
// panels.h.
//   factored     W0 is read once for as many samples as fit, only lam, Phi and T' = Phi Q^T x change
//   synthesised  as many panels of W_n as fit in half of L2 are formed, then all pixels of the sample pass
#pragma once

#include "../kernels.h"
#include "panels.h"
#include "thin.h"

namespace dcd::DCD_ISA {

template <class S>
class PackedProduct {
  public:
    using T = typename S::Scalar;
    static constexpr int64_t kLine = 64 / sizeof(T);

    explicit PackedProduct(const PointwiseParams<T>& s, const PointwisePlan& plan)
        : s_(s),
          parts_(packed_parts(s.in_channels, s.out_channels, s.latent)),
          plan_(plan),
          weight_(s.packed + parts_.weight),
          p_(s.packed + parts_.p),
          q_(s.packed + parts_.q),
          channels_last_(s.channels_last && s.pixels > 1) {}

    void run(const Runtime& runtime) const {
        parallel(runtime, plan_.sample_tasks * plan_.channel_tasks * plan_.pixel_tasks, [&](int64_t task) {
            const int64_t part = task % plan_.channel_tasks, rest = task / plan_.channel_tasks;
            const int64_t piece = rest % plan_.pixel_tasks, group = rest / plan_.pixel_tasks;
            const int64_t all = panels_of(s_.out_channels);
            Share share;
            share.n0 = group * s_.batch / plan_.sample_tasks,
            share.n1 = (group + 1) * s_.batch / plan_.sample_tasks;
            share.c0 = part * all / plan_.channel_tasks * kPanel;
            share.c1 = least((part + 1) * all / plan_.channel_tasks * kPanel, s_.out_channels);
            // whole lines of a contiguous map
            const int64_t lines = (s_.pixels + kLine - 1) / kLine;
            share.p0 = piece * lines / plan_.pixel_tasks * kLine;
            share.p1 = least((piece + 1) * lines / plan_.pixel_tasks * kLine, s_.pixels);
            if (share.c0 >= share.c1 || share.p0 >= share.p1) return;
            if (plan_.synthesised)
                synthesised(share);
            else if (channels_last_)
                factored_rows(share);
            else
                factored_maps(share);
        });
    }

  private:
    // Samples, output channels and pixels of one task.
    struct Share {
        int64_t n0, n1, c0, c1, p0, p1;
    };

    int64_t row_of(const Map<const T>& map) const { return channels_last_ ? map.pixel : map.channel; }
    const T* phi_of(int64_t n) const { return s_.phi + n * s_.latent * s_.latent; }
    const T* lam_of(int64_t n) const { return s_.lam ? s_.lam + n * s_.out_channels : nullptr; }

    // --- synthesised -------------------------------------------------------------------------------------

    void synthesised(const Share& share) const {
        const int64_t k = s_.in_channels, l = s_.latent;
        const int64_t width = least(share.c1 - share.c0, plan_.channels_at_a_time);
        const int64_t panels = panels_of(width);
        const int64_t fused_size = Pieces<T>::rounded(panels * l * kPanel);
        const int64_t size = fused_size + Pieces<T>::rounded(panels * panel_size()) + space_for_pixels();
        Pieces<T> pieces(static_cast<T*>(scratch(size * sizeof(T))));
        T* fused = pieces.take(panels * l * kPanel);
        T* weight = pieces.take(panels * panel_size());
        T* space = pieces.take(space_for_pixels());
        for (int64_t n = share.n0; n < share.n1; ++n)
            for (int64_t c0 = share.c0; c0 < share.c1; c0 += width) {
                const int64_t c1 = least(c0 + width, share.c1);
                synthesise(n, c0, c1, fused, weight);
                if (channels_last_) {
                    PanelBlock<T> block = epilogue_rows(n, c0);
                    block.b = weight, block.b_panel = panel_size(), block.k = k;
                    pixel_rows(block, n, share.p0, share.p1, c1 - c0, space);
                } else {
                    Block<T> block = epilogue_maps(n, c0, share.p0);
                    block.b = s_.input.data + n * s_.input.sample + share.p0, block.b_k = s_.input.channel;
                    block.k = k;
                    maps(block, weight, nullptr, c1 - c0, share.p1 - share.p0, space);
                }
            }
    }

    // A panel of W_n. Panels a page apart would share their sets of L1.
    int64_t panel_size() const { return s_.in_channels * kPanel; }

    // weight[i, o] = lam[o] W0[i, o] + sum_j Q[i, j] fused[j, o], fused[j, o] = sum_a Phi[a, j] P[o, a]
    void synthesise(int64_t n, int64_t c0, int64_t c1, T* fused, T* weight) const {
        const int64_t k = s_.in_channels, l = s_.latent, first = c0 / kPanel;
        Ahead<T> ahead;
        PanelBlock<T> mix;
        mix.a = phi_of(n), mix.a_row = 1, mix.a_k = l, mix.k = l;
        mix.b = p_ + first * l * kPanel, mix.b_panel = l * kPanel;
        mix.c = fused, mix.c_row = kPanel, mix.c_panel = l * kPanel;
        multiply_panels<S>(mix, l, c1 - c0, {}, ahead);
        PanelBlock<T> block;
        block.init = weight_ + first * k * kPanel, block.init_row = kPanel, block.init_panel = k * kPanel;
        if (s_.lam) block.scale = lam_of(n) + c0;
        block.a2 = q_, block.a2_row = parts_.q_row;
        block.b2 = fused, block.b2_panel = l * kPanel, block.k2 = l;
        block.c = weight, block.c_row = kPanel, block.c_panel = panel_size();
        multiply_panels<S>(block, k, c1 - c0, {}, ahead);
    }

    // --- channels_last -----------------------------------------------------------------------------------

    PanelBlock<T> epilogue_rows(int64_t n, int64_t c0) const {
        PanelBlock<T> block;
        if (s_.bias) block.bias = s_.bias + n * s_.bias_sample + c0;
        if (s_.residual.data)
            block.residual = s_.residual.data + n * s_.residual.sample + c0,
            block.residual_row = s_.residual.pixel;
        block.c = s_.output.data + n * s_.output.sample + c0, block.c_row = s_.output.pixel;
        block.activation = s_.activation;
        return block;
    }

    // Rows a multiple of a page apart share one set of L1, which has fewer ways than a tile has rows.
    bool rows_collide() const { return s_.input.pixel * int64_t(sizeof(T)) % 4096 == 0; }
    int64_t copied_row() const { return s_.in_channels + kLine; }

    int64_t space_for_pixels() const {
        constexpr int64_t kThin = Thin<S>::kPixels;
        if (!channels_last_)
            return Pieces<T>::rounded(kThin * s_.in_channels) + Pieces<T>::rounded(kThin * s_.latent) +
                   2 * Pieces<T>::rounded(kThin * s_.out_channels);
        return rows_collide() ? Pieces<T>::rounded(plan_.rows_at_a_time * copied_row()) : 0;
    }

    const T* copy_rows(const T* x, int64_t count, T* space) const {
        for (int64_t r = 0; r < count; ++r) {
            const T* from = x + r * s_.input.pixel;
            T* to = space + r * copied_row();
            for (int64_t i = 0; i < s_.in_channels; ++i) to[i] = from[i];
        }
        return space;
    }

    // Pixels [p0, p1) of sample n against all lanes of the block, so many at a time that x stays near.
    void pixel_rows(const PanelBlock<T>& block, int64_t n, int64_t p0, int64_t p1, int64_t channels,
                    T* space) const {
        const T* x = s_.input.data + n * s_.input.sample;
        const int64_t row = s_.input.pixel,
                      steps = (p1 - p0 + plan_.rows_at_a_time - 1) / plan_.rows_at_a_time;
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t r0 = p0 + step * (p1 - p0) / steps, r1 = p0 + (step + 1) * (p1 - p0) / steps;
            PanelBlock<T> rows = block;
            rows.a = x + r0 * row, rows.a_row = row;
            if (rows_collide()) rows.a = copy_rows(rows.a, r1 - r0, space), rows.a_row = copied_row();
            rows.c += r0 * block.c_row;
            if (rows.residual) rows.residual += r0 * block.residual_row;
            Ahead<T> ahead{x + r1 * row, x + least(r1 + (r1 - r0), p1) * row};
            multiply_panels<S>(rows, r1 - r0, channels, {}, ahead);
        }
    }

    void factored_rows(const Share& share) const {
        const int64_t k = s_.in_channels, l = s_.latent, row = parts_.q_row, x_row = s_.input.pixel;
        const int64_t pixels = share.p1 - share.p0, rows = plan_.rows_at_a_time;
        // whole samples, or a part of one
        const int64_t samples = pixels <= rows ? most<int64_t>(1, rows / pixels) : 1;
        const int64_t most_rows = samples > 1 ? samples * pixels : least(rows, pixels);
        const int64_t size = 2 * Pieces<T>::rounded(most_rows * row) + Pieces<T>::rounded(l * row) +
                             (rows_collide() ? Pieces<T>::rounded(most_rows * copied_row()) : 0);
        Pieces<T> pieces(static_cast<T*>(scratch((size + 1) * sizeof(T))));
        T* latent = pieces.take(most_rows * row);
        T* mixed = pieces.take(most_rows * row);
        T* core = pieces.take(l * row);
        T* copied = rows_collide() ? pieces.take(most_rows * copied_row()) : nullptr;
        const int64_t steps = (pixels + rows - 1) / rows;
        for (int64_t n0 = share.n0; n0 < share.n1; n0 += samples)
            for (int64_t step = 0; step < steps; ++step) {
                const int64_t n1 = least(n0 + samples, share.n1), r0 = share.p0 + step * pixels / steps;
                const int64_t count = share.p0 + (step + 1) * pixels / steps - r0;
                const T* x = s_.input.data + n0 * s_.input.sample + r0 * x_row;
                SampleSteps by;
                by.count = n1 - n0, by.a = s_.input.sample, by.a2 = count * row;
                by.scale = s_.out_channels, by.bias = s_.bias_sample;
                by.residual = s_.residual.sample, by.c = s_.output.sample;
                PanelBlock<T> block = epilogue_rows(n0, share.c0);
                block.c += r0 * block.c_row;
                if (block.residual) block.residual += r0 * block.residual_row;
                block.a = x, block.a_row = x_row, block.k = k;
                if (copied) {
                    for (int64_t n = 0; n < by.count; ++n)
                        copy_rows(x + n * by.a, count, copied + n * count * copied_row());
                    block.a = copied, block.a_row = copied_row(), by.a = count * copied_row();
                }
                Ahead<T> ahead;
                if (l) {
                    PanelBlock<T> project = block;
                    project.bias = project.residual = nullptr, project.activation = kNone;
                    project.b = q_, project.b_k = row, project.b_panel = kPanel;
                    project.c = latent, project.c_row = row;
                    SampleSteps to = by;
                    to.c = count * row;
                    multiply_panels<S>(project, count, row, to, ahead);
                    for (int64_t n = 0; n < by.count; ++n) {
                        mix_rows(phi_of(n0 + n), latent + n * count * row, count, core,
                                 mixed + n * count * row);
                    }
                    block.a2 = mixed, block.a2_row = row;
                    block.b2 = p_ + share.c0 * l, block.b2_panel = l * kPanel, block.k2 = l;
                }
                block.b = weight_ + share.c0 * k, block.b_panel = k * kPanel;
                if (s_.lam) block.scale = lam_of(n0) + share.c0;
                multiply_panels<S>(block, count, share.c1 - share.c0, by, ahead);
            }
    }

    // mixed[p, i] = sum_j Phi[i, j] latent[p, j]
    void mix_rows(const T* phi, const T* latent, int64_t count, T* core, T* mixed) const {
        const int64_t l = s_.latent, row = parts_.q_row;
        for (int64_t j = 0; j < l; ++j)
            for (int64_t i = 0; i < row; ++i) core[j * row + i] = i < l ? phi[i * l + j] : T(0);
        Ahead<T> ahead;
        PanelBlock<T> mix;
        mix.a = latent, mix.a_row = row, mix.k = l;
        mix.b = core, mix.b_k = row, mix.b_panel = kPanel;
        mix.c = mixed, mix.c_row = row;
        multiply_panels<S>(mix, count, row, {}, ahead);
    }

    // --- contiguous maps ---------------------------------------------------------------------------------

    Block<T> epilogue_maps(int64_t n, int64_t c0, int64_t p0) const {
        Block<T> block;
        if (s_.bias) block.bias = s_.bias + n * s_.bias_sample + c0;
        if (s_.residual.data) {
            block.residual_row = s_.residual.channel;
            block.residual = s_.residual.data + n * s_.residual.sample + c0 * block.residual_row + p0;
        }
        block.c_row = s_.output.channel;
        block.c = s_.output.data + n * s_.output.sample + c0 * block.c_row + p0;
        block.activation = s_.activation;
        return block;
    }

    void factored_maps(const Share& share) const {
        const int64_t k = s_.in_channels, l = s_.latent, pixels = share.p1 - share.p0;
        // a few pixels left over are done with those before them
        const int64_t step = plan_.rows_at_a_time, longest = least(pixels, step + Thin<S>::kPixels);
        const int64_t size = 2 * Pieces<T>::rounded(l * longest) + space_for_pixels();
        Pieces<T> pieces(static_cast<T*>(scratch((size + 1) * sizeof(T))));
        T* latent = pieces.take(l * longest);
        T* mixed = pieces.take(l * longest);
        T* space = pieces.take(space_for_pixels());
        for (int64_t n = share.n0; n < share.n1; ++n)
            for (int64_t p0 = share.p0, count; p0 < share.p1; p0 += count) {
                count = share.p1 - p0 <= longest ? share.p1 - p0 : step;
                Block<T> block = epilogue_maps(n, share.c0, p0);
                block.b = s_.input.data + n * s_.input.sample + p0, block.b_k = s_.input.channel;
                block.k = k;
                if (s_.lam) block.scale = lam_of(n) + share.c0;
                if (l) {
                    Block<T> project;
                    project.a = q_, project.a_row = 1, project.a_k = parts_.q_row;
                    project.b = block.b, project.b_k = block.b_k, project.k = k;
                    project.c = latent, project.c_row = count;
                    multiply<S>(project, l, count);
                    Block<T> mix;
                    mix.a = phi_of(n), mix.a_row = l, mix.a_k = 1;
                    mix.b = latent, mix.b_k = count, mix.k = l;
                    mix.c = mixed, mix.c_row = count;
                    multiply<S>(mix, l, count);
                    block.b2 = mixed, block.b2_k = count, block.k2 = l;
                }
                maps(block, weight_ + share.c0 * k, l ? p_ + share.c0 * l : nullptr, share.c1 - share.c0,
                     count, space);
            }
    }

    // Channels, in panels of W and of P, against the pixels of block.b. A few columns of pixels pass all
    // bands of channels: one where they come from L2 slower than they are used, else as many as stay there,
    // so that each row of the output is written in a long run.
    void maps(const Block<T>& block, const T* weight, const T* p, int64_t channels, int64_t pixels,
              T* space) const {
        constexpr int W = S::kLanes;
        const int64_t thin = Thin<S>::of(pixels), wide = pixels - thin;
        const int64_t vectors = (wide + W - 1) / W;
        const int64_t columns = (vectors + Shape<S>::kVectors - 1) / Shape<S>::kVectors;
        for (int64_t j0 = 0; j0 < columns; j0 += plan_.columns_at_a_time) {
            const int64_t j1 = least(j0 + plan_.columns_at_a_time, columns);
            for (int64_t c = 0, band = 0, rows; c < channels; c += rows, ++band) {
                const int64_t panel = c / kPanel, inside = c % kPanel;
                const int64_t left = least(kPanel, channels - panel * kPanel) - inside;
                // two halves instead of a full tile and a thin one
                rows = left < 2 * Shape<S>::kRows && left > Shape<S>::kRows
                           ? (left + 1) / 2
                           : least<int64_t>(left, Shape<S>::kRows);
                for (int64_t j = j0; j < j1; ++j) {
                    const int64_t v0 = j * vectors / columns, v1 = (j + 1) * vectors / columns;
                    Block<T> tile = block.at(c, v0 * W);
                    tile.a = weight + panel * block.k * kPanel + inside, tile.a_row = 1, tile.a_k = kPanel;
                    // The first bands fetch a vector each of what lies behind, whose rows are too far apart
                    // for the hardware to guess.
                    const bool fetch = band < Shape<S>::kVectors && v1 + band < vectors;
                    tile.upcoming = fetch ? block.b + (v1 + band) * W : tile.b;
                    if (p) {
                        tile.a2 = p + panel * s_.latent * kPanel + inside;
                        tile.a2_row = 1, tile.a2_k = kPanel;
                    }
                    const int tail = static_cast<int>(least(v1 * W, wide) - (v1 - 1) * W);
                    tile_of<S>(static_cast<int>(rows), static_cast<int>(v1 - v0), tail != W)(tile, tail);
                }
            }
        }
        if (thin) thin_maps(block, weight, p, channels, wide, thin, space);
    }

    // The last few pixels, which would leave most lanes of a vector empty: rows of channels_last.
    void thin_maps(const Block<T>& s, const T* weight, const T* p, int64_t channels, int64_t first,
                   int64_t count, T* space) const {
        Pieces<T> pieces(space);
        const int64_t k = s.k, l = s.k2;
        T* x = pieces.take(Thin<S>::kPixels * k);
        T* tail = pieces.take(Thin<S>::kPixels * l);
        T* skip = pieces.take(Thin<S>::kPixels * channels);
        T* out = pieces.take(Thin<S>::kPixels * channels);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t r = 0; r < count; ++r) x[r * k + i] = s.b[i * s.b_k + first + r];
        PanelBlock<T> block;
        block.a = x, block.a_row = k, block.k = k;
        block.b = weight, block.b_panel = k * kPanel;
        block.scale = s.scale, block.bias = s.bias;
        if (l) {
            for (int64_t j = 0; j < l; ++j)
                for (int64_t r = 0; r < count; ++r) tail[r * l + j] = s.b2[j * s.b2_k + first + r];
            block.a2 = tail, block.a2_row = l, block.b2 = p, block.b2_panel = l * kPanel, block.k2 = l;
        }
        if (s.residual) {
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t r = 0; r < count; ++r)
                    skip[r * channels + c] = s.residual[c * s.residual_row + first + r];
            block.residual = skip, block.residual_row = channels;
        }
        block.c = out, block.c_row = channels;
        block.activation = s.activation;
        Ahead<T> ahead;
        multiply_panels<S>(block, count, channels, {}, ahead);
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t r = 0; r < count; ++r) s.c[c * s.c_row + first + r] = out[r * channels + c];
    }

    const PointwiseParams<T>& s_;
    const PackedParts parts_;
    const PointwisePlan plan_;
    const T *weight_, *p_, *q_;
    const bool channels_last_;
};

template <class S>
constexpr TileSizes tile_sizes() {
    return {S::kLanes, PanelShape<S>::rows(2), 2 * S::kLanes, Shape<S>::kRows, Shape<S>::kLanes};
}

template <class S>
static void pointwise_packed(const PointwiseParams<typename S::Scalar>& s, const Runtime& runtime) {
    const PointwisePlan plan =
        pointwise_plan(s.in_channels, s.out_channels, s.latent, s.pixels, s.batch,
                       s.channels_last && s.pixels > 1, runtime.threads, tile_sizes<S>());
    PackedProduct<S>(s, plan).run(runtime);
}

}  // namespace dcd::DCD_ISA
