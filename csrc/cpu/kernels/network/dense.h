// SPDX-License-Identifier: BSD-3-Clause
// y = act(lam (W * x + static_bias) + P Phi (Q^T x + latent_bias) + bias + skip) for one sample, by the
// cheaper of two orders: factored, with the latent of all pixels formed first, or synthesised, where each
// pair of planes of W_n = diag(lam) W + Q Phi^T P^T is formed in the first-level cache and then multiplied
// with all pixels. Where P Phi Q^T is block-diagonal (paper, Eq. 7), each block has planes of latent channels
// of its own, and only those of the blocks that some planes belong to are multiplied with them. Joint fusion
// (Eq. 9) is a convolution of the latent, whose filters are sums of R Phi.
#pragma once

#include "synthesis.h"

namespace dcd::DCD_ISA::net {

// One dense step on one sample. Made once; then any planes of any rows, from any thread.
template <class S>
class Dense {
  public:
    using T = Stored<S>;
    using W = Weight<S>;

    Dense(const Frame<T>& frame, const NetworkStep& s, int64_t sample)
        : step_(s), x_(frame.image(s.input, sample)), size_(frame.call.places[s.output]) {
        const float* coefficients = frame.vector(s.coefficients, sample);
        const float* phi =
            coefficients ? coefficients + (s.lam_channels ? planes_of(s.out_channels) * kBlock : 0) : nullptr;
        int64_t tap_count = 0;
        for (int64_t y = 0; y < s.kernel_h; ++y)
            for (int64_t x = 0; x < s.kernel_w; ++x)
                taps_[tap_count++] =
                    (y * s.dilation_h - s.padding_h) * x_.row + (x * s.dilation_w - s.padding_w) * kBlock;
        const int64_t points = s.winograd ? kPoints : tap_count;
        const int64_t weight_plane = points * depth_of(s.in_channels, kIsNarrow<W>) * kBlock;
        product_.weight = frame.weight(s.weight), product_.weight_plane = weight_plane;
        product_.taps = taps_, product_.tap_count = tap_count;
        product_.channels = s.in_channels, product_.input_plane = x_.plane;
        product_.pixel = s.stride_w * kBlock;
        product_.static_bias = frame.constant(s.static_bias), product_.bias = frame.constant(s.bias);
        product_.lam = s.lam_channels ? coefficients : nullptr;
        product_.activation = static_cast<int>(s.activation);
        if (!s.latent) return;
        synthesised_ = synthesis_pays(s, size_.height * size_.width, kIsNarrow<W>);
        const int64_t p_plane = depth_of(latent_width(s), kIsNarrow<W>) * kBlock;
        if (synthesised_) {
            synthesis_ = {frame.weight(s.q),
                          product_.weight,
                          frame.weight(s.p),
                          s.in_channels,
                          s.latent,
                          product_.lam,
                          phi,
                          s.out_channels,
                          s.blocks,
                          p_plane};
            latent_bias_ = frame.constant(s.latent_bias);
        } else {
            product_.p = frame.weight(s.p), product_.p_plane = p_plane;
            product_.latent_plane = size_.height * size_.width * kBlock;
            latent_ = s.latent_kernel ? project_jointly(frame, phi) : project(frame, phi);
        }
    }

    Dense(const Dense&) = delete;
    Dense& operator=(const Dense&) = delete;

    // For planes [plane, plane + planes), where nothing is synthesised: with those latents of all, and those
    // columns of P, that are of their blocks.
    Product<W> product(int64_t plane, int64_t planes) const {
        Product<W> product = product_;
        if (latent_) {
            const Blocks blocks(plane, planes, step_.out_channels, step_.blocks);
            const int64_t wide = planes_of(step_.latent) * kBlock;
            product.p += depth_of(blocks.first * wide, kIsNarrow<W>) * kBlock;
            product.latent = (blocks.last - blocks.first) * wide + step_.latent;
        }
        return product;
    }
    bool of_one_block(int64_t plane, int64_t planes) const {
        if (!latent_) return true;
        const Blocks blocks(plane, planes, step_.out_channels, step_.blocks);
        return blocks.first == blocks.last;
    }
    // [planes L, pixels, 16], beginning with the first latent of product().
    const T* latent(int64_t plane, int64_t planes) const {
        if (!latent_) return nullptr;
        const Blocks blocks(plane, planes, step_.out_channels, step_.blocks);
        return latent_ + blocks.first * planes_of(step_.latent) * product_.latent_plane;
    }

    // Numbers of fp32 that a task needs room for to work on a few planes.
    static int64_t scratch_size(const NetworkStep& s, int64_t planes) {
        return s.latent ? Synthesis<W>::scratch_size(s.latent, s.in_channels, planes) : 0;
    }

