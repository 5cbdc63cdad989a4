// SPDX-License-Identifier: BSD-3-Clause
// y = act(W_n x + bias + residual), W_n = diag(lam_n) W0 + P Phi_n Q^T, with operands that are packed for an
// engine (widened.h, dot_products.h, amx.h): maps and weights of a tile are packed while they are in cache,
// never as a whole. Two orders of the product, as in lowrank.h:
//   synthesised  a piece of W_n is formed in fp32, rounded, and multiplied with every pixel;
//   factored     T = Q^T x once a block of pixels, then y = lam * (W0 x) + (P Phi_n) T.
// Either operand may be the rows: channels x pixels, or pixels x channels, whatever the layout of the maps.
#pragma once

#include "mixed_finish.h"

namespace dcd::DCD_ISA {

// Memory for arrays of several types, each on a cache line of its own. Without a base it counts.
class Places {
  public:
    explicit Places(char* base = nullptr) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        char* const place = base_ ? base_ + end_ : nullptr;
        end_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(place);
    }
    int64_t bytes() const { return end_ + 64; }

  private:
    char* base_;
    int64_t end_ = 0;
};

template <class E>
class MixedLayer {
  public:
    using S = typename E::S;
    using T = typename E::T;
    using Operand = typename E::Operand;

    explicit MixedLayer(const MixedParams<T>& s)
        : s_(s),
          plan_(mixed_plan(E::kProducts, E::kSplit, s.in_channels, s.out_channels, s.latent, s.blocks,
                           s.pixels, s.channels_last)),
          transposed_(plan_.channel_rows == s.channels_last),
          all_(s.latent * s.blocks),
          direct_(E::direct(s.in_channels)) {
        Places counted;
        place_shared(counted);
        Places places(static_cast<char*>(scratch(counted.bytes(), Scratch::kShared)));
        place_shared(places);
        prepare();
    }

    int64_t scratch_bytes() const {
        Task counted;
        Places places;
        place_task(places, counted);
        return places.bytes();
    }

    // Channels [c0, c1) of sample n; c0 a multiple of kLanes.
    void run(int64_t n, int64_t c0, int64_t c1, char* memory) const {
        Task task;
        Places places(memory);
        place_task(places, task);
        task.n = n, task.c0 = c0, task.c1 = c1;
        task.lam = s_.lam ? s_.lam + n * s_.out_channels : nullptr;
        task.bias = s_.bias ? s_.bias + n * s_.bias_sample : nullptr;
        if (s_.latent) fuse(task);
        if (plan_.synthesised)
            run_synthesised(task);
        else
            run_factored(task);
    }

    static constexpr int64_t kLanes = 16;  // steps in which lanes are shared out

  private:
    static int64_t rounded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

    // One sample's share of the work, and its memory.
    struct Task {
        int64_t n = 0, c0 = 0, c1 = 0;
        const float *lam = nullptr, *bias = nullptr;
        float* fused;  // [c1 - c0, fused_row()]: P Phi
        Operand *fused_rows, *fused_lanes;
        float* piece;  // [kSynthesis, Ci]: rows of W_n
        Operand *weight_rows, *weight_lanes;
        Operand *x_rows, *x_lanes;
        float* latent;  // [B L, pixels] or [pixels, B L]
        Operand* latent_operand;
        float *sums, *second, *turned, *turned_second;
        Operand* lone;  // one pixel as a row of each product
        typename E::Unit unit;
    };

    static constexpr int64_t kSynthesis = 16;  // rows of W_n formed at a time: they stay in L1
    static constexpr int64_t kMostLanes = 384;

