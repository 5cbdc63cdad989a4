// SPDX-License-Identifier: BSD-3-Clause
// What dcd_kernels::network demands of a program: every offset, number and size that a kernel goes by, so
// that no program, whoever wrote it, makes one read or write outside of its memory. O(steps).
#pragma once

#include <initializer_list>
#include <vector>

#include "branch_codes.h"
#include "cpu/params.h"
#include "network.h"
#include "tensors.h"

namespace dcd {

class NetworkChecks {
  public:
    NetworkChecks(const NetworkProgram& program, int64_t constants)
        : program_(program),
          constants_(constants),
          made_(static_cast<size_t>(program.value_count), 0),
          streamed_(static_cast<size_t>(program.step_count), 0) {}

    // Everything but what depends on the sizes of the inputs.
    void run() {
        STD_TORCH_CHECK(program_.slot_count <= program_.value_count, "program has ", program_.slot_count,
                        " slots for ", program_.value_count, " values");
        for (int64_t v = 0; v < program_.value_count; ++v) {
            const NetworkValue& value = program_.values[v];
            bound("channels of a value", value.channels, 1, kMost);
            bound("halo_h", value.halo_h, 0, kMostGeometry), bound("halo_w", value.halo_w, 0, kMostGeometry);
            bound("slot", value.slot, -1, program_.slot_count - 1), bound("shared", value.shared, 0, 1);
            bound("vector", value.vector, 0, 1);
        }
        for (step_ = 0; step_ < program_.step_count; ++step_) check(program_.steps[step_]);
        for (step_ = 0; step_ < program_.step_count; ++step_)
            STD_TORCH_CHECK(!program_.steps[step_].streamed || streamed_[static_cast<size_t>(step_)] == 1,
                            "program: step ", step_,
                            " is streamed and must have one depthwise step as reader");
        step_ = -1;
    }

  private:
    // Far above any network, and so far below 2^63 that no product below overflows.
    static constexpr int64_t kMost = int64_t(1) << 26, kMostGeometry = int64_t(1) << 16, kMostBins = 1 << 12;

    void bound(const char* name, int64_t value, int64_t low, int64_t high) const {
        STD_TORCH_CHECK(value >= low && value <= high, "program: ", name, " must be from ", low, " to ", high,
                        ", got ", value, " in step ", step_);
    }
    static int64_t wide(int64_t channels) { return planes_of(channels) * kBlock; }
    int64_t depth(int64_t channels) const { return depth_of(channels, program_.narrow); }

    const NetworkValue& value(const char* name, int64_t v) const {
        bound(name, v, 0, program_.value_count - 1);
        return program_.values[v];
    }
    // A value of at least `channels`, in whole planes, that a step before this one made.
    const NetworkValue& read(const char* name, int64_t v, int64_t channels) const {
        const NetworkValue& found = value(name, v);
        STD_TORCH_CHECK(made_[static_cast<size_t>(v)], "program: step ", step_, " reads value ", v,
                        ", which no step before it makes");
        STD_TORCH_CHECK(wide(found.channels) >= wide(channels), "program: step ", step_, " needs ", channels,
                        " channels of its ", name, ", got ", found.channels);
        return found;
    }
    const NetworkValue& read_memory(const char* name, int64_t v, int64_t channels) const {
        const NetworkValue& found = read(name, v, channels);
        STD_TORCH_CHECK(found.slot >= 0, "program: ", name, " of step ", step_, " has no place in memory");
        return found;
    }
    const NetworkValue& read_image(const char* name, int64_t v, int64_t channels) const {
        image(name, v);
        return read_memory(name, v, channels);
    }
    // In bf16, kernels of images read no vectors, nor the other way round.
    void image(const char* name, int64_t v) const {
        STD_TORCH_CHECK(!program_.narrow || !value(name, v).vector, "program: ", name, " of step ", step_,
                        " must be an image, got a vector");
    }
    void vector(const char* name, const NetworkValue& found) const {
        STD_TORCH_CHECK(found.halo_h == 0 && found.halo_w == 0, "program: ", name, " of step ", step_,
                        " must be a vector, got an image with a halo");
        STD_TORCH_CHECK(!program_.narrow || found.vector, "program: ", name, " of step ", step_,
                        " must be a vector, got an image");
    }
    void read_vector(const char* name, int64_t v, int64_t channels) const {
        vector(name, read_memory(name, v, channels));
    }
    void write(const char* name, int64_t v, int64_t channels, bool in_memory = true) {
        const NetworkValue& found = value(name, v);
        STD_TORCH_CHECK(!made_[static_cast<size_t>(v)], "program: value ", v, " is made twice, by step ",
                        step_, " too");
        STD_TORCH_CHECK(wide(found.channels) == wide(channels), "program: step ", step_, " makes ", channels,
                        " channels of value ", v, ", which has ", found.channels);
        STD_TORCH_CHECK(!in_memory || found.slot >= 0, "program: ", name, " of step ", step_,
                        " has no place in memory");
        made_[static_cast<size_t>(v)] = 1;
    }
    void write_vector(const char* name, int64_t v, int64_t channels) {
        write(name, v, channels);
        vector(name, program_.values[v]);
    }