    // The product for these planes, whose weights, if they are synthesised, lie in `memory` from now on.
    Product<W> open(int64_t plane, int64_t planes, float* memory) const {
        Product<W> product = this->product(plane, planes);
        if (!synthesised_) return product;
        const int64_t depth = synthesis_.depth();
        float* fused = memory;
        W* weight = reinterpret_cast<W*>(fused + planes * step_.latent * kBlock);
        float* bias = fused + planes * (step_.latent + depth) * kBlock;
        synthesise<S>(synthesis_, plane, planes, fused, weight);
        // every operand is addressed by its plane
        const auto from_zero = [plane](auto* p, int64_t size) { return p - plane * size; };
        const float* constant = product_.bias;
        if (latent_bias_) {
            const int64_t none = 0;
            Product<float> shift;
            shift.taps = &none, shift.tap_count = 1, shift.channels = step_.latent;
            shift.weight = fused, shift.weight_plane = step_.latent * kBlock;
            shift.input_plane = kBlock, shift.output_plane = kBlock, shift.skip_plane = kBlock;
            shift.bias = constant ? constant + plane * kBlock : nullptr;
            product_rows<S, Types<float, float, float>>(shift, 0, planes,
                                                        {latent_bias_, nullptr, nullptr, bias}, {}, 1, 0, 1);
            product.bias = from_zero(bias, kBlock);
        }
        if (product_.static_bias) {  // not scaled by anything behind the synthesis
            for (int64_t i = 0; i < planes * kBlock; ++i) {
                const int64_t o = plane * kBlock + i;
                const float scaled = product_.static_bias[o] * (product_.lam ? product_.lam[o] : 1.0f);
                bias[i] = scaled + (latent_bias_ ? bias[i] : constant ? constant[o] : 0.0f);
            }
            product.bias = from_zero(bias, kBlock);
        }
        product.weight = from_zero(weight, depth * kBlock);
        product.weight_plane = depth * kBlock, product.near = true;
        product.lam = product.static_bias = nullptr;
        return product;
    }

    // Rows [y0, y1) of these planes into `to`, whose row 0 and first plane it is; `means` gets their sums.
    void rows(Product<W>& product, int64_t plane, int64_t planes, int64_t y0, int64_t y1, const Image<T>& to,
              const T* skip, int64_t skip_plane, int64_t skip_row, Means* means = nullptr) const {
        product.output_plane = to.plane, product.skip_plane = skip_plane;
        const int64_t width = size_.width;
        const T* latent = this->latent(plane, planes);
        if (product.tap_count == 1 && step_.stride_h == 1 && step_.stride_w == 1 && x_.is_dense() &&
            to.is_dense() && x_.width == width && (!skip || skip_row == width * kBlock)) {
            // one long row
            const int64_t begin = y0 * width, pixels = (y1 - y0) * width;
            product_rows<S>(product, plane, planes,
                            {x_.data + begin * kBlock, latent ? latent + begin * kBlock : nullptr,
                             skip ? skip + begin * kBlock : nullptr, to.data + begin * kBlock},
                            {}, pixels, 0, 1, means);
            return;
        }
        product_rows<S>(product, plane, planes, {x_.data, latent, skip, to.data},
                        {step_.stride_h * x_.row, width * kBlock, skip_row, to.row}, width, y0, y1, means);
    }

  private:
    // Phi (Q^T x + latent_bias) of all output pixels, [blocks, planes L, pixels, 16]
    const T* project(const Frame<T>& frame, const float* phi) const {
        const NetworkStep& s = step_;
        const int64_t planes = planes_of(s.latent), pixels = size_.height * size_.width;
        float* latent = frame.work;
        T* mixed = reinterpret_cast<T*>(latent + s.blocks * planes * pixels * kBlock);
        const int64_t centre = ((s.kernel_h / 2) * s.dilation_h - s.padding_h) * x_.row +
                               ((s.kernel_w / 2) * s.dilation_w - s.padding_w) * kBlock;
        Product<W> first;
        first.taps = &centre, first.tap_count = 1;
        first.weight_plane = depth_of(s.in_channels, kIsNarrow<W>) * kBlock;
        first.input_plane = x_.plane, first.pixel = s.stride_w * kBlock;
        first.bias = frame.constant(s.latent_bias), first.output_plane = pixels * kBlock;
        const int64_t none = 0;
        Product<float> second;
        second.taps = &none, second.tap_count = 1, second.channels = s.latent;
        second.weight = phi, second.weight_plane = s.latent * kBlock;
        second.input_plane = second.output_plane = pixels * kBlock;
        const bool flat = centre == 0 && s.stride_h == 1 && s.stride_w == 1 && x_.is_dense();
        const int64_t height = flat ? 1 : size_.height, width = flat ? pixels : size_.width;
        const Rows rows{s.stride_h * x_.row, 0, 0, width * kBlock};
        each_latent_plane([&](int64_t block, int64_t plane, int64_t count) {
            // the planes of x that the block's channels are in
            const int64_t channels = s.in_channels / s.blocks, begin = block * channels / kBlock;
            first.channels = (block + 1) * channels - begin * kBlock;
            first.weight = frame.weight(s.q) + depth_of(begin * kBlock, kIsNarrow<W>) * kBlock;
            product_rows<S, Types<T, W, float>>(
                first, plane, count,
                {x_.data + begin * x_.plane, nullptr, nullptr, latent + plane * pixels * kBlock}, rows, width,
                0, height);
        });
        each_latent_plane([&](int64_t block, int64_t plane, int64_t count) {
            product_rows<S, Types<float, float, T>>(second, plane, count,
                                                    {latent + block * planes * pixels * kBlock, nullptr,
                                                     nullptr, mixed + plane * pixels * kBlock},
                                                    {}, pixels, 0, 1);
        });
        return mixed;
    }

