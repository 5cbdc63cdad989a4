// SPDX-License-Identifier: BSD-3-Clause
#include "float32_precision.h"

#include <dlfcn.h>

#include "cpu/mixed.h"

namespace dcd {
namespace {

// at::Float32MatmulPrecision: 0 highest, 1 high, 2 medium. The stable ABI has no way to ask, so the two
// functions that torch exports are looked up by name; where they are missing, the answer is the strictest.
int float32_matmul_precision() {
    using GlobalContext = void* (*)();
    using Precision = int (*)(const void*);
    static const auto context =
        reinterpret_cast<GlobalContext>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
    static const auto precision =
        reinterpret_cast<Precision>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context22float32MatmulPrecisionEv"));
    if (!context || !precision) return 0;
    try {
        return precision(context());
    } catch (...) {  // torch's older and newer settings contradict each other
        return 0;
    }
}

}  // namespace

bool splits_float32() {
    if (!mixed_kernels().single) return false;
    const int precision = float32_matmul_precision();
    return precision == 1 || precision == 2;
}

}  // namespace dcd