    // Numbers from `offset` on, as many as the product of `sizes`.
    void constant(const char* name, int64_t offset, std::initializer_list<int64_t> sizes) const {
        double count = 1;
        for (const int64_t size : sizes) count *= static_cast<double>(size);
        STD_TORCH_CHECK(offset >= 0 && static_cast<double>(offset) + count <= static_cast<double>(constants_),
                        "program: ", name, " of step ", step_, " must be ", count, " of the ", constants_,
                        " constants, got those from ", offset);
    }
    void optional(const char* name, int64_t offset, int64_t channels) const {
        if (offset != -1) constant(name, offset, {wide(channels)});
    }

    void geometry(const NetworkStep& s, int64_t kernel = kMaxKernel) const {
        bound("kernel_h", s.kernel_h, 1, kernel), bound("kernel_w", s.kernel_w, 1, kernel);
        bound("stride_h", s.stride_h, 1, kMostGeometry), bound("stride_w", s.stride_w, 1, kMostGeometry);
        bound("padding_h", s.padding_h, 0, kMostGeometry), bound("padding_w", s.padding_w, 0, kMostGeometry);
        bound("dilation_h", s.dilation_h, 1, kMostGeometry);
        bound("dilation_w", s.dilation_w, 1, kMostGeometry);
    }

    // lam, Phi and what goes with them. `left` is the length of Q's or R's columns and `latents` that of P's
    // rows, in bf16 maybe of pairs; `matrices` is how many there are in Phi, `blocks` in Q.
    void dynamic(const NetworkStep& s, int64_t left, int64_t matrices, int64_t blocks,
                 int64_t latents) const {
        STD_TORCH_CHECK(s.lam_channels == 0 || s.lam_channels == wide(s.out_channels), "program: step ",
                        step_, " must have lam for none or all ", wide(s.out_channels),
                        " channels in whole planes, got ", s.lam_channels);
        const double phi = static_cast<double>(matrices) * static_cast<double>(wide(s.latent) * s.latent);
        STD_TORCH_CHECK(phi <= kMost, "program: step ", step_, " has ", phi, " numbers of Phi");
        if (s.lam_channels || s.latent)
            read_vector("coefficients", s.coefficients, s.lam_channels + static_cast<int64_t>(phi));
        else
            bound("coefficients", s.coefficients, -1, -1);
        if (!s.latent) return;
        constant("p", s.p, {wide(s.out_channels), latents});
        constant("q", s.q, {blocks, wide(s.latent), left});
        optional("latent_bias", s.latent_bias, s.latent);
    }
    void dynamic(const NetworkStep& s, int64_t left, bool paired) const {
        bound("latent", s.latent, 0, kMost);
        dynamic(s, left, 1, 1, paired ? depth(s.latent) : s.latent);
    }
    // In blocks, or joint with the kernel.
    void dynamic_dense(const NetworkStep& s) const {
        bound("latent", s.latent, 0, kMost);
        if (!s.latent) return dynamic(s, 0, 1, 1, 0);
        bound("blocks", s.blocks, 1, kMost), bound("latent_kernel", s.latent_kernel, 0, kMost);
        STD_TORCH_CHECK(s.out_channels % s.blocks == 0 && s.in_channels % s.blocks == 0,
                        "program: blocks of step ", step_, " must divide its ", s.out_channels, " and ",
                        s.in_channels, " channels, got ", s.blocks);
        STD_TORCH_CHECK(s.blocks == 1 || !s.latent_kernel, "program: step ", step_,
                        " has a latent kernel and must have one block, got ", s.blocks);
        STD_TORCH_CHECK(s.latent_bias == -1 || (s.blocks == 1 && !s.latent_kernel), "program: step ", step_,
                        " takes no latent_bias: it has ", s.blocks, " blocks and a latent kernel of ",
                        s.latent_kernel);
        if (s.latent_kernel) constant("r", s.r, {s.kernel_h, s.kernel_w, s.latent_kernel});
        dynamic(s, depth(s.in_channels), s.latent_kernel ? s.latent_kernel : s.blocks, s.blocks,
                depth(latent_width(s)));
    }

