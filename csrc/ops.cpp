// SPDX-License-Identifier: BSD-3-Clause
// The ops without a file of their own: the CPU kernels' instruction set, the tests' poison.
#include <string>

#include "float32_precision.h"
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

std::string cpu_products() {
    return name_of(products());
}

std::string cpu_products_obstacle(const std::string& name) {
    for (int i = 0; i < kProducts; ++i)
        if (name == name_of(static_cast<Products>(i))) return obstacle(static_cast<Products>(i));
    STD_TORCH_CHECK(false, "name must be that of a way to multiply bf16, got '", name, "'");
}

void set_cpu_products(const std::string& name) {
    STD_TORCH_CHECK(set_products(name.c_str()),
                    "name must be empty or that of a way to multiply bf16 that this CPU supports, got '",
                    name, "'");
}

bool cpu_splits_float32() {
    return splits_float32();
}

void poison(bool on) {
    poison_outputs(on);
}

}  // namespace

STABLE_TORCH_LIBRARY(dcd_kernels, m) {
    m.def("cpu_isa() -> str");
    m.def("set_cpu_isa(str isa) -> ()");
    m.def("has_cpu_isa(str isa) -> bool");
    // How bf16 is multiplied, why not in another way, whether fp32 is split into it; for tests: another way.
    m.def("cpu_products() -> str");
    m.def("cpu_products_obstacle(str name) -> str");
    m.def("cpu_splits_float32() -> bool");
    m.def("_set_cpu_products(str name) -> ()");
    m.def("_poison(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
    m.impl("has_cpu_isa", TORCH_BOX(&has_cpu_isa));
    m.impl("cpu_products", TORCH_BOX(&cpu_products));
    m.impl("cpu_products_obstacle", TORCH_BOX(&cpu_products_obstacle));
    m.impl("cpu_splits_float32", TORCH_BOX(&cpu_splits_float32));
    m.impl("_set_cpu_products", TORCH_BOX(&set_cpu_products));
    m.impl("_poison", TORCH_BOX(&poison));
}

}  // namespace dcd
