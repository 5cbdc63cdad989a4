// SPDX-License-Identifier: BSD-3-Clause
// The ops without a file of their own: the CPU kernels' instruction set, the tests' poison.
#include <string>

#include "tensors.h"

namespace dcd {
namespace {

std::string cpu_isa() {
    return instruction_set();
}

void set_cpu_isa(const std::string& isa) {
    STD_TORCH_CHECK(set_instruction_set(isa.c_str()),
                    "isa must be one that this CPU and this build support, got '", isa, "'");
}

bool has_cpu_isa(const std::string& isa) {
    return supports_instruction_set(isa.c_str());
}

void poison(bool on) {
    poison_outputs(on);
}

}  // namespace

STABLE_TORCH_LIBRARY(dcd_kernels, m) {
    m.def("cpu_isa() -> str");
    m.def("set_cpu_isa(str isa) -> ()");
    m.def("has_cpu_isa(str isa) -> bool");
    m.def("_poison(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
    m.impl("has_cpu_isa", TORCH_BOX(&has_cpu_isa));
    m.impl("_poison", TORCH_BOX(&poison));
}

}  // namespace dcd
