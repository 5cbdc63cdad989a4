// SPDX-License-Identifier: BSD-3-Clause
// One run of a network over some of its samples: where each value lies. T is what images consist of.
#pragma once

#include "../../../network.h"
#include "../threads.h"
#include "tile.h"

namespace dcd::DCD_ISA::net {

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// One sample of a value; data is the first pixel inside the halo.
template <class T>
struct Image {
    T* data = nullptr;
    int64_t plane = 0, row = 0, height = 1, width = 1;
    bool is_dense() const { return row == width * kBlock; }
};

template <class T>
class Frame {
  public:
    const NetworkCall& call;
    const Runtime runtime;  // for what is inside a step
    const int64_t first;    // sample of the call
    char* const memory;
    float* const work;  // what a step needs besides its values, and shares with its tasks

    Frame(const NetworkCall& call, const Runtime& runtime, int64_t first)
        : call(call),
          runtime(runtime),
          first(first),
          memory(static_cast<char*>(scratch(call.memory + call.work, Scratch::kNetwork))),
          work(reinterpret_cast<float*>(memory + call.memory)) {}

    const float* constant(int64_t offset) const { return offset < 0 ? nullptr : call.constants + offset; }
    // Weights that are summed over channels.
    const Packed<T>* weight(int64_t offset) const {
        return reinterpret_cast<const Packed<T>*>(constant(offset));
    }

    Image<T> image(int64_t v, int64_t sample) const { return place_of<T>(v, sample); }

    // A vector of `sample`
    float* vector(int64_t v, int64_t sample) const {
        return v < 0 ? nullptr : place_of<float>(v, sample).data;
    }
    int64_t vector_stride(int64_t v) const {
        return call.program.values[v].shared ? 0 : call.places[v].sample;
    }

    // f(value) for a value that may be an image or a vector
    template <class F>
    void with_value(int64_t v, int64_t sample, const F& f) const {
        if (kIsNarrow<T> && call.program.values[v].vector)
            f(place_of<float>(v, sample));
        else
            f(place_of<T>(v, sample));
    }

    template <class X>
    Image<X> place_of(int64_t v, int64_t sample) const {
        const NetworkValue& value = call.program.values[v];
        const NetworkPlace& place = call.places[v];
        Image<X> image;
        image.height = place.height, image.width = place.width;
        image.row = (image.width + 2 * value.halo_w) * kBlock;
        image.plane = (image.height + 2 * value.halo_h) * image.row;
        image.data = reinterpret_cast<X*>(memory + place.begin) + (value.shared ? 0 : sample) * place.sample +
                     value.halo_h * image.row + value.halo_w * kBlock;
        return image;
    }

    // Zeros around an image whose readers look beyond it.
    void clear_halo(int64_t v, int64_t sample) const {
        const NetworkValue& value = call.program.values[v];
        clear_halo(image(v, sample), planes_of(value.channels), value.halo_h, value.halo_w);
    }
    static void clear_halo(const Image<T>& image, int64_t planes, int64_t halo_h, int64_t halo_w) {
        if (!halo_h && !halo_w) return;
        const int64_t side = halo_w * kBlock;
        for (int64_t c = 0; c < planes; ++c) {
            T* plane = image.data + c * image.plane - halo_h * image.row - side;
            fill(plane, halo_h * image.row + side);
            for (int64_t y = 0; y + 1 < image.height; ++y)
                fill(plane + (halo_h + y + 1) * image.row - side, 2 * side);
            fill(plane + (halo_h + image.height) * image.row - side, halo_h * image.row + side);
        }
    }

    static void fill(T* p, int64_t count) {
        for (int64_t i = 0; i < count; ++i) p[i] = T{};
    }
};

}  // namespace dcd::DCD_ISA::net
