// SPDX-License-Identifier: BSD-3-Clause
// Everything that an instruction set offers.
#pragma once

#include "../kernels.h"
#include "apply.h"
#include "branch.h"
#include "branch_grad.h"
#include "channel_sums.h"
#include "depthwise.h"
#include "latent_map_grad.h"
#include "moments_grad.h"
#include "norm_act.h"
#include "pointwise.h"
#include "pointwise_grad.h"
#include "quadrants_grad.h"

namespace dcd::DCD_ISA {

template <class S>
constexpr Kernels<typename S::Scalar> all_kernels() {
    return {tile_sizes<S>(),    &pointwise<S>,    &pointwise_grad<S>, &apply<S>,          &apply_grad<S>,
            &moments<S>,        &moments_grad<S>, &depthwise<S>,      &depthwise_grad<S>, &channel_sums<S>,
            &quadrants_grad<S>, &branch<S>,       &branch_grad<S>,    &latent_map<S>,     &latent_map_grad<S>,
            &norm_act<S>,       &norm_act_grad<S>};
}

}  // namespace dcd::DCD_ISA
