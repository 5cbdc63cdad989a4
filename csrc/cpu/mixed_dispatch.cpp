// SPDX-License-Identifier: BSD-3-Clause
// Chooses how bf16 is multiplied: AMX where CPU and kernel grant it, vdpbf16ps where it is fast, else fp32.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "mixed.h"

#if defined(DCD_BF16)
#    include <cpuid.h>
#    if defined(__linux__)
#        include <sys/syscall.h>
#        include <unistd.h>
#    endif
#endif

namespace dcd {
namespace {

#if defined(DCD_BF16)
// Feature bits of cpuid: leaf 7 EDX, leaf 7.1 EAX, leaf 1 ECX.
constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5, kOsSavesState = 1u << 27;

// Tile registers are 8 kB of state that Linux saves only for a process that has asked for it.
const char* amx_obstacle() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxTile)) return "this CPU has no amx-tile";
    if (!(d & kAmxBf16)) return "this CPU has no amx-bf16";
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSavesState)) return "the system does not save AVX state";
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;
    if ((low & (kTileConfig | kTileData)) != (kTileConfig | kTileData))
        return "the system does not save AMX tiles";
#    if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileDataFeature = 18;  // asm/prctl.h, since Linux 5.16
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature))
        return "Linux refused the use of AMX tiles (arch_prctl)";
#    else
    return "AMX is used on Linux only";
#    endif
    return "";
}

bool dot_products_usable() {
    unsigned a, b, c, d;
    return supports_instruction_set("avx512") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
}

// Measured: on Zen 5 vdpbf16ps multiplies twice as fast as fp32 FMA, on a Xeon with AMX half as fast.
bool dot_products_fast() {
    return __builtin_cpu_is("amd");
}
#endif

bool uses_avx512() {
    return !std::strcmp(instruction_set(), "avx512");
}

std::atomic<int>& forced() {
    static std::atomic<int> choice{-1};
    return choice;
}

bool supported(Products products) {
    switch (products) {
        case Products::kWidened:
            return true;
#if defined(DCD_BF16)
        case Products::kAmx: {
            static const bool able = dot_products_usable() && !*amx_obstacle();
            return able;
        }
        case Products::kAvx512Bf16:
        case Products::kAmxEmulated: {
            static const bool able = dot_products_usable();
            return able;
        }
#endif
        default:
            return false;
    }
}

}  // namespace

#if defined(DCD_BF16)
namespace amx {
extern const MixedKernels mixed;
}
namespace avx512_bf16 {
extern const MixedKernels mixed;
void run_network_bf16(const NetworkCall&, const Runtime&);
}  // namespace avx512_bf16
namespace amx_emulated {
extern const MixedKernels mixed;
}
#endif

const char* name_of(Products products) {
    static const char* const names[kProducts] = {"amx", "avx512_bf16", "widened", "amx_emulated"};
    return names[static_cast<int>(products)];
}

const char* obstacle(Products products) {
#if defined(DCD_BF16)
    const char* const lower = "the instruction set in use is not avx512";
    switch (products) {
        case Products::kAmx: {
            static const char* const reason = amx_obstacle();
            if (*reason) return reason;
            if (!supported(products)) return "this CPU has no avx512_bf16";
            return uses_avx512() ? "" : lower;
        }
        case Products::kAvx512Bf16:
            if (!supported(products)) return "this CPU has no avx512_bf16";
            if (!dot_products_fast()) return "vdpbf16ps is slower than fp32 on this CPU";
            return uses_avx512() ? "" : lower;
        case Products::kAmxEmulated:
            return "for tests only";
        default:
            return "";
    }
#else
    return products == Products::kWidened ? "" : "not built: no x86 CPU, or a compiler without -mamx-bf16";
#endif
}

Products products() {
    const int choice = forced();
    if (choice >= 0) return static_cast<Products>(choice);
    for (int i = 0; i < kProducts; ++i)
        if (!*obstacle(static_cast<Products>(i))) return static_cast<Products>(i);
    return Products::kWidened;
}

bool set_products(const char* name) {
    if (!*name) {
        forced() = -1;
        return true;
    }
    for (int i = 0; i < kProducts; ++i)
        if (!std::strcmp(name, name_of(static_cast<Products>(i))) && supported(static_cast<Products>(i))) {
            forced() = i;
            return true;
        }
    return false;
}

const MixedKernels& mixed_kernels() {
    switch (products()) {
#if defined(DCD_BF16)
        case Products::kAmx:
            return amx::mixed;
        case Products::kAvx512Bf16:
            return avx512_bf16::mixed;
        case Products::kAmxEmulated:
            return amx_emulated::mixed;
#endif
        default:
            return widened_kernels();
    }
}

void run_network_bf16(const NetworkCall& call, const Runtime& runtime) {
#if defined(DCD_BF16)
    if (products() == Products::kAvx512Bf16) return avx512_bf16::run_network_bf16(call, runtime);
#endif
    run_widened_network(call, runtime);  // tiles of AMX have no kernel of whole networks
}

}  // namespace dcd
