// SPDX-License-Identifier: BSD-3-Clause
// A norm of the latent, from the arguments of latent_map and released_layer to what the kernel is told.
#pragma once

#include "tensors.h"

namespace dcd {

struct NormArguments {
    int which;                   // 1 or 2, as the arguments are numbered
    int64_t statistics, groups;  // a code of LatentStatistics; groups of kGroupStatistics
    double eps;
    const OptionalTensor &weight, &bias, &running_mean, &running_var;  // [L]
    bool takes_moments() const { return statistics == kBatchStatistics || statistics == kGroupStatistics; }
};

// The same in the type that is computed in; the pointers must not outlive it.
class DenseNorm {
  public:
    DenseNorm(const NormArguments& norm, ScalarType type)
        : statistics_(static_cast<int>(norm.statistics)),
          groups_(norm.groups),
          eps_(norm.eps),
          weight_(dense(norm.weight, type)),
          bias_(dense(norm.bias, type)),
          running_mean_(dense(norm.running_mean, type)),
          running_var_(dense(norm.running_var, type)) {}

    template <class T>
    LatentNorm<T> pointers() const {
        return {statistics_,
                groups_,
                eps_,
                pointer<T>(weight_),
                pointer<T>(bias_),
                pointer<T>(running_mean_),
                pointer<T>(running_var_)};
    }

  private:
    const int statistics_;
    const int64_t groups_;
    const double eps_;
    const OptionalTensor weight_, bias_, running_mean_, running_var_;
};

}  // namespace dcd
