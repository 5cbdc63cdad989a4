// SPDX-License-Identifier: BSD-3-Clause
// A convolution that reads the network's input, of few channels and in any layout: the lines that a row of
// the output needs are copied side by side, with their padding, so that every tap is an offset.
#pragma once

#include "frame.h"

namespace dcd::DCD_ISA::net {

template <class S>
class Stem {
  public:
    using T = Stored<S>;
    using W = Weight<S>;

    Stem(const Frame<T>& frame, const NetworkStep& s, int64_t sample)
        : step_(s), x_(frame.call.inputs[s.tensor]), size_(frame.call.places[s.output]) {
        image_ = static_cast<const T*>(x_.data) + (frame.first + sample) * x_.sample;
        line_ = x_.width + 2 * s.padding_w;
        int64_t tap_count = 0;
        // neighbouring columns of a line are read like the channels of a pixel
        const bool runs = s.dilation_w == 1;
        for (int64_t line = 0; line < s.in_channels * s.kernel_h; ++line)
            for (int64_t x = 0; x < (runs ? 1 : s.kernel_w); ++x)
                taps_[tap_count++] = line * line_ + x * s.dilation_w;
        product_.taps = taps_, product_.tap_count = tap_count;
        product_.channels = runs ? s.kernel_w : 1, product_.pixel = s.stride_w;
        product_.weight = frame.weight(s.weight);
        product_.weight_plane = tap_count * depth_of(product_.channels, kIsNarrow<W>) * kBlock;
        product_.bias = frame.constant(s.bias), product_.activation = static_cast<int>(s.activation);
    }

    Stem(const Stem&) = delete;
    Stem& operator=(const Stem&) = delete;

    // Elements that rows() needs; the last of them are read, and not used, by the last tile.
    int64_t scratch_size() const { return step_.in_channels * step_.kernel_h * line_; }

    void rows(int64_t plane, int64_t planes, int64_t y0, int64_t y1, const Image<T>& to, T* lines) const {
        Product<W> product = product_;
        product.output_plane = to.plane;
        for (int64_t y = y0; y < y1; ++y) {
            copy_lines(y, lines);
            product_rows<S>(product, plane, planes, {lines, nullptr, nullptr, to.data + y * to.row}, {},
                            size_.width, 0, 1);
        }
    }

  private:
    void copy_lines(int64_t y, T* lines) const {
        const int64_t pad = step_.padding_w;
        for (int64_t c = 0; c < step_.in_channels; ++c)
            for (int64_t k = 0; k < step_.kernel_h; ++k, lines += line_) {
                const int64_t row = y * step_.stride_h - step_.padding_h + k * step_.dilation_h;
                if (row < 0 || row >= x_.height) {
                    Frame<T>::fill(lines, line_);
                    continue;
                }
                const T* from = image_ + c * x_.channel + row * x_.row;
                Frame<T>::fill(lines, pad);
                if (x_.column == 1)
                    std::memcpy(lines + pad, from, static_cast<size_t>(x_.width) * sizeof(T));
                else
                    for (int64_t x = 0; x < x_.width; ++x) lines[pad + x] = from[x * x_.column];
                Frame<T>::fill(lines + pad + x_.width, pad);
            }
    }

    const NetworkStep& step_;
    const NetworkTensor& x_;
    const NetworkPlace& size_;
    const T* image_;
    int64_t line_;
    int64_t taps_[kMaxStemTaps];
    Product<W> product_;
};

template <class S>
static void stem(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    using T = Stored<S>;
    const Stem<S> work(frame, s, sample);
    const Image<T> to = frame.image(s.output, sample);
    const int64_t planes = planes_of(s.out_channels), at_once = TileLimits<S>::kPlanes;
    const int64_t parts = smaller(to.height, frame.runtime.threads);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, parts, [&](int64_t part) {
        T* lines = static_cast<T*>(scratch(work.scratch_size() * static_cast<int64_t>(sizeof(T))));
        for (int64_t plane = 0; plane < planes; plane += at_once) {
            Image<T> image = to;
            image.data += plane * to.plane;
            work.rows(plane, smaller(at_once, planes - plane), part * to.height / parts,
                      (part + 1) * to.height / parts, image, lines);
        }
    });
}

}  // namespace dcd::DCD_ISA::net
