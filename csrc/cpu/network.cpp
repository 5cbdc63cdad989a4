// SPDX-License-Identifier: BSD-3-Clause
#include "../network.h"

namespace dcd {

int64_t window_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1 + stride) / stride;
}

int64_t latent_size(const NetworkStep& step, int64_t height, int64_t width) {
    return step.kind == kDense ? 2 * planes_of(step.latent) * kBlock * height * width : 0;
}

}  // namespace dcd