    int64_t operand_bytes(int64_t k) const { return E::row(k) * static_cast<int64_t>(sizeof(Operand)); }
    // Pixels that are packed at a time: with a piece of the weights they stay in L2.
    int64_t most_pixels() const {
        constexpr int64_t kBytes = 192 * 1024, kMost = E::kFinishes ? 768 : 192;
        const int64_t fit = kBytes / operand_bytes(s_.in_channels) / kLanes * kLanes;
        return least(least(kMost, rounded(s_.pixels)), most<int64_t>(fit, 2 * kLanes));
    }
    // Channels of the weights that are formed at a time, when they are.
    int64_t most_channels() const {
        constexpr int64_t kBytes = 256 * 1024;
        const int64_t fit = kBytes / operand_bytes(s_.in_channels) / kLanes * kLanes;
        return least(least(kMostLanes, rounded(s_.out_channels)), most<int64_t>(fit, 2 * kLanes));
    }
    // Rows that are multiplied before they are finished; turned, they are written as rows of lanes.
    int64_t finish_rows() const { return transposed_ ? most(E::kBand, 4 * kLanes) : E::kBand; }
    int64_t sums_row() const { return rounded(plan_.channel_rows ? most_pixels() : kMostLanes) + kLanes; }
    int64_t turned_row() const { return rounded(finish_rows()) + kLanes; }
    int64_t fused_row() const { return plan_.synthesised ? s_.latent : all_; }

    // --- memory --------------------------------------------------------------------------------------------

    void place_shared(Places& places) {
        const int64_t k = s_.in_channels;
        if (s_.latent) {
            p_ = places.take<float>(s_.out_channels * s_.latent);
            q_ = places.take<float>(k * s_.latent);
            q_t_ = places.take<float>(all_ * k);
            if (!plan_.synthesised) {
                q_rows_ = places.take<Operand>(rounded(all_) * E::row(k));
                if (!plan_.channel_rows) q_lanes_ = places.take<Operand>(E::lanes_size(k, all_));
            }
        }
        if (!plan_.synthesised) {
            if (!direct_) weight_rows_ = places.take<Operand>(s_.out_channels * E::row(k));
            if (!plan_.channel_rows) weight_lanes_ = places.take<Operand>(E::lanes_size(k, s_.out_channels));
        }
    }

    void place_task(Places& places, Task& task) const {
        const int64_t k = s_.in_channels, co = s_.out_channels, pixels = most_pixels();
        task.fused = places.take<float>(co * fused_row());
        if (plan_.synthesised) {
            task.piece = places.take<float>(kSynthesis * k);
            task.weight_rows = places.take<Operand>(most_channels() * E::row(k));
            task.weight_lanes =
                places.take<Operand>(plan_.channel_rows ? 0 : E::lanes_size(k, most_channels()));
        } else if (s_.latent) {
            task.fused_rows = places.take<Operand>(rounded(co) * E::row(all_));
            task.fused_lanes = places.take<Operand>(plan_.channel_rows ? 0 : E::lanes_size(all_, co));
            const int64_t row = rounded(plan_.channel_rows ? pixels : all_) + kLanes;
            task.latent = places.take<float>((plan_.channel_rows ? all_ : pixels) * row);
            task.latent_operand = places.take<Operand>(plan_.channel_rows ? E::lanes_size(all_, pixels)
                                                                          : pixels * E::row(all_));
        }
        task.x_rows = places.take<Operand>(rounded(pixels) * E::row(k));
        task.lone = places.take<Operand>(E::kFinishes ? E::row(k) + E::row(all_) : 0);
        task.x_lanes = places.take<Operand>(E::lanes_size(k, pixels));
        const int64_t sums = finish_rows() * sums_row();
        const int64_t turned = transposed_ ? sums_row() * turned_row() : 0;
        const bool two = !plan_.synthesised && s_.latent;
        task.sums = places.take<float>(sums);
        task.second = places.take<float>(two ? sums : 0);
        task.turned = places.take<float>(turned);
        task.turned_second = places.take<float>(two ? turned : 0);
    }

    // --- operands ------------------------------------------------------------------------------------------

    static void widen(const T* from, int64_t count, float* to) {
        using Load = Elements<S, T>;
        for (int64_t i = 0; i < count; i += S::kLanes)
            Load::store(to + i, Load::load(from + i, count - i), count - i);
    }

