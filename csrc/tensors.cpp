// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

namespace dcd {
namespace {

// This file is in both libraries: the checks and allocations are the same, but for the device.
#ifdef DCD_CUDA_LIBRARY
constexpr const char* kDevice = "on a CUDA device";
bool is_here(const Tensor& t) {
    return t.is_cuda();
}
int32_t device_type() {
    return aoti_torch_device_type_cuda();
}
#else
constexpr const char* kDevice = "on the CPU";
bool is_here(const Tensor& t) {
    return t.is_cpu();
}
int32_t device_type() {
    return aoti_torch_device_type_cpu();
}
std::atomic<bool> poison{false};
#endif

std::string text(const int64_t* sizes, size_t count) {
    std::string s = "(";
    for (size_t i = 0; i < count; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
    return s + (count == 1 ? ",)" : ")");
}

std::string text(const Tensor& t) {
    return text(t.sizes().data(), t.sizes().size());
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType type) {
    int32_t device = 0;
#ifdef DCD_CUDA_LIBRARY
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));  // the op guards its input's
#endif
    const int32_t dtype = type == ScalarType::Double     ? aoti_torch_dtype_float64()
                          : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                          : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                         : aoti_torch_dtype_float32();
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                    strides.data(), dtype, device_type(), device, &handle));
    Tensor result(handle);
#ifndef DCD_CUDA_LIBRARY
    if (poison && result.numel() > 0) {
        const int64_t count = result.numel();
        if (type == ScalarType::Double)
            std::fill_n(static_cast<double*>(result.mutable_data_ptr()), count,
                        std::numeric_limits<double>::quiet_NaN());
        else if (type == ScalarType::Float)
            std::fill_n(static_cast<float*>(result.mutable_data_ptr()), count,
                        std::numeric_limits<float>::quiet_NaN());
        else if (type == ScalarType::BFloat16)
            std::fill_n(static_cast<uint16_t*>(result.mutable_data_ptr()), count, uint16_t(0x7fc0));
    }
#endif
    return result;
}

// Whether dimensions 2… are one run of equally spaced pixels; `pixel` is their distance.
bool collapses(const Tensor& t, int64_t* pixel) {
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    int64_t expected = -1;
    *pixel = 1;
    for (int64_t d = t.dim() - 1; d >= 2; --d) {
        if (sizes[d] == 1) continue;
        if (expected < 0)
            *pixel = strides[d];
        else if (strides[d] != expected)
            return false;
        expected = strides[d] * sizes[d];
    }
    return true;
}

bool fits(const Tensor& t, bool channels_last) {
    int64_t pixel;
    if (!collapses(t, &pixel)) return false;
    const bool one_channel = t.size(1) == 1, one_pixel = pixels_of(t) == 1;
    if (channels_last) return (one_channel || t.stride(1) == 1) && (one_pixel || pixel >= t.size(1));
    return one_pixel || pixel == 1;
}

}  // namespace

ScalarType compute_type(const Tensor& input) {
    const ScalarType type = input.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                        type == ScalarType::BFloat16,
                    "input must be float32, float64, float16 or bfloat16, got ",
                    torch::headeronly::toString(type));
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    const auto got = tensor.sizes();
    STD_TORCH_CHECK(got.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), got.begin()), name,
                    " must have shape ", text(sizes.begin(), sizes.size()), ", got ", text(tensor));
}

Tensor in_type(const Tensor& tensor, ScalarType type) {
    return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

Tensor in_type_of(const Tensor& tensor, const OptionalTensor& like) {
    return like ? in_type(tensor, like->scalar_type()) : tensor;
}

Tensor dense(const Tensor& tensor, ScalarType type) {
    const Tensor typed = in_type(tensor, type);
    return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

OptionalTensor dense(const OptionalTensor& tensor, ScalarType type) {
    return tensor ? OptionalTensor(dense(*tensor, type)) : std::nullopt;
}

bool is_channels_last(const Tensor& input) {
    return !input.is_contiguous() && input.stride(1) == 1 && input.size(1) > 1;
}

Tensor empty_map(const std::vector<int64_t>& sizes, bool channels_last, ScalarType type) {
    if (!channels_last) return empty_dense(sizes, type);
    std::vector<int64_t> strides(sizes.size());
    int64_t next = sizes[1];
    for (size_t d = sizes.size(); d-- > 2;) {
        strides[d] = next;
        next *= std::max<int64_t>(sizes[d], 1);
    }
    strides[1] = 1;
    strides[0] = next;
    return empty_strided(sizes, strides, type);
}

Tensor empty_dense(const std::vector<int64_t>& sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size());
    int64_t next = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
        strides[d] = next;
        next *= std::max<int64_t>(sizes[d], 1);
    }
    return empty_strided(sizes, strides, type);
}

Tensor nothing(ScalarType type) {
    return empty_dense({0}, type);
}

Tensor as_map(const Tensor& tensor, bool channels_last, ScalarType type) {
    const Tensor typed = in_type(tensor, type);
    if (fits(typed, channels_last)) return typed;
    Tensor copy = empty_map(sizes_of(typed), channels_last, type);
    torch::stable::copy_(copy, typed);
    return copy;
}

