// SPDX-License-Identifier: BSD-3-Clause
// The pointwise layer with its products in another precision than its sums: bf16 maps, or fp32 maps whose
// products are split into three of bf16. Sums, coefficients and the synthesis of W_n are fp32 throughout.
#pragma once

#include <cstdint>

#include "params.h"

namespace dcd {

struct Bfloat16 {
    uint16_t bits;
};

// T: bf16 or fp32; packed is not read
template <class T>
using MixedParams = PointwiseParams<T, float>;

// What one way of multiplying offers.
struct MixedKernels {
    void (*half)(const MixedParams<Bfloat16>&, const Runtime&);
    void (*single)(const MixedParams<float>&, const Runtime&);  // null: fp32 stays fp32
};

// The ways, best first: name and kernels' namespace, what else it asks of the machine. kWidened is last: bf16
// becomes fp32 in the tile, at every instruction set.
enum class Products : int { kAmx, kAvx512Bf16, kWidened, kAmxEmulated };
constexpr int kProducts = 4;

// mixed_dispatch.cpp
const char* name_of(Products products);
// Why these products cannot run, or are not the ones to take, here and at the instruction set in use; empty
// if they are.
const char* obstacle(Products products);
Products products();  // those in use
// "" for the best there are. Only tests ask for others: false if unknown or not supported by this CPU.
bool set_products(const char* name);
const MixedKernels& mixed_kernels();

}  // namespace dcd
