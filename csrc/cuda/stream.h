// SPDX-License-Identifier: BSD-3-Clause
// Where a kernel is started.
#pragma once

#include "../tensors.h"
#include "device.h"

namespace dcd {

// The current stream of the device of `tensor`, which is made this library's current device.
inline void* stream_of(const Tensor& tensor) {
    const int code = cuda::use_device(tensor.get_device_index());
    STD_TORCH_CHECK(code == 0, "device ", tensor.get_device_index(),
                    " cannot be used: ", cuda::error_text(code));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return stream;
}

}  // namespace dcd
