// SPDX-License-Identifier: BSD-3-Clause
#include "../network.h"

namespace dcd {

int64_t window_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1 + stride) / stride;
}

int64_t latent_size(const NetworkStep& step, const NetworkPlace& input, const NetworkPlace& output) {
    if (step.kind != kDense || !step.latent) return 0;
    const int64_t wide = planes_of(step.latent) * kBlock, pixels = output.height * output.width;
    if (!step.latent_kernel) return 2 * step.blocks * wide * pixels;
    const int64_t filters = step.kernel_h * step.kernel_w * step.latent;
    return wide *
           (filters + (input.height + 2 * step.padding_h) * (input.width + 2 * step.padding_w) + pixels);
}

}  // namespace dcd