    // [planes L, pixels, 16]: the sum over taps of M_tap (Q^T x) at the tap, M_tap = sum over c of R[tap, c]
    // Phi_c. R first would take fewer multiply-adds, but L_k images in between. In bf16, Q^T x and M_tap are
    // rounded, and multiplied like an image and weights.
    const T* project_jointly(const Frame<T>& frame, const float* phi) const {
        const NetworkStep& s = step_;
        const int64_t planes = planes_of(s.latent), tap_count = product_.tap_count,
                      filter = depth_of(s.latent, kIsNarrow<W>) * kBlock;
        W* filters = reinterpret_cast<W*>(frame.work);
        sum_filters(frame.constant(s.r), phi, filters);
        Image<T> latent;
        latent.height = x_.height, latent.width = x_.width;
        latent.row = (x_.width + 2 * s.padding_w) * kBlock;
        latent.plane = (x_.height + 2 * s.padding_h) * latent.row;
        T* memory = reinterpret_cast<T*>(filters + planes * tap_count * filter);
        T* mixed = memory + planes * latent.plane;
        latent.data = memory + s.padding_h * latent.row + s.padding_w * kBlock;
        Frame<T>::clear_halo(latent, planes, s.padding_h, s.padding_w);
        const int64_t none = 0;
        int64_t around[kMaxTaps];
        for (int64_t y = 0; y < s.kernel_h; ++y)
            for (int64_t x = 0; x < s.kernel_w; ++x)
                around[y * s.kernel_w + x] =
                    (y * s.dilation_h - s.padding_h) * latent.row + (x * s.dilation_w - s.padding_w) * kBlock;
        Product<W> first;
        first.taps = &none, first.tap_count = 1, first.channels = s.in_channels;
        first.weight = frame.weight(s.q);
        first.weight_plane = depth_of(s.in_channels, kIsNarrow<W>) * kBlock;
        first.input_plane = x_.plane, first.output_plane = latent.plane;
        Product<W> second;
        second.taps = around, second.tap_count = tap_count, second.channels = s.latent;
        second.weight = filters, second.weight_plane = tap_count * filter;
        second.input_plane = latent.plane, second.pixel = s.stride_w * kBlock;
        second.output_plane = size_.height * size_.width * kBlock;
        each_latent_plane([&](int64_t, int64_t plane, int64_t count) {
            product_rows<S>(first, plane, count,
                            {x_.data, nullptr, nullptr, latent.data + plane * latent.plane},
                            {x_.row, 0, 0, latent.row}, x_.width, 0, x_.height);
        });
        each_latent_plane([&](int64_t, int64_t plane, int64_t count) {
            product_rows<S>(
                second, plane, count, {latent.data, nullptr, nullptr, mixed + plane * second.output_plane},
                {s.stride_h * latent.row, 0, 0, size_.width * kBlock}, size_.width, 0, size_.height);
        });
        return mixed;
    }

    // M_tap of each tap, [planes L (row), taps, L (column), 16 (row)], or pairs of columns; r [taps, L_k] and
    // phi [planes L (row), L_k, L (column), 16 (row)].
    void sum_filters(const float* r, const float* phi, W* to) const {
        const int64_t latent = step_.latent, matrices = step_.latent_kernel;
        for (int64_t plane = 0; plane < planes_of(latent); ++plane, phi += matrices * latent * kBlock)
            for (int64_t tap = 0; tap < product_.tap_count; ++tap)
                for (int64_t l = 0; l < latent; l += kIsNarrow<W> ? 2 : 1)
                    for (int64_t v = 0; v < kBlock; v += S::kLanes, to += S::kLanes) {
                        const auto sum = [&](int64_t column) {
                            auto total = S::zero();
                            for (int64_t c = 0; c < matrices; ++c)
                                total = S::fma(S::set1(r[tap * matrices + c]),
                                               S::load(phi + (c * latent + column) * kBlock + v), total);
                            return total;
                        };
                        if constexpr (kIsNarrow<W>)
                            S::store_pairs(to, sum(l), l + 1 < latent ? sum(l + 1) : S::zero());
                        else
                            S::store(to, sum(l));
                    }
    }

