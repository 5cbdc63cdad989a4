// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::depthwise and its gradient on CUDA tensors: checks, allocation, launch. The schemas are in
// ops_depthwise.cpp, in the other library.
#include <torch/csrc/stable/accelerator.h>

#include "../depthwise_checks.h"
#include "depthwise_plan.h"
#include "stream.h"

namespace dcd {
namespace {

using namespace dcd::cuda::dw;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kSideEnd = int64_t{1} << 29;    // coordinates twice as large fit 31 bits
constexpr int64_t kSampleEnd = int64_t{1} << 31;  // offsets within a sample

// What these kernels take, of what check_depthwise lets pass. backends/cuda.py says the same beforehand.
void check_supported(const Tensor& input, const Tensor& weight, const DepthwiseShape& shape,
                     const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
    const auto refuse = [](const char* what, const std::string& got) {
        STD_TORCH_CHECK(false, "the CUDA depthwise kernels take ", what, ", got ", got,
                        "; dcd_kernels.use_backend('reference') computes it");
    };
    const Sizes kernel = sizes_of(weight);
    const ScalarType type = input.scalar_type();
    if (type == ScalarType::Double) refuse("float32, float16 and bfloat16", "Double");
    if (input.dim() != 4) refuse("two spatial dimensions", "input of shape " + text(sizes_of(input)));
    if (kernel[2] != kernel[3] || (kernel[2] != 3 && kernel[2] != 5 && kernel[2] != 7))
        refuse("kernel sizes 3 x 3, 5 x 5 and 7 x 7", "weight of shape " + text(kernel));
    if (weight.size(0) != input.size(1))
        refuse("as many output as input channels",
               std::to_string(weight.size(0)) + " and " + std::to_string(input.size(1)));
    if (stride[0] != stride[1] || stride[0] > 2) refuse("stride 1 or 2", text(stride));
    if (dilation[0] != 1 || dilation[1] != 1) refuse("dilation 1", text(dilation));
    if (shape.latent > kLatentLimit) refuse("at most 48 latent components", std::to_string(shape.latent));
    for (size_t d = 2; d < 4; ++d)
        if (input.size(static_cast<int64_t>(d)) >= kSideEnd || padding[d - 2] >= kSideEnd ||
            shape.out_sizes[d] >= kSideEnd)
            refuse("sizes and padding below 2^29",
                   "input of shape " + text(sizes_of(input)) + " with padding " + text(padding));
}

// A dimension of one element has any stride, so it gets none.
Image image_of(const Tensor& t, const char* name) {
    Image image{t.const_data_ptr(), t.size(0) > 1 ? t.stride(0) : 0, 0, 0, 0, 0, 0};
    int* strides[3] = {&image.channel, &image.row, &image.column};
    double furthest = 0;
    for (int64_t d = 1; d < 4; ++d) {
        const int64_t step = t.size(d) > 1 ? t.stride(d) : 0;
        furthest += static_cast<double>(t.size(d) - 1) * static_cast<double>(step);
        *strides[d - 1] = static_cast<int>(step);
    }
    STD_TORCH_CHECK(furthest < static_cast<double>(kSampleEnd), name,
                    " must span less than 2^31 elements within a sample on CUDA, got shape ",
                    text(sizes_of(t)));
    image.height = static_cast<int>(t.size(2)), image.width = static_cast<int>(t.size(3));
    return image;
}

int type_code(ScalarType type) {
    return type == ScalarType::Float ? kFloat : type == ScalarType::Half ? kHalf : kBFloat;
}

// Contiguous, in its own type; the kernels read any.
OptionalTensor packed(const OptionalTensor& t) {
    return t ? dense(t, t->scalar_type()) : std::nullopt;
}
Parameter parameter(const OptionalTensor& t) {
    return t ? Parameter{t->const_data_ptr(), type_code(t->scalar_type())} : Parameter{nullptr, kFloat};
}

// The parameters in the order of the op, kept alive during the launch.
struct Held {
    OptionalTensor weight, p, phi, r, lam;
    Held(const Tensor& weight, const OptionalTensor& p, const OptionalTensor& phi, const OptionalTensor& r,
         const OptionalTensor& lam)
        : weight(packed(weight)), p(packed(p)), phi(packed(phi)), r(packed(r)), lam(packed(lam)) {}
    Factors factors(int64_t latent, bool flip) const {
        return {static_cast<int>(latent), flip,         parameter(weight), parameter(p),
                parameter(phi),           parameter(r), parameter(lam)};
    }
};

void check_launch(int code) {
    STD_TORCH_CHECK(code == 0, "a CUDA depthwise kernel could not be started: ", cuda::error_text(code));
}

// f(T{}, std::bool_constant<LAST>{}) for the type of the image and the order of its elements.
template <class F>
void with_arrangement(int type, bool last, const F& f) {
    const auto with_type = [&](auto zero) {
        if (last)
            f(zero, std::true_type{});
        else
            f(zero, std::false_type{});
    };
    if (type == kFloat)
        with_type(float{});
    else if (type == kHalf)
        with_type(Half{});
    else
        with_type(BFloat{});
}

constexpr double kBlocksEnd = 2147483647;  // of a launch

// Starts s, whose images, factors, padding and activation are given.
void start_convolve(ConvolveParams& s, int type, bool last, int kernel, Mode mode, void* stream) {
    with_arrangement(type, last, [&](auto zero, auto order) {
        plan_convolve<decltype(zero), decltype(order)::value>(s, mode, kernel);
    });
    STD_TORCH_CHECK(static_cast<double>(s.batch) * s.tiling.tiles() * s.tiling.groups.divisor <= kBlocksEnd,
                    "the batch is too large for one launch of the CUDA depthwise kernels: ", s.batch,
                    " samples");
    const auto launch = type == kFloat ? convolve_float : type == kHalf ? convolve_half : convolve_bfloat;
    check_launch(launch(s, last, kernel, mode, stream));
}

// y = act(x conv W_n + bias + residual), W_n = diag(lam_n) W0 + P Phi_n R^T
Tensor depthwise(const Tensor& input,             // [N, C, H, W]
                 const Tensor& weight,            // [C, 1, k, k]
                 const OptionalTensor& p,         // [C, L_k]
                 const OptionalTensor& phi,       // [N, L_k, L_k]
                 const OptionalTensor& r,         // [k * k, L_k]
                 const OptionalTensor& lam,       // [N, C]
                 const OptionalTensor& bias,      // [C] or [N, C]
                 const OptionalTensor& residual,  // [N, C, H', W']
                 const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t activation) {
    const DepthwiseShape shape = check_depthwise(input, weight, p, phi, r, lam, stride, padding, dilation);
    check_activation(activation);
    check_operands(input, "input", {{"bias", bias, true}, {"residual", residual}});
    check_bias(bias, input.size(0), weight.size(0));
    if (residual) check_like(*residual, "residual", shape.out_sizes);
    check_supported(input, weight, shape, stride, padding, dilation);
    const DeviceGuard guard(input.get_device_index());
    const bool last = is_channels_last(input);
    const Tensor output = empty_map(shape.out_sizes, last, input.scalar_type());
    if (output.numel() == 0) return output;
    const Held held(weight, p, phi, r, lam);
    const OptionalTensor bias_ = packed(bias);
    ConvolveParams s{};
    s.batch = input.size(0), s.channels = static_cast<int>(input.size(1));
    s.pad_rows = static_cast<int>(padding[0]), s.pad_columns = static_cast<int>(padding[1]);
    s.factors = held.factors(shape.latent, false);
    s.input = image_of(input, "input"), s.output = image_of(output, "the output");
    if (residual) s.residual = image_of(*residual, "residual");
    s.bias = parameter(bias_), s.bias_sample = bias && bias->dim() == 2 ? weight.size(0) : 0;
    s.activation = static_cast<int>(activation);
    start_convolve(s, type_code(input.scalar_type()), last, static_cast<int>(weight.size(2)),
                   stride[0] == 1 ? kSame : kDown, stream_of(input));
    return output;
}

// Partial sums in one allocation, and where each goes in the end.
class Partials {
  public:
    explicit Partials(ReduceParams* reductions) : reductions_(reductions) {}
    // `gradient` [size] = the sum of `count` of its size; nothing for an empty one.
    void add(float** place, const Tensor& gradient, int64_t count) {
        if (gradient.numel() == 0) return;
        reductions_->each[reductions_->used++] = {nullptr,
                                                  gradient.numel(),
                                                  static_cast<int>(count),
                                                  gradient.mutable_data_ptr(),
                                                  type_code(gradient.scalar_type()),
                                                  0};
        places_.push_back(place);
        elements_ += count * gradient.numel();
    }
    Tensor allocate() {
        const Tensor memory = empty_dense({elements_}, ScalarType::Float);
        float* next = static_cast<float*>(memory.mutable_data_ptr());
        for (size_t i = 0; i < places_.size(); ++i) {
            Reduction& r = reductions_->each[i];
            r.from = *places_[i] = next;
            next += r.count * r.size;
        }
        return memory;
    }

