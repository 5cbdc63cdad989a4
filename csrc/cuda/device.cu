// SPDX-License-Identifier: BSD-3-Clause
#include "device.h"

namespace dcd::cuda {

int use_device(int index) {
    return static_cast<int>(cudaSetDevice(index));
}

const char* error_text(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace dcd::cuda
