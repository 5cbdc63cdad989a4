// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::network: a whole network, or a part of one, in one call, for inference in fp32 or bf16.
#include <algorithm>

#include "network.h"
#include "network_checks.h"
#include "tensors.h"

namespace dcd {
namespace {

constexpr int64_t kHeader = 4;
constexpr int64_t kValueSize = sizeof(NetworkValue) / sizeof(int64_t),
                  kStepSize = sizeof(NetworkStep) / sizeof(int64_t);

NetworkProgram decode(const Tensor& program) {
    STD_TORCH_CHECK(program.dim() == 1 && program.is_cpu() && program.is_contiguous() &&
                        program.scalar_type() == ScalarType::Long && program.size(0) >= kHeader,
                    "program must be a vector of int64 on the CPU, as dcd_kernels.inference makes it");
    const auto* numbers = static_cast<const int64_t*>(program.const_data_ptr());
    NetworkProgram decoded{};
    decoded.value_count = numbers[0], decoded.step_count = numbers[1], decoded.slot_count = numbers[2];
    decoded.narrow = numbers[3];
    STD_TORCH_CHECK(decoded.narrow == 0 || decoded.narrow == 1,
                    "program must be for float32 (0) or bfloat16 (1), got ", decoded.narrow);
    STD_TORCH_CHECK(
        decoded.value_count >= 0 && decoded.step_count >= 0 && decoded.slot_count >= 0 &&
            decoded.value_count <= program.size(0) && decoded.step_count <= program.size(0) &&
            program.size(0) == kHeader + decoded.value_count * kValueSize + decoded.step_count * kStepSize,
        "program must have ", kHeader, " numbers, then ", kValueSize, " a value and ", kStepSize,
        " a step, got ", program.size(0), " for ", decoded.value_count, " values and ", decoded.step_count,
        " steps");
    numbers += kHeader;
    decoded.values = reinterpret_cast<const NetworkValue*>(numbers);
    decoded.steps = reinterpret_cast<const NetworkStep*>(numbers + decoded.value_count * kValueSize);
    return decoded;
}

// Of the images of a network.
ScalarType type_of(const NetworkProgram& program) {
    return program.narrow ? ScalarType::BFloat16 : ScalarType::Float;
}

void check_image(const Tensor& tensor, const Tensor& first, ScalarType type) {
    STD_TORCH_CHECK(tensor.dim() == 4 || tensor.dim() == 2,
                    "inputs must have shape (N, C, H, W) or (N, C), got ", tensor.dim(), " dimensions");
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type, "inputs must be ",
                    torch::headeronly::toString(type), " on the CPU, as the program is, got ",
                    torch::headeronly::toString(tensor.scalar_type()),
                    tensor.is_cpu() ? "" : " on another device");
    STD_TORCH_CHECK(tensor.size(0) == first.size(0), "inputs must have one batch size, got ", first.size(0),
                    " and ", tensor.size(0));
}

NetworkTensor tensor_of(const Tensor& tensor, void* data) {
    const bool image = tensor.dim() == 4;
    return {data,
            tensor.size(1),
            image ? tensor.size(2) : 1,
            image ? tensor.size(3) : 1,
            tensor.stride(0),
            tensor.stride(1),
            image ? tensor.stride(2) : 0,
            image ? tensor.stride(3) : 0};
}

// Height and width of each value, in the order of the steps.
std::vector<NetworkPlace> sizes_of_values(const NetworkProgram& program,
                                          const std::vector<NetworkTensor>& inputs) {
    std::vector<NetworkPlace> places(static_cast<size_t>(program.value_count), NetworkPlace{1, 1, 0, 0});
    const auto at = [&](int64_t v) -> NetworkPlace& {
        STD_TORCH_CHECK(v >= 0 && v < program.value_count, "program refers to value ", v, " of ",
                        program.value_count);
        return places[static_cast<size_t>(v)];
    };
    for (int64_t i = 0; i < program.step_count; ++i) {
        const NetworkStep& s = program.steps[i];
        STD_TORCH_CHECK(s.kind >= 0 && s.kind < kStepKinds, "program has a step of unknown kind ", s.kind);
        int64_t height = 1, width = 1;
        if (s.kind == kStem || s.kind == kImport) {
            STD_TORCH_CHECK(s.tensor >= 0 && s.tensor < static_cast<int64_t>(inputs.size()),
                            "program reads input ", s.tensor, " of ", inputs.size());
            const NetworkTensor& tensor = inputs[static_cast<size_t>(s.tensor)];
            STD_TORCH_CHECK(tensor.channels == s.in_channels, "input ", s.tensor, " must have ",
                            s.in_channels, " channels, got ", tensor.channels);
            height = tensor.height, width = tensor.width;
        } else {
            height = at(s.input).height, width = at(s.input).width;
        }
        if (s.kind == kStem || s.kind == kDense || s.kind == kDepthwise || s.kind == kMaxPool) {
            const int64_t rows = window_size(height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
            const int64_t columns = window_size(width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
            STD_TORCH_CHECK(rows > 0 && columns > 0, "the input is too small: a kernel of ", s.kernel_h,
                            " x ", s.kernel_w, " with padding ", s.padding_h, " x ", s.padding_w,
                            " meets an image of ", height, " x ", width);
            height = rows, width = columns;
        }
        if (s.kind == kExport || s.kind == kPool) continue;
        if (s.kind != kBranch) at(s.output).height = height, at(s.output).width = width;
        if (s.skip >= 0)
            STD_TORCH_CHECK(at(s.skip).height == height && at(s.skip).width == width, "images of ", height,
                            " x ", width, " and ", at(s.skip).height, " x ", at(s.skip).width,
                            " cannot be added");
    }
    return places;
}

// Slots one behind the other; a slot is as large as the largest value in it.
void place(NetworkCall& call, std::vector<NetworkPlace>& places) {
    constexpr int64_t kLine = 64;
    constexpr double kMost = 1e15;  // what no machine has, and 64 bits hold
    double all = 0;
    const NetworkProgram& program = call.program;
    const int64_t samples = (call.batch + call.shares - 1) / call.shares;
    std::vector<int64_t> slots(static_cast<size_t>(program.slot_count), 0);
    for (int64_t v = 0; v < program.value_count; ++v) {
        const NetworkValue& value = program.values[v];
        NetworkPlace& place = places[static_cast<size_t>(v)];
        const int64_t channels = planes_of(value.channels) * kBlock, rows = place.height + 2 * value.halo_h,
                      columns = place.width + 2 * value.halo_w;
        all += static_cast<double>(channels) * static_cast<double>(rows) * static_cast<double>(columns) *
               static_cast<double>(samples);
        STD_TORCH_CHECK(all < kMost, "inputs are too large: a batch of ", call.batch, ", and a value of ",
                        value.channels, " x ", rows, " x ", columns);
        place.sample = channels * rows * columns;
        if (value.slot < 0) continue;
        int64_t& size = slots[static_cast<size_t>(value.slot)];
        const int64_t bytes = program.narrow && !value.vector ? 2 : 4;
        size = std::max(size, bytes * place.sample * (value.shared ? 1 : samples));
    }
    for (int64_t& size : slots) {
        const int64_t begin = call.memory;
        // a line between, so that slots of a power of two do not share their places in the caches
        call.memory += (size + kLine - 1) / kLine * kLine + kLine;
        size = begin;
    }
    for (int64_t v = 0; v < program.value_count; ++v)
        if (program.values[v].slot >= 0)
            places[static_cast<size_t>(v)].begin = slots[static_cast<size_t>(program.values[v].slot)];
    for (int64_t i = 0; i < program.step_count; ++i) {
        const NetworkStep& s = program.steps[i];
        if (s.kind == kDense)  // of other kinds the field may say anything, and so may the output
            call.work = std::max(call.work, 4 * latent_size(s, places[static_cast<size_t>(s.input)],
                                                            places[static_cast<size_t>(s.output)]));
    }
}

// The outputs of `program`, whose constants are `constants`, for `inputs`.
std::vector<Tensor> network(std::vector<Tensor> inputs,  // each [N, C, H, W] or [N, C], any layout
                            const Tensor& constants,     // [numbers], see inference/pack.py
                            const Tensor& program) {     // [numbers], see network.h
    NetworkCall call{};
    call.program = decode(program);
    STD_TORCH_CHECK(
        constants.is_cpu() && constants.scalar_type() == ScalarType::Float && constants.is_contiguous(),
        "constants must be contiguous float32 on the CPU, got ",
        torch::headeronly::toString(constants.scalar_type()), constants.is_cpu() ? "" : " on another device",
        constants.is_contiguous() ? "" : ", not contiguous");
    STD_TORCH_CHECK(!inputs.empty(), "inputs must be at least one tensor");
    std::vector<NetworkTensor> tensors, results;
    for (const Tensor& input : inputs) {
        check_image(input, inputs[0], type_of(call.program));
        // read only: kImport and kStem have no other use for it
        tensors.push_back(tensor_of(input, const_cast<void*>(input.const_data_ptr())));
    }
    NetworkChecks(call.program, constants.numel()).run();
    std::vector<NetworkPlace> places = sizes_of_values(call.program, tensors);
    call.constants = static_cast<const float*>(constants.const_data_ptr());
    call.batch = inputs[0].size(0);
    const Runtime runtime = torch_runtime();
    call.shares = std::max<int64_t>(1, call.batch >= runtime.threads ? runtime.threads : 1);
    place(call, places);
    const bool channels_last = inputs[0].dim() == 4 && is_channels_last(inputs[0]);
    std::vector<Tensor> outputs;
    for (int64_t i = 0; i < call.program.step_count; ++i) {
        const NetworkStep& s = call.program.steps[i];
        if (s.kind != kExport) continue;
        const NetworkPlace& size = places[static_cast<size_t>(s.input)];
        std::vector<int64_t> sizes{call.batch, s.out_channels};
        if (s.rank == 4) sizes.insert(sizes.end(), {size.height, size.width});
        const bool image = sizes.size() == 4;
        const ScalarType type = type_of(call.program);
        outputs.push_back(image ? empty_map(sizes, channels_last, type) : empty_dense(sizes, type));
        results.push_back(tensor_of(outputs.back(), outputs.back().mutable_data_ptr()));
    }
    if (call.batch == 0) return outputs;
    call.inputs = tensors.data(), call.outputs = results.data(), call.places = places.data();
    const LaunchScope scope;
    run_network(call, runtime);
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def("network(Tensor[] inputs, Tensor constants, Tensor program) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("network", TORCH_BOX(&network));
}

}  // namespace dcd
