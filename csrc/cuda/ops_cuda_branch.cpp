// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::channel_sums and branch on CUDA tensors: checks, allocation, launch. The schemas are in
// ops_branch.cpp, in the other library.
#include <torch/csrc/stable/accelerator.h>

#include "../branch_checks.h"
#include "branch.h"
#include "pool.h"
#include "quadrants.h"
#include "stream.h"

namespace dcd {
namespace {

using cuda::Element;
using torch::stable::accelerator::DeviceGuard;

Element element_of(const Tensor& t, const char* name) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type != ScalarType::Double, name,
                    " must be float32, float16 or bfloat16 on CUDA, got Double; plain PyTorch computes it");
    return type == ScalarType::Float  ? Element::kFloat
           : type == ScalarType::Half ? Element::kHalf
                                      : Element::kBFloat;
}

void check_launch(const char* op, const char* error) {
    STD_TORCH_CHECK(!error, "the CUDA kernel of ", op, " could not be started: ", error);
}

// Partial per-sample channel sums of an image, in fp32.
Tensor channel_sums(const Tensor& input, int64_t bins) {  // [N, C, *spatial] -> [N, T, C·bins²]
    check_bins(input, bins);
    check_operands(input, "input", {});
    const Element element = element_of(input, "input");
    const DeviceGuard guard(input.get_device_index());
    cuda::PoolParams s{};
    s.batch = input.size(0), s.channels = input.size(1), s.pixels = pixels_of(input);
    const int64_t tiles = bins == 1 ? pool_tiles(s.pixels) : quadrant_tiles(input.size(2), input.size(3));
    STD_TORCH_CHECK(s.channels <= cuda::kPoolMaxItems / kPoolMaxTiles, "input must have at most ",
                    cuda::kPoolMaxItems / kPoolMaxTiles, " channels, got ", s.channels);
    STD_TORCH_CHECK(bins == 1 || s.pixels <= cuda::kQuadrantMaxPixels, "input must have at most ",
                    cuda::kQuadrantMaxPixels, " pixels for bins=2 on CUDA, got ", s.pixels);
    Tensor sums = empty_dense({s.batch, tiles, s.channels * bins * bins}, ScalarType::Float);
    if (sums.numel() == 0) return sums;
    if (s.pixels == 0) return torch::stable::zero_(sums);
    // as they are where the pixels or the channels lie side by side, else a copy
    Tensor image = as_map(input, is_channels_last(input), input.scalar_type());
    const Strides strides = map_strides(image);
    s.input = image.const_data_ptr();
    s.sample = strides.sample, s.channel = strides.channel, s.pixel = strides.pixel;
    s.tiles = static_cast<int>(tiles);
    s.sums = static_cast<float*>(sums.mutable_data_ptr());
    void* stream = stream_of(input);
    if (bins == 1) {
        s.tile_pixels = pool_tile_pixels(s.pixels, tiles);
        check_launch("channel_sums", launch_pool(s, element, stream));
    } else {
        const auto quadrants = cuda::quadrant_params(s, input.size(2), input.size(3));
        check_launch("channel_sums", launch_quadrants(quadrants, element, stream));
    }
    return sums;
}

// h = gate(squeeze x), x = scale · sum over T; lam = lam_activation, phi = the rest of expand h, or
// phi_weight h
std::tuple<Tensor, Tensor> branch(const Tensor& sums,  // [N, T, I]
                                  double scale, const Tensor& squeeze_weight,
                                  const OptionalTensor& squeeze_bias, const OptionalTensor& gate_weight,
                                  const OptionalTensor& gate_bias, const Tensor& expand_weight,
                                  const OptionalTensor& expand_bias, const OptionalTensor& phi_weight,
                                  const OptionalTensor& phi_bias, int64_t lam_channels, int64_t gate,
                                  int64_t lam_code) {
    const BranchWeights weights{squeeze_weight, squeeze_bias, gate_weight, gate_bias,
                                expand_weight,  expand_bias,  phi_weight,  phi_bias};
    const BranchShape shape = check_branch(sums, weights, lam_channels, gate, lam_code);
    element_of(sums, "sums");
    const Element element = element_of(squeeze_weight, "squeeze_weight");
    STD_TORCH_CHECK(shape.inputs <= kBranchMaxInputs, "sums must have at most ", kBranchMaxInputs,
                    " channels on CUDA, got ", shape.inputs);
    STD_TORCH_CHECK(shape.hidden <= kBranchMaxHidden, "squeeze_weight must have at most ", kBranchMaxHidden,
                    " rows on CUDA, got ", shape.hidden);
    STD_TORCH_CHECK(
        shape.batch < int64_t{1} << 28 && shape.outputs < int64_t{1} << 28 && shape.tiles < int64_t{1} << 31,
        "sums and expand_weight must have fewer than 2^28 samples and coefficients, got ", shape.batch,
        " and ", shape.outputs);
    const DeviceGuard guard(sums.get_device_index());
    Tensor lam = empty_dense({shape.batch, lam_channels}, ScalarType::Float);
    Tensor phi = empty_dense({shape.batch, shape.outputs - lam_channels}, ScalarType::Float);
    if (shape.batch == 0) return {lam, phi};
    // contiguous, in their own type: the kernel reads any of the three
    const ScalarType type = squeeze_weight.scalar_type();
    const Tensor own_sums = dense(sums, ScalarType::Float);
    const Tensor squeeze = dense(squeeze_weight, type), expand = dense(expand_weight, type);
    const OptionalTensor gate_matrix = dense(gate_weight, type), phi_matrix = dense(phi_weight, type);
    const OptionalTensor biases[4] = {dense(squeeze_bias, type), dense(gate_bias, type),
                                      dense(expand_bias, type), dense(phi_bias, type)};
    cuda::BranchParams s{};
    s.sums = static_cast<const float*>(own_sums.const_data_ptr());
    s.squeeze = squeeze.const_data_ptr(), s.squeeze_bias = pointer<void>(biases[0]);
    s.gate = pointer<void>(gate_matrix), s.gate_bias = pointer<void>(biases[1]);
    s.expand = expand.const_data_ptr(), s.expand_bias = pointer<void>(biases[2]);
    s.phi = pointer<void>(phi_matrix), s.phi_bias = pointer<void>(biases[3]);
    s.lam = static_cast<float*>(lam.mutable_data_ptr());
    s.others = static_cast<float*>(phi.mutable_data_ptr());
    s.batch = shape.batch, s.tiles = static_cast<int>(shape.tiles);
    s.inputs = static_cast<int>(shape.inputs), s.hidden = static_cast<int>(shape.hidden);
    s.outputs = static_cast<int>(shape.outputs), s.lam_channels = static_cast<int>(lam_channels);
    s.gate_code = static_cast<int>(gate), s.lam_code = static_cast<int>(lam_code);
    s.scale = static_cast<float>(scale);
    check_launch("branch", launch_branch(s, element, stream_of(sums)));
    return {lam, phi};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CUDA, m) {
    m.impl("channel_sums", TORCH_BOX(&channel_sums));
    m.impl("branch", TORCH_BOX(&branch));
}

}  // namespace dcd