Strides map_strides(const Tensor& tensor) {
    int64_t pixel;
    collapses(tensor, &pixel);
    return {tensor.stride(0), tensor.stride(1), pixel};
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return {sizes.begin(), sizes.end()};
}

int64_t pixels_of(const Tensor& tensor) {
    int64_t pixels = 1;
    for (int64_t d = 2; d < tensor.dim(); ++d) pixels *= tensor.size(d);
    return pixels;
}

#ifndef DCD_CUDA_LIBRARY
Runtime torch_runtime() {
    const auto pool = [](int64_t begin, int64_t end, Runtime::Body body, void* context) {
        TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, 1, body, context));
    };
    return {pool, static_cast<int64_t>(torch::stable::get_num_threads())};
}

void poison_outputs(bool on) {
    poison = on;
    poison_scratch(on);
}
#endif

LatentShape check_latent(const OptionalTensor& p, const OptionalTensor& phi, const OptionalTensor& q,
                         int64_t batch, int64_t in_channels, int64_t out_channels, bool q_optional) {
    LatentShape shape;
    if (!p && !phi && !q) return shape;
    STD_TORCH_CHECK(p && phi && (q || q_optional), "p, phi and q go together: give all three or none");
    STD_TORCH_CHECK(p->dim() == 2, "p must have shape (out_channels, latent_channels), got ", text(*p));
    shape.latent = p->size(1);
    check_sizes(*p, "p", {out_channels, shape.latent});
    if (!q) {
        check_sizes(*phi, "phi", {batch, shape.latent, in_channels});
        return shape;
    }
    check_sizes(*q, "q", {in_channels, shape.latent});
    if (phi->dim() == 4) {
        shape.blocks = phi->size(1);
        check_sizes(*phi, "phi", {batch, shape.blocks, shape.latent, shape.latent});
        STD_TORCH_CHECK(
            shape.blocks > 0 && in_channels % shape.blocks == 0 && out_channels % shape.blocks == 0,
            "phi has ", shape.blocks, " blocks, which must divide in_channels ", in_channels,
            " and out_channels ", out_channels);
    } else {
        check_sizes(*phi, "phi", {batch, shape.latent, shape.latent});
    }
    return shape;
}

void check_lam(const OptionalTensor& lam, int64_t batch, int64_t out_channels) {
    if (lam) check_sizes(*lam, "lam", {batch, out_channels});
}

void check_bias(const OptionalTensor& bias, int64_t batch, int64_t out_channels) {
    if (!bias) return;
    if (bias->dim() == 1)
        check_sizes(*bias, "bias", {out_channels});
    else
        check_sizes(*bias, "bias", {batch, out_channels});
}

void check_operands(const Tensor& image, const char* image_name, const std::vector<Operand>& operands) {
    STD_TORCH_CHECK(is_here(image), image_name, " must be ", kDevice);
    compute_type(image);
    const ScalarType type = image.scalar_type();
    const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
    for (const auto& [name, tensor, may_be_single] : operands) {
        if (!tensor) continue;
        STD_TORCH_CHECK(is_here(*tensor), name, " must be ", kDevice, " like ", image_name);
#ifdef DCD_CUDA_LIBRARY
        STD_TORCH_CHECK(tensor->get_device_index() == image.get_device_index(), name,
                        " must be on the device of ", image_name, ", number ", image.get_device_index(),
                        ", got ", tensor->get_device_index());
#endif
        const ScalarType own = tensor->scalar_type();
        STD_TORCH_CHECK(own == type || (half && may_be_single && own == ScalarType::Float), name,
                        " must have the dtype of ", image_name, ", ", torch::headeronly::toString(type),
                        half && may_be_single ? ", or Float" : "", ", got ",
                        torch::headeronly::toString(own));
    }
}

void check_activation(int64_t activation) {
    STD_TORCH_CHECK(activation >= kNone && activation <= kHardswish, "activation must be a code from ",
                    static_cast<int>(kNone), " to ", static_cast<int>(kHardswish), ", got ", activation);
}

void check_rank(const Tensor& tensor, const char* name, int64_t rank, bool exact) {
    STD_TORCH_CHECK(exact ? tensor.dim() == rank : tensor.dim() >= rank, name, " must have ",
                    exact ? "" : "at least ", rank, " dimensions, got shape ", text(tensor));
}

void check_like(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    STD_TORCH_CHECK(sizes_of(tensor) == sizes, name, " must have shape ", text(sizes.data(), sizes.size()),
                    ", got ", text(tensor));
}

Tensor Gradients::map(int i, const Tensor& like, bool channels_last) const {
    if (!(needs >> i & 1)) return nothing(type);
    Tensor result = empty_map(sizes_of(like), channels_last, type);
    return all_zero ? torch::stable::zero_(result) : result;
}

Tensor Gradients::dense(int i, const OptionalTensor& like) const {
    if (!like || !(needs >> i & 1)) return nothing(type);
    Tensor result = empty_dense(sizes_of(*like), type);
    return all_zero ? torch::stable::zero_(result) : result;
}

}  // namespace dcd
