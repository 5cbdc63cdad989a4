// SPDX-License-Identifier: BSD-3-Clause
// The bodies of the CUDA depthwise kernels on the CPU, block after block, thread after thread. Every access
// to global memory is checked byte by byte; shared memory starts as NaN and ends in a fence.
#include <stdexcept>
#include <string>
#include <vector>

#include "depthwise_run.h"

namespace dcd::cuda::dw {

bool last_thread_first = false;

namespace {

// marks: for every byte 0 (not of the tensor), 1 (of it) or 1 + the number of times it was written
struct Memory {
    const char* begin;
    int64_t bytes;
    uint8_t* marks;
    bool writable;
};
std::vector<Memory> memories;
int64_t wide_reads = 0;  // of 16 bytes

uint8_t* marks_of(const void* at, size_t bytes, bool write) {
    const char* from = static_cast<const char*>(at);
    const auto fail = [&](const std::string& why) -> uint8_t* {
        throw std::runtime_error((write ? "a write of " : "a read of ") + std::to_string(bytes) + " bytes " +
                                 why);
    };
    if (reinterpret_cast<uintptr_t>(from) % bytes) return fail("is not aligned");
    for (const Memory& m : memories) {
        if (from < m.begin || from >= m.begin + m.bytes) continue;
        if (write && !m.writable) return fail("changes an input");
        if (from + bytes > m.begin + m.bytes) return fail("passes the end of a tensor");
        uint8_t* marks = m.marks + (from - m.begin);
        for (size_t i = 0; i < bytes; ++i)
            if (!marks[i]) return fail("touches what is not of the tensor");
        return marks;
    }
    return fail("is outside of every tensor");
}

}  // namespace

void check_read(const void* from, size_t bytes) {
    marks_of(from, bytes, false);
    wide_reads += bytes == 16;
}

void check_write(const void* to, size_t bytes) {
    uint8_t* marks = marks_of(to, bytes, true);
    for (size_t i = 0; i < bytes; ++i) ++marks[i];
}

namespace {

// What the tests hand over.
struct Given {
    int64_t batch, channels, padding[2], latent, bias_sample, activation;
};
struct GivenImage {
    void* data;
    int64_t strides[4], sizes[4];
};

Image image_of(const GivenImage* g) {
    const auto step = [&](int d) { return g->sizes[d] > 1 ? g->strides[d] : 0; };
    return {g->data,
            step(0),
            static_cast<int>(step(1)),
            static_cast<int>(step(2)),
            static_cast<int>(step(3)),
            static_cast<int>(g->sizes[2]),
            static_cast<int>(g->sizes[3])};
}

Factors factors_of(const Given& given, const Parameter* p) {
    return {static_cast<int>(given.latent), false, p[0], p[1], p[2], p[3], p[4]};
}

std::string message;
template <class F>
const char* caught(const F& f) {
    try {
        f();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

void convolve(ConvolveParams& s, int type, bool last, int kernel, Mode mode, int64_t* plan) {
    choose(type, last, kernel, [&](auto zero, auto order, auto k) {
        using T = decltype(zero);
        constexpr bool kLast = decltype(order)::value;
        constexpr int kKernel = decltype(k)::value;
        plan_convolve<T, kLast>(s, mode, kKernel);
        const int64_t told[] = {s.tiling.vector,
                                s.tiling.rows,
                                s.tiling.columns,
                                s.tiling.group,
                                s.tiling.tiles(),
                                s.output_pairs,
                                convolve_shared_bytes<T, kLast, kKernel>(s)};
        if (plan) std::copy(std::begin(told), std::end(told), plan);
        run_convolve<T, kLast, kKernel>(s, mode);
    });
}

// Memory of the emulated device whose every element has to be written once.
struct Scratch {
    std::vector<float> values;
    std::vector<uint8_t> marks;
    void place(int64_t size) {
        values.assign(static_cast<size_t>(size), std::nanf(""));
        marks.assign(static_cast<size_t>(4 * size), 1);
        memories.push_back({reinterpret_cast<const char*>(values.data()), 4 * size, marks.data(), true});
    }
    void check(const char* name) const {
        for (const uint8_t mark : marks)
            if (mark != 2)
                throw std::runtime_error(std::string("partial sums of ") + name + " were not written once");
    }
};

}  // namespace
}  // namespace dcd::cuda::dw

using namespace dcd::cuda::dw;

extern "C" {

void host_reset(int backwards) {
    memories.clear();
    wide_reads = 0;
    last_thread_first = backwards;
}
int64_t host_wide_reads() {
    return wide_reads;
}
void host_tensor(const void* begin, int64_t bytes, uint8_t* marks, int writable) {
    memories.push_back({static_cast<const char*>(begin), bytes, marks, writable != 0});
}

// parameters: weight, p, phi, r, lam, bias; images: input, output, residual
const char* host_convolve(const Given* given, const Parameter* parameters, const GivenImage* images, int type,
                          int last, int kernel, int stride, int64_t* plan) {
    return caught([&] {
        ConvolveParams s{};
        s.batch = given->batch, s.channels = static_cast<int>(given->channels);
        s.pad_rows = static_cast<int>(given->padding[0]), s.pad_columns = static_cast<int>(given->padding[1]);
        s.factors = factors_of(*given, parameters);
        s.input = image_of(&images[0]), s.output = image_of(&images[1]);
        if (images[2].data) s.residual = image_of(&images[2]);
        s.bias = parameters[5], s.bias_sample = given->bias_sample;
        s.activation = static_cast<int>(given->activation);
        convolve(s, type, last, kernel, stride == 1 ? kSame : kDown, plan);
    });
}

// images: grad, d_input
const char* host_input_gradient(const Given* given, const Parameter* parameters, const GivenImage* images,
                                int type, int last, int kernel, int stride, int64_t* plan) {
    return caught([&] {
        ConvolveParams s{};
        s.batch = given->batch, s.channels = static_cast<int>(given->channels);
        s.pad_rows = static_cast<int>(given->padding[0]), s.pad_columns = static_cast<int>(given->padding[1]);
        s.factors = factors_of(*given, parameters);
        s.input = image_of(&images[0]), s.output = image_of(&images[1]);
        convolve(s, type, last, kernel, transpose(s, kernel, stride), plan);
    });
}

// images: input, grad; gradients: d_weight, d_p, d_phi, d_r, d_lam, data null where not wanted. plan: sample
// and tile splits
const char* host_sums(const Given* given, const Parameter* parameters, const GivenImage* images,
                      const Parameter* gradients, int type, int last, int kernel, int stride, int64_t* plan) {
    return caught([&] {
        SumsParams s{};
        s.batch = given->batch, s.channels = static_cast<int>(given->channels);
        s.pad_rows = static_cast<int>(given->padding[0]), s.pad_columns = static_cast<int>(given->padding[1]);
        s.factors = factors_of(*given, parameters);
        s.input = image_of(&images[0]), s.grad = image_of(&images[1]);
        choose(type, last, kernel, [&](auto zero, auto order, auto k) {
            using T = decltype(zero);
            constexpr bool kLast = decltype(order)::value;
            constexpr int kKernel = decltype(k)::value;
            const Mode mode = stride == 1 ? kSame : kDown;
            plan_sums<T, kLast>(s, mode, kKernel);
            plan[0] = s.sample_splits, plan[1] = s.tile_splits;
            const int64_t groups = s.tiling.groups.divisor, splits = int64_t{s.sample_splits} * s.tile_splits;
            const int64_t latent = given->latent, taps = kKernel * kKernel;
            float** places[] = {&s.d_weight, &s.d_p, &s.d_phi, &s.d_r, &s.d_lam};
            const char* names[] = {"d_weight", "d_p", "d_phi", "d_r", "d_lam"};
            const int64_t sizes[] = {given->channels * taps, given->channels * latent,
                                     given->batch * latent * latent, taps * latent,
                                     given->batch * given->channels};
            const int64_t counts[] = {splits, splits, s.tile_splits * groups, splits * groups, s.tile_splits};
            Scratch scratch[5];
            ReduceParams reductions{};
            for (int i = 0; i < 5; ++i) {
                if (!gradients[i].data) continue;
                scratch[i].place(counts[i] * sizes[i]);
                *places[i] = scratch[i].values.data();
                reductions.each[reductions.used++] = {
                    scratch[i].values.data(),    sizes[i],
                    static_cast<int>(counts[i]), const_cast<void*>(gradients[i].data),
                    gradients[i].type,           0};
            }
            run_sums<T, kLast, kKernel>(s, mode);
            for (int i = 0; i < 5; ++i) scratch[i].check(names[i]);
            run_reduce(reductions);
        });
    });
}

float host_rounded(float x, int type) {
    return type == kHalf ? dcd::to_float(rounded<dcd::Half>(x)) : dcd::to_float(rounded<dcd::BFloat>(x));
}
}
