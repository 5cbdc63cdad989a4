// SPDX-License-Identifier: BSD-3-Clause
// Runs the steps of a network: samples are shared out to the threads, each with a piece of memory of its own;
// where there are fewer samples than threads, every step shares out its own work.
#pragma once

#include <limits>
#include <optional>

#include "depthwise.h"
#include "images.h"
#include "linear.h"
#include "winograd.h"

namespace dcd::DCD_ISA::net {

template <class S>
static bool dense_or_winograd(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    if constexpr (std::is_same_v<Stored<S>, typename S::Scalar>)  // in bf16 there are no Winograd steps
        if (s.winograd) {
            winograd<S>(frame, s, sample);
            return false;
        }
    return dense<S>(frame, s, sample);
}

// One step, for samples [n0, n1) of the frame.
template <class S>
static void step(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t n0, int64_t n1) {
    if (s.kind == kLinear) return linear<S>(frame, s, n0, n1 - n0);
    if (s.kind == kBranch) return branch<S>(frame, s, n0, n1 - n0);
    for (int64_t n = n0; n < n1; ++n) {
        bool pooled = false;
        switch (s.kind) {
            case kStem:
                stem<S>(frame, s, n);
                break;
            case kDense:
                pooled = dense_or_winograd<S>(frame, s, n);
                break;
            case kDepthwise:
                pooled = depthwise<S>(frame, s, n);
                break;
            case kMaxPool:
                max_pool<S>(frame, s, n);
                break;
            case kAdd:
                add<S>(frame, s, n);
                break;
            case kImport:
                import <S>(frame, s, n);
                break;
            case kExport:
                export_<S>(frame, s, n);
                break;
            default:
                break;
        }
        if (s.pooled >= 0 && !pooled)
            pool<S>(frame.image(s.kind == kPool ? s.input : s.output, n), planes_of(s.out_channels), s.bins,
                    frame.vector(s.pooled, n));
    }
}

template <class S>
static void run(const NetworkCall& call, const Runtime& runtime) {
    parallel(runtime, call.shares, [&](int64_t share) {
        Runtime own = runtime;
        if (call.shares > 1) own.threads = 1;
        const int64_t first = share * call.batch / call.shares,
                      samples = (share + 1) * call.batch / call.shares - first;
        const Frame<Stored<S>> frame(call, own, first);
        const NetworkStep *at = call.program.steps, *end = at + call.program.step_count;
        while (at < end) {
            const NetworkStep* next = at;
            while (next < end && next->stage == at->stage) ++next;
            if (next - at == 1) {
                if (!at->streamed) step<S>(frame, *at, 0, samples);
            } else {
                for (int64_t n = 0; n < samples; ++n)
                    for (const NetworkStep* s = at; s < next; ++s)
                        if (!s->streamed) step<S>(frame, *s, n, n + 1);
            }
            at = next;
        }
        trim_scratch(Scratch::kNetwork);
    });
}

}  // namespace dcd::DCD_ISA::net
