// SPDX-License-Identifier: BSD-3-Clause
// Chooses the instruction set once, by cpuid; DCD_KERNELS_ISA or set_instruction_set() can ask for a lower
// one.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace dcd {
namespace {

[[maybe_unused]] bool avx2_usable() {
#if defined(DCD_X86)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

struct InstructionSet {
    const char* name;
    bool usable;
    const Kernels<float>* kernels;
    void (*network)(const NetworkCall&, const Runtime&);
    void (*network_bf16)(const NetworkCall&, const Runtime&);
    const MixedKernels* widened;
};

const InstructionSet* instruction_sets(int* count) {
#define DCD_ROW(name, usable) \
    {#name, usable, &name::kernels_float, &name::run_network, &name::run_network_bf16, &name::mixed},
    static const InstructionSet sets[] = {DCD_INSTRUCTION_SETS(DCD_ROW)};
#undef DCD_ROW
    *count = static_cast<int>(sizeof(sets) / sizeof(sets[0]));
    return sets;
}

const InstructionSet* find(const char* name) {
    int count;
    const InstructionSet* sets = instruction_sets(&count);
    for (int i = 0; i < count; ++i)
        if (sets[i].usable && (!name || !std::strcmp(sets[i].name, name))) return &sets[i];
    return nullptr;
}

std::atomic<const InstructionSet*>& current() {
    static std::atomic<const InstructionSet*> set{[] {
        const char* wanted = std::getenv("DCD_KERNELS_ISA");
        const InstructionSet* found = wanted ? find(wanted) : nullptr;
        return found ? found : find(nullptr);
    }()};
    return set;
}

}  // namespace

const char* instruction_set() {
    return current().load()->name;
}

bool supports_instruction_set(const char* name) {
    return find(name) != nullptr;
}

bool set_instruction_set(const char* name) {
    const InstructionSet* found = find(name);
    if (found) current().store(found);
    return found != nullptr;
}

template <>
const Kernels<float>& kernels<float>() {
    return *current().load()->kernels;
}

template <>
const Kernels<double>& kernels<double>() {
    return baseline::kernels_double;
}

void run_network(const NetworkCall& call, const Runtime& runtime) {
    if (call.program.narrow)
        run_network_bf16(call, runtime);
    else
        current().load()->network(call, runtime);
}

void run_widened_network(const NetworkCall& call, const Runtime& runtime) {
    current().load()->network_bf16(call, runtime);
}

const MixedKernels& widened_kernels() {
    return *current().load()->widened;
}

}  // namespace dcd
