// SPDX-License-Identifier: BSD-3-Clause
// Depthwise convolution with weights of one's own for every sample,
//   y[n, o] = act(W_n[o] * x[n, o / m] + bias + residual)
//   W_n[o, t] = lam[n, o] W0[o, t] + (P Phi_n R^T)[o, t]
// (paper Eq. 8, t runs over the kernel's taps). Phi_n R^T is formed once a task, the taps of a channel when
// its turn comes; nothing of size N x Co x taps exists. Two arrangements of the lanes: along the width
// (depthwise_planes.h) and, where neighbouring elements are channels, along the channels (depthwise_last.h).
// Taps with little but padding between them take neither (depthwise_far.h).
// The gradient of the input runs through all of them, see depthwise_grad.h.
#pragma once

#include "depthwise_far.h"
#include "depthwise_last.h"
#include "depthwise_planes.h"

namespace dcd::DCD_ISA {
namespace dw {

// Whether a plane of this size is one run of elements.
static inline bool contiguous(const int64_t* size, const int64_t* stride) {
    return unit(size[2], stride[2]) && (size[1] <= 1 || stride[1] == size[2]) &&
           (size[0] <= 1 || stride[0] == size[1] * size[2]);
}

template <class S>
static void convolve(const Conv<typename S::Scalar>& s, const Runtime& runtime) {
    const bool last = s.channels > 1 && s.multiplier == 1 && s.input_channel == 1 && s.output_channel == 1 &&
                      (!s.residual || s.residual_channel == 1) &&
                      !(s.in_size[2] > 1 && s.input_spatial[2] == 1);
    // Small enough for W planes to stay in L1, and of enough channels to fill the lanes better than a row
    // would.
    const bool narrow = s.multiplier == 1 && s.out_size[2] <= S::kLanes / 2 && s.channels >= S::kLanes &&
                        s.in_size[0] * s.in_size[1] * s.in_size[2] <= 256 &&
                        contiguous(s.in_size, s.input_spatial) && contiguous(s.out_size, s.output_spatial) &&
                        (!s.residual || contiguous(s.out_size, s.residual_spatial));
    if (last)
        channels_last<S>(s, runtime);
    else if (narrow)
        narrow_planes<S>(s, runtime);
    else if (Window<S>(s).sparse)
        far_taps<S>(s, runtime);
    else
        planes<S>(s, runtime);
}

}  // namespace dw

template <class S>
static void depthwise(const DepthwiseParams<typename S::Scalar>& s, const Runtime& runtime) {
    dw::convolve<S>(dw::all_taps(s), runtime);
}

}  // namespace dcd::DCD_ISA

#include "depthwise_grad.h"
