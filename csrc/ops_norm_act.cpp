// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::batch_norm_act and its gradient: checks, allocation, launch.
#include "tensors.h"

namespace dcd {
namespace {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

void check_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                int64_t activation) {
    check_rank(input, "input", 2, false);
    check_operands(input, "input", {{"weight", weight, true}, {"bias", bias, true}});
    STD_TORCH_CHECK(input.numel() > 0, "input must have at least one value a channel, got none");
    if (weight) check_sizes(*weight, "weight", {input.size(1)});
    if (bias) check_sizes(*bias, "bias", {input.size(1)});
    STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
    check_activation(activation);
}

template <class T>
NormActParams<T> norm_params(const Tensor& input, bool channels_last, const OptionalTensor& weight,
                             const OptionalTensor& bias, double eps, int64_t activation) {
    NormActParams<T> s{};
    s.batch = input.size(0), s.channels = input.size(1), s.pixels = pixels_of(input);
    s.channels_last = channels_last;
    s.input = const_map<T>(input);
    s.weight = pointer<T>(weight), s.bias = pointer<T>(bias);
    s.eps = eps, s.activation = static_cast<int>(activation);
    return s;
}

// y = act(weight (x - mean) / sqrt(variance + eps) + bias) with a channel's mean and biased variance over the
// batch, which are returned in fp32 for half precision
ThreeTensors batch_norm_act(const Tensor& input,           // [N, C, *spatial]
                            const OptionalTensor& weight,  // [C]
                            const OptionalTensor& bias,    // [C]
                            double eps, int64_t activation) {
    check_norm(input, weight, bias, eps, activation);
    const ScalarType type = compute_type(input);
    const bool channels_last = is_channels_last(input);
    const Tensor x = as_map(input, channels_last, type);
    const Tensor output = empty_map(sizes_of(input), channels_last, type);
    const Tensor mean = empty_dense({input.size(1)}, type), variance = empty_dense({input.size(1)}, type);
    const OptionalTensor weight_ = dense(weight, type), bias_ = dense(bias, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        NormActParams<T> s = norm_params<T>(x, channels_last, weight_, bias_, eps, activation);
        s.output = mutable_map<T>(output);
        s.mean = target<T>(mean), s.variance = target<T>(variance);
        kernels<T>().norm_act(s, torch_runtime());
    });
    return {in_type(output, input.scalar_type()), mean, variance};
}

// Bit i of `needs` asks for return i.
ThreeTensors batch_norm_act_backward(const Tensor& grad,            // [N, C, *spatial]
                                     const Tensor& input,           // [N, C, *spatial]
                                     const OptionalTensor& weight,  // [C]
                                     const OptionalTensor& bias,    // [C]
                                     const Tensor& mean,            // [C], what batch_norm_act returned
                                     const Tensor& variance,        // [C]
                                     double eps, int64_t activation, int64_t needs) {
    check_norm(input, weight, bias, eps, activation);
    check_operands(input, "input",
                   {{"grad", grad, true}, {"mean", mean, true}, {"variance", variance, true}});
    check_like(grad, "grad", sizes_of(input));
    check_sizes(mean, "mean", {input.size(1)}), check_sizes(variance, "variance", {input.size(1)});
    const ScalarType type = compute_type(input);
    const bool channels_last = is_channels_last(input);
    const Gradients wanted{needs, type, false};
    const Tensor d_input = wanted.map(0, input, channels_last);
    const Tensor d_weight = wanted.dense(1, weight), d_bias = wanted.dense(2, bias);
    const Tensor x = as_map(input, channels_last, type), g = as_map(grad, channels_last, type);
    const OptionalTensor weight_ = dense(weight, type), bias_ = dense(bias, type);
    const Tensor mean_ = dense(mean, type), variance_ = dense(variance, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        NormActGradParams<T> s{};
        s.forward = norm_params<T>(x, channels_last, weight_, bias_, eps, activation);
        s.mean = static_cast<const T*>(mean_.const_data_ptr());
        s.variance = static_cast<const T*>(variance_.const_data_ptr());
        s.grad = const_map<T>(g);
        if (d_input.numel()) s.d_input = mutable_map<T>(d_input);
        s.d_weight = target<T>(d_weight), s.d_bias = target<T>(d_bias);
        kernels<T>().norm_act_grad(s, torch_runtime());
    });
    return {in_type_of(d_input, input), in_type_of(d_weight, weight), in_type_of(d_bias, bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def(
        "batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, float eps, int activation) -> (Tensor, "
        "Tensor, Tensor)");
    m.def(
        "batch_norm_act_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
        "Tensor variance, float eps, int activation, int needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
    m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace dcd