    // What all samples share.
    void prepare() {
        const int64_t k = s_.in_channels, l = s_.latent, inner = k / s_.blocks;
        widen(s_.p, s_.out_channels * l, p_);
        widen(s_.q, k * l, q_);
        if (l && plan_.synthesised) {
            transpose<S>(q_, l, k, l, q_t_, k);
        } else if (l) {
            // every block's latent has rows of its own, zero outside of the block's channels
            for (int64_t i = 0; s_.blocks > 1 && i < all_ * k; ++i) q_t_[i] = 0;
            for (int64_t b = 0; b < s_.blocks; ++b)
                transpose<S>(q_ + b * inner * l, l, inner, l, q_t_ + b * (l * k + inner), k);
            E::to_rows(q_t_, k, all_, k, q_rows_);
            if (!plan_.channel_rows) E::rows_to_lanes(q_rows_, E::row(k), all_, k, q_lanes_);
        }
        if (plan_.synthesised) return;
        if (!direct_) E::to_rows(s_.weight, k, s_.out_channels, k, weight_rows_);
        if (!plan_.channel_rows)
            E::rows_to_lanes(rows_of_weight(), row_of_weight(), s_.out_channels, k, weight_lanes_);
    }

    const Operand* rows_of_weight() const { return direct_ ? E::as_rows(s_.weight) : weight_rows_; }
    int64_t row_of_weight() const { return direct_ ? s_.in_channels : E::row(s_.in_channels); }

    // fused[o, j] = sum_a P[o, a] Phi[a, j] for the channels of the task
    void fuse(Task& task) const {
        const int64_t l = s_.latent, row = fused_row(), channels = task.c1 - task.c0;
        const float* phi = s_.phi + task.n * s_.blocks * l * l;
        if (!plan_.synthesised && s_.blocks > 1)
            for (int64_t i = 0; i < channels * row; ++i) task.fused[i] = 0;
        for_blocks(task.c0, task.c1, s_.out_channels / s_.blocks,
                   [&](int64_t b, int64_t first, int64_t last) {
                       Block<float> block;
                       block.a = p_ + first * l, block.a_row = l, block.a_k = 1;
                       block.b = phi + b * l * l, block.b_k = l, block.k = l;
                       block.c = task.fused + (first - task.c0) * row + (plan_.synthesised ? 0 : b * l);
                       block.c_row = row;
                       multiply<S>(block, last - first, l);
                   });
        if (plan_.synthesised) return;
        E::to_rows(task.fused, row, channels, all_, task.fused_rows);
        if (!plan_.channel_rows)
            E::rows_to_lanes(task.fused_rows, E::row(all_), channels, all_, task.fused_lanes);
    }

    // Rows [first, last) of W_n = diag(lam) W0 + fused Q^T as an operand.
    void synthesise(Task& task, int64_t first, int64_t last) const {
        const int64_t k = s_.in_channels, l = s_.latent;
        for (int64_t r0 = first; r0 < last; r0 += kSynthesis) {
            const int64_t r1 = least(r0 + kSynthesis, last);
            widen(s_.weight + r0 * k, (r1 - r0) * k, task.piece);
            for_blocks(r0, r1, s_.out_channels / s_.blocks, [&](int64_t b, int64_t top, int64_t bottom) {
                for_block_and_rest(b, k / s_.blocks, 0, k, [&](bool inside, int64_t left, int64_t right) {
                    Block<float> block;
                    block.c = task.piece + (top - r0) * k + left, block.c_row = k;
                    block.init = block.c, block.init_row = k;
                    block.scale = task.lam ? task.lam + top : nullptr;
                    if (inside) {
                        block.a2 = task.fused + (top - task.c0) * l, block.a2_row = l, block.a2_k = 1;
                        block.b2 = q_t_ + left, block.b2_k = k, block.k2 = l;
                    }
                    multiply<S>(block, bottom - top, right - left);
                });
            });
            E::to_rows(task.piece, k, r1 - r0, k, task.weight_rows + (r0 - first) * E::row(k));
        }
        if (!plan_.channel_rows)
            E::rows_to_lanes(task.weight_rows, E::row(k), last - first, k, task.weight_lanes);
    }

    struct Pixels {
        int64_t first, count;
        const Operand* rows;
        int64_t row;
    };

    // Packs pixels [first, first + count) of the sample as the operand that the plan wants.
    Pixels pack(Task& task, int64_t first, int64_t count) const {
        const int64_t k = s_.in_channels;
        const T* x = s_.input.data + task.n * s_.input.sample;
        Pixels pixels{first, count, task.x_rows, E::row(k)};
        if (s_.channels_last) {
            x += first * s_.input.pixel;
            if (direct_)
                pixels.rows = E::as_rows(x), pixels.row = s_.input.pixel;
            else
                E::to_rows(x, s_.input.pixel, count, k, task.x_rows);
            if (plan_.channel_rows) E::rows_to_lanes(pixels.rows, pixels.row, count, k, task.x_lanes);
        } else {
            E::to_lanes(x + first, s_.input.channel, k, count, task.x_lanes);
            if (!plan_.channel_rows) E::lanes_to_rows(task.x_lanes, count, k, task.x_rows);
        }
        return pixels;
    }