  private:
    ReduceParams* reductions_;
    std::vector<float**> places_;
    int64_t elements_ = 0;
};

// The gradients of the parameters; an empty tensor is one that nobody asked for.
void start_sums(SumsParams& s, int type, bool last, int kernel, Mode mode, const Tensor& d_weight,
                const Tensor& d_p, const Tensor& d_phi, const Tensor& d_r, const Tensor& d_lam,
                void* stream) {
    with_arrangement(type, last, [&](auto zero, auto order) {
        plan_sums<decltype(zero), decltype(order)::value>(s, mode, kernel);
    });
    const int64_t groups = s.tiling.groups.divisor, splits = int64_t{s.sample_splits} * s.tile_splits;
    STD_TORCH_CHECK(static_cast<double>(splits) * static_cast<double>(groups) <= kBlocksEnd,
                    "input has too many channels for one launch of the CUDA depthwise kernels: ", s.channels);
    ReduceParams reductions{};
    Partials partials(&reductions);
    partials.add(&s.d_weight, d_weight, splits);
    partials.add(&s.d_p, d_p, splits);
    partials.add(&s.d_phi, d_phi, s.tile_splits * groups);
    partials.add(&s.d_r, d_r, splits * groups);
    partials.add(&s.d_lam, d_lam, s.tile_splits);
    if (reductions.used == 0) return;
    const Tensor memory = partials.allocate();
    const auto launch = type == kFloat ? sums_float : type == kHalf ? sums_half : sums_bfloat;
    check_launch(launch(s, last, kernel, mode, stream));
    check_launch(reduce(reductions, stream));
}

// Given G = dy behind the activation; bit i of `needs` asks for return i.
SixTensors depthwise_backward(const Tensor& grad,         // [N, C, H', W']
                              const Tensor& input,        // [N, C, H, W]
                              const Tensor& weight,       // [C, 1, k, k]
                              const OptionalTensor& p,    // [C, L_k]
                              const OptionalTensor& phi,  // [N, L_k, L_k]
                              const OptionalTensor& r,    // [k * k, L_k]
                              const OptionalTensor& lam,  // [N, C]
                              const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                              int64_t needs) {
    const DepthwiseShape shape = check_depthwise(input, weight, p, phi, r, lam, stride, padding, dilation);
    check_operands(input, "input", {{"grad", grad, true}});
    check_like(grad, "grad", shape.out_sizes);
    check_supported(input, weight, shape, stride, padding, dilation);
    const DeviceGuard guard(input.get_device_index());
    const bool last = is_channels_last(input);
    const ScalarType type = input.scalar_type();
    // unwanted ones have the type that is computed in, as on the CPU
    const Gradients wanted{needs, ScalarType::Float, grad.numel() == 0};
    const auto typed = [&](const OptionalTensor& like) {
        return Gradients{needs, like ? like->scalar_type() : ScalarType::Float, wanted.all_zero};
    };
    const Tensor d_input = typed(input).map(0, input, last), d_weight = typed(weight).dense(1, weight);
    const Tensor d_p = typed(p).dense(2, p), d_phi = typed(phi).dense(3, phi), d_r = typed(r).dense(4, r);
    const Tensor d_lam = typed(lam).dense(5, lam);
    const auto all = std::make_tuple(d_input, d_weight, d_p, d_phi, d_r, d_lam);
    if (wanted.all_zero) return all;
    // in the input's layout, for a gradient in another one is read an element at a time
    const Tensor g = as_map(grad, last, type);
    const Held held(weight, p, phi, r, lam);
    const int kernel = static_cast<int>(weight.size(2)), code = type_code(type);
    void* stream = stream_of(input);
    if (d_input.numel()) {
        ConvolveParams s{};
        s.batch = input.size(0), s.channels = static_cast<int>(input.size(1));
        s.pad_rows = static_cast<int>(padding[0]), s.pad_columns = static_cast<int>(padding[1]);
        s.factors = held.factors(shape.latent, false);
        s.input = image_of(g, "grad"), s.output = image_of(d_input, "the gradient of input");
        const Mode mode = transpose(s, kernel, static_cast<int>(stride[0]));
        start_convolve(s, code, last, kernel, mode, stream);
    }
    SumsParams s{};
    s.batch = input.size(0), s.channels = static_cast<int>(input.size(1));
    s.pad_rows = static_cast<int>(padding[0]), s.pad_columns = static_cast<int>(padding[1]);
    s.factors = held.factors(shape.latent, false);
    s.input = image_of(input, "input"), s.grad = image_of(g, "grad");
    start_sums(s, code, last, kernel, stride[0] == 1 ? kSame : kDown, d_weight, d_p, d_phi, d_r, d_lam,
               stream);
    return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CUDA, m) {
    m.impl("depthwise", TORCH_BOX(&depthwise));
    m.impl("depthwise_backward", TORCH_BOX(&depthwise_backward));
}

}  // namespace dcd