    void pooled(const NetworkStep& s) {
        if (s.pooled == -1 && s.kind != kPool) return;
        bound("bins", s.bins, 1, kMostBins);
        write_vector("pooled", s.pooled, s.bins * s.bins * wide(s.out_channels));
    }

    void check_streamed(const NetworkStep& s) const {
        STD_TORCH_CHECK(
            (s.kind == kStem || s.kind == kDense) && s.skip == -1 && s.pooled == -1 && !s.winograd,
            "program: step ", step_, " cannot be streamed");
    }

    void check(const NetworkStep& s) {
        bound("kind", s.kind, 0, kStepKinds - 1);
        bound("streamed", s.streamed, 0, 1), bound("activation", s.activation, 0, kHardswish);
        bound("out_channels", s.out_channels, 1, kMost);
        bound("stage", s.stage, 0, program_.step_count);
        if (s.streamed) check_streamed(s);
        STD_TORCH_CHECK(s.skip == -1 || s.kind == kDense || s.kind == kAdd, "program: step ", step_,
                        " takes no skip");
        STD_TORCH_CHECK(s.producer == -1 || s.kind == kDepthwise, "program: step ", step_,
                        " takes no producer");
        switch (s.kind) {
            case kStem:
                check_stem(s);
                break;
            case kDense:
                check_dense(s);
                break;
            case kDepthwise:
                check_depthwise(s);
                break;
            case kLinear:
                check_linear(s);
                break;
            case kBranch:
                check_branch(s);
                break;
            case kPool:
                read_image("input", s.input, s.out_channels);
                break;
            case kMaxPool:
                geometry(s, kMostGeometry);
                read_image("input", s.input, s.out_channels);
                break;
            case kAdd:
                check_add(s);
                break;
            case kImport:
                bound("in_channels", s.in_channels, s.out_channels, s.out_channels);
                break;
            default:
                read_memory("input", s.input, s.out_channels);
                bound("tensor of an export", s.tensor, exports_, exports_);
                STD_TORCH_CHECK(s.rank == 2 || s.rank == 4,
                                "program: the rank of an output must be 2 or 4, got ", s.rank);
                bound("pooled", s.pooled, -1, -1);
                ++exports_;
                return;
        }
        if (s.kind == kBranch || s.kind == kLinear) {
            write_vector("output", s.output, s.out_channels);
            bound("pooled", s.pooled, -1, -1);
            return;
        }
        if (s.kind != kPool) write("output", s.output, s.out_channels, !s.streamed);
        if (s.kind == kStem || s.kind == kDense || s.kind == kDepthwise || s.kind == kMaxPool ||
            s.pooled != -1)
            image(s.kind == kPool ? "input" : "output", s.kind == kPool ? s.input : s.output);
        pooled(s);
    }

    void check_add(const NetworkStep& s) const {
        read_memory("input", s.input, s.out_channels);
        if (s.skip == -1) return;
        const NetworkValue& skip = read_memory("skip", s.skip, s.out_channels);
        for (const int64_t v : {s.input, s.output})
            STD_TORCH_CHECK(!program_.narrow || value("sum", v).vector == skip.vector, "program: step ",
                            step_, " adds images and vectors");
    }

    void check_stem(const NetworkStep& s) const {
        geometry(s);
        bound("in_channels", s.in_channels, 1, kMaxStemTaps);
        bound("taps", s.in_channels * s.kernel_h * s.kernel_w, 1, kMaxStemTaps);
        // lines are summed like channels where their pixels are neighbours
        constant("weight", s.weight,
                 {wide(s.out_channels), s.in_channels, s.kernel_h,
                  s.dilation_w == 1 ? depth(s.kernel_w) : s.kernel_w});
        optional("bias", s.bias, s.out_channels);
    }