    // f(first, count) for equal shares of the pixels, in steps of kLanes
    template <class F>
    void for_pixels(const F& f) const {
        const int64_t steps = rounded(s_.pixels) / kLanes, fit = most_pixels() / kLanes;
        const int64_t parts = (steps + fit - 1) / fit;
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t first = i * steps / parts * kLanes;
            f(first, least((i + 1) * steps / parts * kLanes, s_.pixels) - first);
        }
    }

    // --- products ------------------------------------------------------------------------------------------

    void run_synthesised(Task& task) const {
        const int64_t width = most_channels();
        for (int64_t first = task.c0; first < task.c1; first += width) {
            const int64_t last = least(first + width, task.c1);
            synthesise(task, first, last);
            const Weights weights{
                first, last, task.weight_rows, E::row(s_.in_channels), task.weight_lanes, last - first, 0};
            for_pixels([&](int64_t p0, int64_t count) { emit(task, weights, pack(task, p0, count)); });
        }
    }

    void run_factored(Task& task) const {
        for_pixels([&](int64_t p0, int64_t count) {
            const Pixels pixels = pack(task, p0, count);
            if (s_.latent) project(task, pixels);
            const int64_t width = plan_.channel_rows ? task.c1 - task.c0 : kMostLanes;
            for (int64_t first = task.c0; first < task.c1; first += width) {
                const int64_t last = least(first + width, task.c1);
                emit(task,
                     {first, last, rows_of_weight() + first * row_of_weight(), row_of_weight(), weight_lanes_,
                      s_.out_channels, first},
                     pixels);
            }
        });
    }

    // The latent T = Q^T x of a block of pixels as an operand of the second product.
    void project(Task& task, const Pixels& x) const {
        const int64_t k = s_.in_channels, row = rounded(plan_.channel_rows ? x.count : all_) + kLanes;
        const int64_t rows = plan_.channel_rows ? all_ : x.count;
        for (int64_t r = 0; r < rows; r += E::kBand) {
            const int64_t band = least(E::kBand, rows - r);
            if (plan_.channel_rows)
                E::multiply(task.unit, q_rows_ + r * E::row(k), E::row(k), band, task.x_lanes, x.count, 0,
                            x.count, k, task.latent + r * row, row);
            else
                E::multiply(task.unit, x.rows + r * x.row, x.row, band, q_lanes_, all_, 0, all_, k,
                            task.latent + r * row, row);
        }
        if (plan_.channel_rows)
            E::to_lanes(task.latent, row, all_, x.count, task.latent_operand);
        else
            E::to_rows(task.latent, row, x.count, all_, task.latent_operand);
    }

    // Weights of channels [first, last): as rows, or as lanes behind `skipped` others of `all_lanes`.
    struct Weights {
        int64_t first, last;
        const Operand* rows;
        int64_t row;
        const Operand* lanes;
        int64_t all_lanes, skipped;
    };

    void emit(Task& task, const Weights& w, const Pixels& x) const {
        const int64_t channels = w.last - w.first;
        const int64_t rows = plan_.channel_rows ? channels : x.count;
        const int64_t lanes = plan_.channel_rows ? x.count : channels;
        const Product product = plan_.channel_rows
                                    ? Product{w.rows, w.row, task.x_lanes, x.count, 0, s_.in_channels}
                                    : Product{x.rows, x.row, w.lanes, w.all_lanes, w.skipped, s_.in_channels};
        Product second;
        if (!plan_.synthesised && s_.latent) {
            const int64_t skipped = w.first - task.c0, row = E::row(all_);
            second =
                plan_.channel_rows
                    ? Product{task.fused_rows + skipped * row, row, task.latent_operand, x.count, 0, all_}
                    : Product{task.latent_operand, row, task.fused_lanes, task.c1 - task.c0, skipped, all_};
        }
        if constexpr (E::kFinishes) {
            if (!transposed_) {
                const auto operands = [](const Product& p) {
                    return E::product_of(p.rows, p.row, p.lanes, p.first, p.k);
                };
                E::multiply_and_finish(operands(product), operands(second), target(task, w.first, x.first),
                                       rows, lanes, task.lone);
                return;
            }
        }
        const int64_t step = finish_rows(), parts = (rows + step - 1) / step;
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t r0 = i * rows / parts, r1 = (i + 1) * rows / parts;
            multiply_rows(task, product, r0, r1, lanes, task.sums);
            if (second.k) multiply_rows(task, second, r0, r1, lanes, task.second);
            Finish<T> f = plan_.channel_rows ? target(task, w.first + r0, x.first)
                                             : target(task, w.first, x.first + r0);
            write(task, f, r1 - r0, lanes, second.k > 0);
        }
    }

    struct Product {
        const Operand* rows = nullptr;
        int64_t row = 0;
        const Operand* lanes = nullptr;
        int64_t all_lanes = 0, first = 0, k = 0;
    };

    void multiply_rows(Task& task, const Product& p, int64_t r0, int64_t r1, int64_t lanes, float* c) const {
        for (int64_t r = r0; r < r1; r += E::kBand, c += E::kBand * sums_row())
            E::multiply(task.unit, p.rows + r * p.row, p.row, least(E::kBand, r1 - r), p.lanes, p.all_lanes,
                        p.first, lanes, p.k, c, sums_row());
    }

    // Where the map has this channel and pixel, and what is done to the sums there.
    Finish<T> target(const Task& task, int64_t channel, int64_t pixel) const {
        Finish<T> f;
        f.along_lanes = s_.channels_last;
        f.lam = task.lam && !plan_.synthesised ? task.lam + channel : nullptr;
        f.bias = task.bias ? task.bias + channel : nullptr;
        f.activation = s_.activation;
        const auto place = [&](const auto& map) {
            return map.data + task.n * map.sample + channel * map.channel + pixel * map.pixel;
        };
        f.to = place(s_.output);
        f.to_row = s_.channels_last ? s_.output.pixel : s_.output.channel;
        if (s_.residual.data) {
            f.residual = place(s_.residual);
            f.residual_row = s_.channels_last ? s_.residual.pixel : s_.residual.channel;
        }
        return f;
    }

    void write(Task& task, Finish<T> f, int64_t rows, int64_t lanes, bool two) const {
        f.sums = task.sums, f.second = two ? task.second : nullptr, f.row = sums_row();
        if (transposed_) {
            transpose<S>(task.sums, sums_row(), rows, lanes, task.turned, turned_row());
            if (two) transpose<S>(task.second, sums_row(), rows, lanes, task.turned_second, turned_row());
            f.sums = task.turned, f.second = two ? task.turned_second : nullptr, f.row = turned_row();
            const int64_t kept = rows;
            rows = lanes, lanes = kept;
        }
        finish<S>(f, rows, lanes);
    }

    const MixedParams<T>& s_;
    const MixedPlan plan_;
    const bool transposed_;  // the sums have rows where the maps have lanes
    const int64_t all_;      // latent channels of all blocks
    const bool direct_;
    float *p_ = nullptr, *q_ = nullptr;  // in fp32
    float* q_t_ = nullptr;               // [L, Ci]; factored: [B L, Ci]
    Operand *q_rows_ = nullptr, *q_lanes_ = nullptr;
    Operand *weight_rows_ = nullptr, *weight_lanes_ = nullptr;  // of W0
};

template <class E>
static void mixed_pointwise(const MixedParams<typename E::T>& s, const Runtime& runtime) {
    using Layer = MixedLayer<E>;
    const Layer layer(s);
    const int64_t bytes = layer.scratch_bytes();
    const int64_t steps = (s.out_channels + Layer::kLanes - 1) / Layer::kLanes;
    const int64_t parts = channel_parts(s.batch, runtime.threads, steps, 1);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t part = task % parts;
        const int64_t c0 = part * steps / parts * Layer::kLanes;
        const int64_t c1 = least((part + 1) * steps / parts * Layer::kLanes, s.out_channels);
        layer.run(task / parts, c0, c1, static_cast<char*>(scratch(bytes)));
    });
}

}  // namespace dcd::DCD_ISA
