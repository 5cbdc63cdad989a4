// SPDX-License-Identifier: BSD-3-Clause
// ops_cuda_depthwise.cpp as it is, on CPU tensors: the device, its stream and its launches are replaced, and
// the op takes the place of the CPU's own. Whatever the op checks, allocates and hands to the kernels is
// rehearsed.
#include <torch/csrc/stable/accelerator.h>

#include "depthwise_checks.h"
#include "depthwise_run.h"

namespace torch::stable::no_accelerator {
struct DeviceGuard {
    explicit DeviceGuard(int) {}
};
}  // namespace torch::stable::no_accelerator

namespace {
AOTITorchError device_of_tests(int32_t* index) {
    *index = 0;
    return 0;
}
AOTITorchError stream_of_tests(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
}  // namespace

// after torch's own headers, which need the real ones
#define CUDA CPU
#define accelerator no_accelerator
#define is_cuda is_cpu
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_get_current_device_index device_of_tests
#define aoti_torch_get_current_cuda_stream stream_of_tests

#include "cuda/ops_cuda_depthwise.cpp"
#include "tensors.cpp"

namespace dcd::cuda::dw {

bool last_thread_first = false;
void check_read(const void* from, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % bytes) throw std::runtime_error("a read is not aligned");
}
void check_write(const void* to, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes) throw std::runtime_error("a write is not aligned");
}

namespace {

int convolve_any(const ConvolveParams& s, int type, bool last, int kernel, Mode mode) {
    choose(type, last, kernel, [&](auto zero, auto order, auto k) {
        run_convolve<decltype(zero), decltype(order)::value, decltype(k)::value>(s, mode);
    });
    return 0;
}

int sums_any(const SumsParams& s, int type, bool last, int kernel, Mode mode) {
    choose(type, last, kernel, [&](auto zero, auto order, auto k) {
        run_sums<decltype(zero), decltype(order)::value, decltype(k)::value>(s, mode);
    });
    return 0;
}

}  // namespace

int convolve_float(const ConvolveParams& s, bool last, int kernel, Mode mode, void*) {
    return convolve_any(s, kFloat, last, kernel, mode);
}
int convolve_half(const ConvolveParams& s, bool last, int kernel, Mode mode, void*) {
    return convolve_any(s, kHalf, last, kernel, mode);
}
int convolve_bfloat(const ConvolveParams& s, bool last, int kernel, Mode mode, void*) {
    return convolve_any(s, kBFloat, last, kernel, mode);
}
int sums_float(const SumsParams& s, bool last, int kernel, Mode mode, void*) {
    return sums_any(s, kFloat, last, kernel, mode);
}
int sums_half(const SumsParams& s, bool last, int kernel, Mode mode, void*) {
    return sums_any(s, kHalf, last, kernel, mode);
}
int sums_bfloat(const SumsParams& s, bool last, int kernel, Mode mode, void*) {
    return sums_any(s, kBFloat, last, kernel, mode);
}
int reduce(ReduceParams s, void*) {
    run_reduce(s);
    return 0;
}
}  // namespace dcd::cuda::dw

namespace dcd::cuda {

int use_device(int) {
    return 0;
}
const char* error_text(int) {
    return "no error";
}

}  // namespace dcd::cuda