    void check_dense(const NetworkStep& s) const {
        geometry(s);
        bound("in_channels", s.in_channels, 1, kMost);
        bound("taps", s.kernel_h * s.kernel_w, 1, kMaxTaps);
        const NetworkValue& input = read_image("input", s.input, s.in_channels);
        STD_TORCH_CHECK(input.halo_h >= s.padding_h && input.halo_w >= s.padding_w, "program: step ", step_,
                        " pads by ", s.padding_h, " x ", s.padding_w, ", its input has a halo of ",
                        input.halo_h, " x ", input.halo_w);
        if (s.skip != -1) read_image("skip", s.skip, s.out_channels);
        bound("winograd", s.winograd, 0, program_.narrow ? 0 : 1);
        if (s.winograd) {
            for (const int64_t size : {s.kernel_h, s.kernel_w})
                bound("kernel of a Winograd step", size, 3, 3);
            for (const int64_t size : {s.stride_h, s.stride_w, s.dilation_h, s.dilation_w})
                bound("stride or dilation of a Winograd step", size, 1, 1);
        }
        constant(
            "weight", s.weight,
            {wide(s.out_channels), s.winograd ? kPoints : s.kernel_h * s.kernel_w, depth(s.in_channels)});
        optional("static_bias", s.static_bias, s.out_channels);
        optional("bias", s.bias, s.out_channels);
        dynamic_dense(s);
    }

    void check_depthwise(const NetworkStep& s) {
        geometry(s);
        STD_TORCH_CHECK(s.in_channels == s.out_channels,
                        "program: a depthwise step must have as many output "
                        "as input channels, got ",
                        s.in_channels, " and ", s.out_channels);
        if (s.producer == -1) {
            read_image("input", s.input, s.in_channels);
        } else {
            image("input", s.input);
            bound("producer", s.producer, 0, step_ - 1);
            const NetworkStep& producer = program_.steps[s.producer];
            STD_TORCH_CHECK(producer.streamed && producer.output == s.input &&
                                wide(producer.out_channels) >= wide(s.in_channels),
                            "program: step ", s.producer, " must be streamed and make the ", s.in_channels,
                            " channels that step ", step_, " reads");
            read("input", s.input, s.in_channels);
            ++streamed_[static_cast<size_t>(s.producer)];
        }
        constant("weight", s.weight, {wide(s.out_channels), s.kernel_h, s.kernel_w});
        optional("bias", s.bias, s.out_channels);
        dynamic(s, s.kernel_h * s.kernel_w, false);  // filters are fp32
    }

    void check_linear(const NetworkStep& s) const {
        bound("in_channels", s.in_channels, 1, kMost);
        read_vector("input", s.input, s.in_channels);
        constant("weight", s.weight, {wide(s.out_channels), depth(s.in_channels)});
        optional("static_bias", s.static_bias, s.out_channels);
        optional("bias", s.bias, s.out_channels);
        dynamic(s, depth(s.in_channels), true);
    }

    void check_branch(const NetworkStep& s) const {
        bound("in_channels", s.in_channels, 1, kMost), bound("hidden", s.hidden, 1, kMost);
        bound("gate_code", s.gate_code, 0, kGateEnd - 1), bound("lam_code", s.lam_code, 0, kLamEnd - 1);
        bound("lam_channels", s.lam_channels, 0, wide(s.out_channels));
        read_vector("input", s.input, s.in_channels);
        constant("squeeze", s.squeeze, {wide(s.hidden), depth(s.in_channels)});
        optional("squeeze_bias", s.squeeze_bias, s.hidden);
        if (s.gate_code == kGateSE) {
            constant("gate", s.gate, {wide(s.hidden), depth(s.hidden)});
            optional("gate_bias", s.gate_bias, s.hidden);
        }
        constant("expand", s.expand, {wide(s.out_channels), depth(s.hidden)});
        optional("expand_bias", s.expand_bias, s.out_channels);
    }

    const NetworkProgram& program_;
    const int64_t constants_;
    std::vector<char> made_;      // of each value: whether a step has made it
    std::vector<char> streamed_;  // of each step: how many depthwise steps compute it within theirs
    int64_t step_ = -1, exports_ = 0;
};

}  // namespace dcd
