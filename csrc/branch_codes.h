// SPDX-License-Identifier: BSD-3-Clause
// The codes that dcd_kernels::branch takes.
#pragma once

namespace dcd {

// Between the two FCs. The first five are the codes of Activation; kGateSE has a matrix of its own.
enum Gate : int { kGateNone = 0, kGateRelu, kGateRelu6, kGateSilu, kGateHardswish, kGateSE, kGateEnd };

enum LamActivation : int {
    kLamOnePlus = 0,
    kLamHardsigmoid2,
    kLamSigmoid2,
    kLamHardsigmoid,
    kLamSigmoid,
    kLamEnd
};

}  // namespace dcd
