// SPDX-License-Identifier: BSD-3-Clause
// Norms on the latent as an affine map of it (params: ../latent_map.h).
//
// A norm is z -> s (z - M) + beta, s = gamma / sqrt(V + eps). With m, C the moments of Q^T x, b the latent's
// bias:
//   norm 1    of mean m + b and variance diag C                                       gives s1, M1
//   norm 2    of mean Phi m1 and variance diag(Psi C Psi^T),                          gives s2, M2
//             m1 = s1 (m + b - M1) + beta1, Psi = Phi diag(s1)
//   A = diag(s2) Phi + I,  Phi' = A diag(s1),  shift = A (beta1 - s1 (M1 - b)) + beta2 - s2 M2
// All of it in double: means may be a thousand deviations from zero, and where a norm makes the result
// independent of something, its gradient is a sum of terms that cancel. A batch is summed up in the order of
// its samples, whatever the threads.
#pragma once

#include <cmath>

#include "../latent_map.h"
#include "doubles.h"
#include "threads.h"

namespace dcd::DCD_ISA {

static inline bool takes_moments(int statistics) {
    return statistics == kBatchStatistics || statistics == kGroupStatistics;
}

// Consecutive pieces of one allocation, each of whole rows of `width`.
class Rows {
  public:
    Rows(double* memory, int64_t width) : width_(width), next_(memory) {}
    double* take(int64_t rows) {
        double* piece = next_;
        next_ += rows * width_;
        return piece;
    }
    double* zeros(int64_t rows) {
        double* piece = take(rows);
        for (int64_t i = 0; i < rows * width_; ++i) piece[i] = 0;
        return piece;
    }

  private:
    int64_t width_;
    double* next_;
};

static inline Rows rows_of_scratch(int64_t rows, int64_t width, Scratch use) {
    return {static_cast<double*>(scratch(rows * width * static_cast<int64_t>(sizeof(double)), use)), width};
}

// A norm with its statistics, for all samples (row = 0) or for each.
struct FoldedNorm {
    double *scale, *mean, *inverse;  // rows; inverse = 1 / sqrt(V + eps)
    double* bias;                    // one row
    int64_t row;
    const double* scale_of(int64_t n) const { return scale + n * row; }
    const double* mean_of(int64_t n) const { return mean + n * row; }
    const double* inverse_of(int64_t n) const { return inverse + n * row; }
};

// What forward and backward both do first: scales and means of the two norms.
template <class T>
class LatentMap {
  public:
    // `keep`: the matrices Psi C stay, for the gradients
    LatentMap(const LatentMapParams<T>& params, const Runtime& runtime, bool keep)
        : s(params),
          latent(params.latent),
          width(padded_row(params.latent)),
          first_moments(takes_moments(params.norms[0].statistics)),
          second_moments(takes_moments(params.norms[1].statistics)),
          runtime_(runtime),
          keep_(keep) {
        // multiply-adds from which on a second thread is worth waking
        constexpr int64_t kParallel = int64_t(1) << 20;
        if (s.batch * latent * latent * (second_moments ? latent : 4) < kParallel) runtime_.threads = 1;
    }

    // Rows of scratch that prepare() takes.
    int64_t rows() const {
        const int64_t moments = first_moments || second_moments ? 2 * s.batch : 0;
        const int64_t second = second_moments ? s.batch * (keep_ ? 3 + latent : 3) : 0;
        return moments + second + 4 * rows_of(s.norms[0]) + 1 + 3 * rows_of(s.norms[1]) + 1;
    }

    void prepare(Rows& memory) {
        if (first_moments || second_moments) {
            mean = memory.take(s.batch), variance = memory.take(s.batch);
            for (int64_t n = 0; n < s.batch; ++n)
                for (int64_t i = 0; i < latent; ++i) {
                    mean[n * width + i] = s.mean[n * latent + i] + value(s.latent_bias, i);
                    variance[n * width + i] = s.covariance[(n * latent + i) * latent + i];
                }
        }
        first = fold(s.norms[0], mean, variance, s.statistics, memory);
        shift = memory.zeros(rows_of(s.norms[0]));
        for (int64_t n = 0; n < rows_of(s.norms[0]); ++n)
            for (int64_t i = 0; i < latent; ++i)
                shift[n * width + i] =
                    first.bias[i] - first.scale_of(n)[i] * (first.mean_of(n)[i] - value(s.latent_bias, i));
        double* second_variance = nullptr;
        if (second_moments) {
            centred = memory.zeros(s.batch);
            second_mean = memory.take(s.batch), second_variance = memory.take(s.batch);
            if (keep_) mixed = memory.take(s.batch * latent);
            parallel(runtime_, s.batch, [&](int64_t n) { pass_through(n, second_variance); });
        }
        T* statistics = s.statistics;
        if (statistics && s.norms[0].statistics == kBatchStatistics) statistics += 2 * latent;
        second = fold(s.norms[1], second_mean, second_variance, statistics, memory);
    }

    static double value(const T* vector, int64_t i) { return vector ? static_cast<double>(vector[i]) : 0; }
    const double* shift_of(int64_t n) const { return shift + n * first.row; }
    const Runtime& runtime() const { return runtime_; }

    const LatentMapParams<T>& s;
    const int64_t latent, width;
    const bool first_moments, second_moments;
    FoldedNorm first{}, second{};
    double *mean = nullptr, *variance = nullptr;  // of z, a row a sample
    double* shift = nullptr;                      // beta1 - s1 (M1 - b), one row or a row a sample
    double* centred = nullptr;                    // m1, a row a sample
    double* second_mean = nullptr;                // Phi m1, a row a sample
    double* mixed = nullptr;                      // Psi C, L rows a sample