    // f(block, plane, planes) for the planes of the latent, as many at once as a tile takes of one block.
    template <class F>
    void each_latent_plane(const F& f) const {
        const int64_t planes = planes_of(step_.latent);
        for (int64_t block = 0; block < step_.blocks; ++block)
            for (int64_t plane = 0; plane < planes; plane += TileLimits<S>::kPlanes)
                f(block, block * planes + plane, smaller(TileLimits<S>::kPlanes, planes - plane));
    }

    const NetworkStep& step_;
    const Image<T> x_;
    const NetworkPlace& size_;
    int64_t taps_[kMaxTaps];
    Product<W> product_;
    bool synthesised_ = false;
    Synthesis<W> synthesis_{};
    const float* latent_bias_ = nullptr;
    const T* latent_ = nullptr;
};

// The weights of the branch behind a step, and the first ones of the branch's layer. A branch does nothing
// but read them, so that it waits for whatever is not near yet; this step computes, and fetches them
// meanwhile.
template <class W>
struct Coming {
    const W *begin = nullptr, *end = nullptr;

    template <class T>
    Coming(const Frame<T>& frame, const NetworkStep& s) {
        const NetworkProgram& program = frame.call.program;
        const NetworkStep& branch = *(&s + 1);
        if (&branch == program.steps + program.step_count || branch.kind != kBranch) return;
        // of the first weights behind the branch's, about what the layer's first tile reads
        constexpr int64_t kBehind = 96 * 1024 / sizeof(W);
        begin = frame.weight(branch.squeeze);
        end = frame.weight(branch.expand) +
              planes_of(branch.out_channels) * depth_of(branch.hidden, kIsNarrow<W>) * kBlock + kBehind;
    }
    // A task's part of them.
    void share(Product<W>& product, int64_t task, int64_t tasks) const {
        const int64_t lines = (end - begin) / kBlock;
        product.coming = begin + task * lines / tasks * kBlock;
        product.coming_end = begin + (task + 1) * lines / tasks * kBlock;
    }
};

// How a step's work is shared out: as many parts of its planes as there are threads, and where there are
// too few planes for that, parts of its rows.
struct Shares {
    int64_t planes, parts;  // planes of a task, parts of the rows
    Shares(int64_t all_planes, int64_t at_once, int64_t rows, int64_t threads) : planes(at_once) {
        const int64_t groups = (all_planes + at_once - 1) / at_once;
        parts = threads <= 1 || groups >= 2 * threads ? 1 : smaller(rows, threads);
    }
};

// True: the means of the output, if it has any, came with it.
template <class S>
static bool dense(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    using T = Stored<S>;
    const Dense<S> work(frame, s, sample);
    const Image<T> to = frame.image(s.output, sample);
    const Image<T> skip = s.skip < 0 ? Image<T>{} : frame.image(s.skip, sample);
    const int64_t planes = planes_of(s.out_channels);
    const Shares shares(planes, TileLimits<S>::kPlanes, to.height, frame.runtime.threads);
    const int64_t groups = (planes + shares.planes - 1) / shares.planes;
    const Coming<Weight<S>> coming(frame, s);
    const bool pools = s.bins == 1 && shares.parts == 1;
    float* pooled = pools ? frame.vector(s.pooled, sample) : nullptr;
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, groups * shares.parts, [&](int64_t task) {
        const int64_t plane = task / shares.parts * shares.planes, part = task % shares.parts;
        const int64_t count = smaller(shares.planes, planes - plane);
        float* memory = static_cast<float*>(
            scratch(Dense<S>::scratch_size(s, count) * static_cast<int64_t>(sizeof(float))));
        Product<Weight<S>> product = work.open(plane, count, memory);
        Image<T> image = to;
        image.data += plane * to.plane;
        coming.share(product, task, groups * shares.parts);
        Means means(pooled, plane, count);
        work.rows(product, plane, count, part * to.height / shares.parts,
                  (part + 1) * to.height / shares.parts, image,
                  skip.data ? skip.data + plane * skip.plane : nullptr, skip.plane, skip.row, &means);
        means.divide(to.height * to.width);
    });
    return pools;
}

}  // namespace dcd::DCD_ISA::net
