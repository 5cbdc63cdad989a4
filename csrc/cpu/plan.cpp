// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>

namespace dcd {

ResidualCost residual_cost(int64_t in_channels, int64_t out_channels, int64_t latent, int64_t blocks,
                           int64_t pixels) {
    const int64_t product = out_channels * in_channels;
    return {product / blocks * latent + std::min(out_channels, in_channels) * latent * latent + product,
            pixels * (latent * (in_channels + out_channels) + blocks * latent * latent)};
}

}  // namespace dcd