  private:
    int64_t rows_of(const LatentNorm<T>& norm) const {
        return norm.statistics == kGroupStatistics ? s.batch : 1;
    }

    // The moments of Phi norm1(z), of sample n.
    void pass_through(int64_t n, double* second_variance) const {
        const double *scale = first.scale_of(n), *away = first.mean_of(n);
        Rows memory = rows_of_scratch(1 + 3 * latent, width, Scratch::kTask);
        double *row = memory.take(1), *psi = memory.take(latent), *covariance = memory.take(latent);
        double* psi_c = keep_ ? mixed + n * latent * width : memory.take(latent);
        double* inner = centred + n * width;
        for (int64_t i = 0; i < latent; ++i)
            inner[i] = scale[i] * (mean[n * width + i] - away[i]) + first.bias[i];
        for (int64_t i = 0; i < latent; ++i) {
            widen(s.phi + (n * latent + i) * latent, latent, width, row);
            second_mean[n * width + i] = dot(row, inner, width);
            for (int64_t j = 0; j < width; ++j) psi[i * width + j] = row[j] * scale[j];
            widen(s.covariance + (n * latent + i) * latent, latent, width, covariance + i * width);
        }
        product(psi, width, 1, covariance, latent, latent, psi_c, width);
        for (int64_t i = 0; i < latent; ++i)
            second_variance[n * width + i] = dot(psi + i * width, psi_c + i * width, width);
    }

    // The norm of something with these moments, a row a sample.
    FoldedNorm fold(const LatentNorm<T>& norm, const double* means, const double* variances, T* statistics,
                    Rows& memory) const {
        const int64_t rows = rows_of(norm);
        FoldedNorm to{memory.zeros(rows), memory.zeros(rows), memory.zeros(rows), memory.zeros(1),
                      rows > 1 ? width : 0};
        for (int64_t i = 0; i < latent; ++i) to.bias[i] = value(norm.bias, i);
        double* spread = to.inverse;
        switch (norm.statistics) {
            case kNoNorm:
                for (int64_t i = 0; i < latent; ++i) to.scale[i] = to.inverse[i] = 1;
                return to;
            case kRunningStatistics:
                widen(norm.running_mean, latent, width, to.mean);
                widen(norm.running_variance, latent, width, spread);
                break;
            case kBatchStatistics:
                of_batch(means, variances, to.mean, spread);
                if (statistics)
                    narrow(to.mean, latent, statistics), narrow(spread, latent, statistics + latent);
                break;
            default:
                for (int64_t n = 0; n < rows; ++n)
                    of_groups(latent / norm.groups, means + n * width, variances + n * width,
                              to.mean + n * width, spread + n * width);
        }
        for (int64_t n = 0; n < rows; ++n)
            for (int64_t i = 0; i < latent; ++i) {
                const double inverse = 1 / std::sqrt(spread[n * width + i] + norm.eps);
                to.inverse[n * width + i] = inverse;
                to.scale[n * width + i] = norm.weight ? norm.weight[i] * inverse : inverse;
            }
        return to;
    }

    void of_batch(const double* means, const double* variances, double* whole, double* spread) const {
        const double share = 1.0 / static_cast<double>(s.batch);
        for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t i = 0; i < latent; ++i) whole[i] += means[n * width + i];
        for (int64_t i = 0; i < latent; ++i) whole[i] *= share;
        for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t i = 0; i < latent; ++i) {
                const double away = means[n * width + i] - whole[i];
                spread[i] += variances[n * width + i] + away * away;
            }
        for (int64_t i = 0; i < latent; ++i) spread[i] *= share;
    }

    void of_groups(int64_t members, const double* means, const double* variances, double* whole,
                   double* spread) const {
        const double share = 1.0 / static_cast<double>(members);
        for (int64_t c = 0; c < latent; c += members) {
            double mean_of_all = 0, variance_of_all = 0;
            for (int64_t i = c; i < c + members; ++i) mean_of_all += means[i];
            mean_of_all *= share;
            for (int64_t i = c; i < c + members; ++i) {
                const double away = means[i] - mean_of_all;
                variance_of_all += variances[i] + away * away;
            }
            for (int64_t i = c; i < c + members; ++i)
                whole[i] = mean_of_all, spread[i] = variance_of_all * share;
        }
    }

    Runtime runtime_;
    bool keep_;
};

template <class S>
static void latent_map(const LatentMapParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    LatentMap<T> map(s, runtime, false);
    const int64_t latent = map.latent, width = map.width;
    Rows memory = rows_of_scratch(map.rows(), width, Scratch::kShared);
    map.prepare(memory);
    parallel(map.runtime(), s.batch, [&](int64_t n) {
        double* row = rows_of_scratch(1, width, Scratch::kTask).take(1);
        const double *scale1 = map.first.scale_of(n), *scale2 = map.second.scale_of(n);
        const double *mean2 = map.second.mean_of(n), *inner = map.shift_of(n);
        for (int64_t i = 0; i < latent; ++i) {
            T* to = s.mapped + (n * latent + i) * latent;
            widen(s.phi + (n * latent + i) * latent, latent, width, row);
            double shift = scale2[i] * (dot(row, inner, width) - mean2[i]) + map.second.bias[i];
            for (int64_t j = 0; j < latent; ++j) to[j] = static_cast<T>(scale2[i] * row[j] * scale1[j]);
            if (s.residual) {
                to[i] = static_cast<T>((scale2[i] * row[i] + 1) * scale1[i]);
                shift += inner[i];
            }
            s.shift[n * latent + i] = static_cast<T>(shift);
        }
    });
}

}  // namespace dcd::DCD_ISA
