// SPDX-License-Identifier: BSD-3-Clause
// From torch's tensors to the plain pointers and strides of cpu/params.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace dcd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A tensor beside the one that sets the type and the device. lam, phi and bias may be fp32 beside half
// precision.
struct Operand {
    const char* name;
    OptionalTensor tensor;
    bool may_be_single = false;
};

// Raises unless every given operand is on the device of `image` and of its type, or fp32 where that is
// allowed.
void check_operands(const Tensor& image, const char* image_name, const std::vector<Operand>& operands);
void check_activation(int64_t activation);
// Raises unless `tensor` has at least `rank` dimensions, or just as many when `exact`.
void check_rank(const Tensor& tensor, const char* name, int64_t rank, bool exact);
// Raises unless the two shapes are the same.
void check_like(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes);

// fp32 and fp64 are computed as they are, half precision in fp32.
ScalarType compute_type(const Tensor& input);

// Raises unless `tensor` has these sizes, naming it, what it has and what it needs.
void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes);

// A parameter: contiguous, of the type that is computed in.
Tensor dense(const Tensor& tensor, ScalarType type);
OptionalTensor dense(const OptionalTensor& tensor, ScalarType type);

// The layout rule of every op: channels-last results for an input that is not contiguous and has its channels
// next to each other.
bool is_channels_last(const Tensor& input);

// Uninitialised (or NaN, see poison_outputs), like `like` but for sizes, layout and type.
Tensor empty_map(const std::vector<int64_t>& sizes, bool channels_last, ScalarType type);
Tensor empty_dense(const std::vector<int64_t>& sizes, ScalarType type);
Tensor nothing(ScalarType type);  // what an op returns for a gradient that was not asked for

// `tensor` itself if its spatial dimensions collapse into one in the given layout and its type is right, else
// a copy that does.
Tensor as_map(const Tensor& tensor, bool channels_last, ScalarType type);

// Strides of a tensor that as_map or empty_map returned.
struct Strides {
    int64_t sample, channel, pixel;
};
Strides map_strides(const Tensor& tensor);

template <class T>
Map<const T> const_map(const Tensor& tensor) {
    const Strides s = map_strides(tensor);
    return {static_cast<const T*>(tensor.const_data_ptr()), s.sample, s.channel, s.pixel};
}

template <class T>
Map<T> mutable_map(const Tensor& tensor) {
    const Strides s = map_strides(tensor);
    return {static_cast<T*>(tensor.mutable_data_ptr()), s.sample, s.channel, s.pixel};
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {
    return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// `tensor` in the type that the caller's tensors have.
Tensor in_type(const Tensor& tensor, ScalarType type);
Tensor in_type_of(const Tensor& tensor, const OptionalTensor& like);

std::vector<int64_t> sizes_of(const Tensor& tensor);
int64_t pixels_of(const Tensor& tensor);  // product of the sizes behind the second

Runtime torch_runtime();

// Tests ask for it, so that an element nobody wrote shows up as NaN.
void poison_outputs(bool on);

// Around every launch, on the calling thread; parallel() does the same on the others.
class LaunchScope {
  public:
    LaunchScope() = default;
    ~LaunchScope() {
        trim_scratch(Scratch::kTask);
        trim_scratch(Scratch::kShared);
    }
    LaunchScope(const LaunchScope&) = delete;
    LaunchScope& operator=(const LaunchScope&) = delete;

  private:
    FlushDenormals flush_;
};

// f(T{}) with T the type computed in: the launch of a kernel.
template <class F>
void with_type(ScalarType type, const F& f) {
    const LaunchScope scope;
    if (type == ScalarType::Double)
        f(double{});
    else
        f(float{});
}

// Where a backward op puts its returns: bit i of `needs` asks for return i, which is else an empty tensor.
struct Gradients {
    int64_t needs;
    ScalarType type;
    bool all_zero;  // no pixel or no sample: every sum is empty
    Tensor map(int i, const Tensor& like, bool channels_last) const;
    Tensor dense(int i, const OptionalTensor& like) const;
};

template <class T>
T* target(const Tensor& gradient) {
    return gradient.numel() ? static_cast<T*>(gradient.mutable_data_ptr()) : nullptr;
}

// What `p`, `phi` and `q` say together.
struct LatentShape {
    int64_t latent = 0, blocks = 1;
};
LatentShape check_latent(const OptionalTensor& p, const OptionalTensor& phi, const OptionalTensor& q,
                         int64_t batch, int64_t in_channels, int64_t out_channels, bool q_optional = false);
void check_lam(const OptionalTensor& lam, int64_t batch, int64_t out_channels);
void check_bias(const OptionalTensor& bias, int64_t batch, int64_t out_channels);

}  // namespace dcd
