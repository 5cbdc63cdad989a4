// SPDX-License-Identifier: BSD-3-Clause
// Gradients of the latent's norms as an affine map, in the notation of latent_map.h. With G = dPhi', h =
// dshift:
//   E = G - h (M1 - b)^T                    the gradient of A diag(s1), whatever the mean
//   dA = E diag(s1) + h beta1^T             dPhi = diag(s2) dA + ..., D2 = sum_j dA Phi - M2 h
//   D1 = sum_i A E + ...,  dt1 = A^T h + ...,  dt2 = h
// where D is the gradient of a norm's scale, with what the shift's part s M takes of it, and dt that of its
// shift. A norm's statistics then receive dM = -s sum dt and dV = -1/2 s / (V + eps) sum D, which they send
// to each sample's mean and variance. Behind norm 2 these are a = dmean2 and w = dvariance2:
//   dPhi += a m1^T + 2 diag(w) (Psi C) diag(s1),   dm1 = Phi^T a,   dC = Psi^T diag(w) Psi + diag(dvariance1)
#pragma once

#include "latent_map.h"

namespace dcd::DCD_ISA {

template <class T>
class LatentMapGrad {
  public:
    LatentMapGrad(const LatentMapGradParams<T>& params, const Runtime& runtime)
        : g(params), s(params.forward), map_(s, runtime, true), latent(s.latent), width(map_.width) {}

    void run() {
        Rows memory = rows_of_scratch(map_.rows() + 9 * s.batch + 2, width, Scratch::kShared);
        map_.prepare(memory);
        double** const arrays[] = {&d_scale1, &d_shift1, &d_mean1, &d_variance1, &d_inner,
                                   &d_scale2, &d_shift2, &d_mean2, &d_variance2};
        for (double** array : arrays) *array = memory.take(s.batch);
        sum_scale_ = memory.take(1), sum_shift_ = memory.take(1);

        parallel(map_.runtime(), s.batch, [&](int64_t n) { to_norms(n); });
        through_norm(1, map_.second, map_.second_mean, d_scale2, d_shift2, d_mean2, d_variance2);
        if (g.d_phi || map_.second_moments) parallel(map_.runtime(), s.batch, [&](int64_t n) { to_phi(n); });
        through_norm(0, map_.first, map_.mean, d_scale1, d_shift1, d_mean1, d_variance1);
        if (g.d_covariance) parallel(map_.runtime(), s.batch, [&](int64_t n) { to_covariance(n); });
        to_mean();
    }

  private:
    // E of sample n in row i, in place of G
    void centre(int64_t n, int64_t i, const double* away, double* row) const {
        const int64_t at = n * latent + i;
        if (g.grad_mapped)
            widen(g.grad_mapped + at * latent, latent, width, row);
        else
            for (int64_t j = 0; j < width; ++j) row[j] = 0;
        if (g.grad_shift) add_multiple(g.grad_shift[at], away, width, row);
    }
    // b - M1
    void away_from_mean(int64_t n, double* away) const {
        for (int64_t j = 0; j < latent; ++j)
            away[j] = map_.value(s.latent_bias, j) - map_.first.mean_of(n)[j];
    }

    // From (Phi', shift) of sample n to both norms' scales and shifts.
    void to_norms(int64_t n) {
        Rows memory = rows_of_scratch(5, width, Scratch::kTask);
        double *away = memory.zeros(1), *by_scale = memory.zeros(1), *by_shift = memory.zeros(1);
        double *e = memory.take(1), *phi = memory.take(1);
        const double *scale1 = map_.first.scale_of(n), *bias1 = map_.first.bias;
        const double *scale2 = map_.second.scale_of(n), *mean2 = map_.second.mean_of(n);
        away_from_mean(n, away);
        for (int64_t i = 0; i < latent; ++i) {
            const double h = map_.value(g.grad_shift, n * latent + i);
            widen(s.phi + (n * latent + i) * latent, latent, width, phi);
            centre(n, i, away, e);
            const Doubles h_i = Doubles::all(h), scale_i = Doubles::all(scale2[i]);
            Doubles sum = Doubles::zero();
            for (int64_t j = 0; j < width; j += Doubles::kLanes) {
                const Doubles x = Doubles::load(phi + j), a = scale_i * x, e_j = Doubles::load(e + j);
                const Doubles d_a = e_j * Doubles::load(scale1 + j) + Doubles::load(bias1 + j) * h_i;
                sum = sum + d_a * x;
                (Doubles::load(by_scale + j) + a * e_j).store(by_scale + j);
                (Doubles::load(by_shift + j) + a * h_i).store(by_shift + j);
            }
            if (s.residual) by_scale[i] += e[i], by_shift[i] += h;  // the identity in A
            d_scale2[n * width + i] = sum.sum() - mean2[i] * h;
            d_shift2[n * width + i] = h;
        }
        for (int64_t j = 0; j < latent; ++j) {
            d_scale1[n * width + j] = by_scale[j];
            d_shift1[n * width + j] = by_shift[j];
        }
    }

    // To Phi of sample n, all of it; and from the moments of Phi norm1(z) to norm 1.
    void to_phi(int64_t n) {
        Rows memory = rows_of_scratch(4, width, Scratch::kTask);
        double *away = memory.zeros(1), *by_scale = memory.zeros(1);
        double *phi = memory.take(1), *e = memory.take(1);
        const double *scale1 = map_.first.scale_of(n), *bias1 = map_.first.bias;
        const double* scale2 = map_.second.scale_of(n);
        const bool moments = map_.second_moments;
        double* d_inner_n = d_inner + n * width;
        if (moments)
            for (int64_t j = 0; j < width; ++j) d_inner_n[j] = 0;
        away_from_mean(n, away);
        for (int64_t i = 0; i < latent; ++i) {
            const int64_t at = n * latent + i;
            const double h = map_.value(g.grad_shift, at);
            widen(s.phi + at * latent, latent, width, phi);
            if (g.d_phi) {
                centre(n, i, away, e);
                const Doubles h_i = Doubles::all(h * scale2[i]), scale_i = Doubles::all(scale2[i]);
                for (int64_t j = 0; j < width; j += Doubles::kLanes)
                    (Doubles::load(e + j) * scale_i * Doubles::load(scale1 + j) +
                     Doubles::load(bias1 + j) * h_i)
                        .store(e + j);
            }
            if (moments) {
                const double a = d_mean2[n * width + i];
                const double* mixed = map_.mixed + at * width;
                const Doubles twice_w = Doubles::all(2 * d_variance2[n * width + i]);
                for (int64_t j = 0; j < width; j += Doubles::kLanes) {
                    const Doubles x = Doubles::load(phi + j), d_psi = twice_w * Doubles::load(mixed + j);
                    if (g.d_phi) (Doubles::load(e + j) + d_psi * Doubles::load(scale1 + j)).store(e + j);
                    (Doubles::load(by_scale + j) + x * d_psi).store(by_scale + j);
                }
                if (g.d_phi) add_multiple(a, map_.centred + n * width, width, e);
                add_multiple(a, phi, width, d_inner_n);
            }
            if (g.d_phi) narrow(e, latent, g.d_phi + at * latent);
        }
        if (!moments) return;
        for (int64_t j = 0; j < latent; ++j) {
            const int64_t k = n * width + j;
            d_scale1[k] += by_scale[j] + d_inner[k] * (map_.mean[k] - map_.first.mean_of(n)[j]);
            d_shift1[k] += d_inner[k];
        }
    }

    // To the covariance of z, from both norms' variances.
    void to_covariance(int64_t n) {
        T* to = g.d_covariance + n * latent * latent;
        Rows memory = rows_of_scratch(3 * latent, width, Scratch::kTask);
        double *psi = memory.take(latent), *weighted = memory.take(latent), *d_c = memory.zeros(latent);
        if (map_.second_moments) {
            const double* scale = map_.first.scale_of(n);
            for (int64_t i = 0; i < latent; ++i) {
                double *row = psi + i * width, *scaled = weighted + i * width;
                widen(s.phi + (n * latent + i) * latent, latent, width, row);
                const double w = d_variance2[n * width + i];
                for (int64_t j = 0; j < width; ++j) {
                    row[j] *= scale[j];
                    scaled[j] = w * row[j];
                }
            }
            product(weighted, 1, width, psi, latent, latent, d_c, width);
        }
        for (int64_t i = 0; i < latent; ++i) {
            d_c[i * width + i] += d_variance1[n * width + i];
            narrow(d_c + i * width, latent, to + i * latent);
        }
    }

    // From the scale and the shift of a norm to its parameters, and through its statistics to the mean and
    // the variance of what it reads: a row a sample each.
    void through_norm(int which, const FoldedNorm& folded, const double* means, const double* d_scale,
                      const double* d_shift, double* to_mean, double* to_variance) {
        const LatentNorm<T>& norm = s.norms[which];
        const bool in_batch = norm.statistics == kBatchStatistics;
        if (norm.statistics == kGroupStatistics)
            through_groups(latent / norm.groups, folded, means, d_scale, d_shift, to_mean, to_variance);
        else if (!in_batch)
            for (int64_t k = 0; k < s.batch * width; ++k) to_mean[k] = to_variance[k] = 0;
        if (!in_batch && !g.d_weight[which] && !g.d_bias[which]) return;
        for (int64_t i = 0; i < latent; ++i) sum_scale_[i] = sum_shift_[i] = 0;
        for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t i = 0; i < latent; ++i) {
                sum_scale_[i] += d_scale[n * width + i] * folded.inverse_of(n)[i];
                sum_shift_[i] += d_shift[n * width + i];
            }
        if (g.d_weight[which]) narrow(sum_scale_, latent, g.d_weight[which]);
        if (g.d_bias[which]) narrow(sum_shift_, latent, g.d_bias[which]);
        if (!in_batch) return;
        const double share = 1.0 / static_cast<double>(s.batch);
        for (int64_t i = 0; i < latent; ++i) {  // from here on the gradients of V and M, over the batch
            sum_scale_[i] *= -0.5 * folded.scale[i] * folded.inverse[i] * share;
            sum_shift_[i] *= -folded.scale[i] * share;
        }
        for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t i = 0; i < latent; ++i) {
                const int64_t k = n * width + i;
                to_mean[k] = sum_shift_[i] + 2 * sum_scale_[i] * (means[k] - folded.mean[i]);
                to_variance[k] = sum_scale_[i];
            }
    }

    void through_groups(int64_t members, const FoldedNorm& folded, const double* means, const double* d_scale,
                        const double* d_shift, double* to_mean, double* to_variance) {
        const double share = 1.0 / static_cast<double>(members);
        for (int64_t n = 0; n < s.batch; ++n) {
            const double *scale = folded.scale_of(n), *mean = folded.mean_of(n),
                         *inverse = folded.inverse_of(n);
            const int64_t at = n * width;
            for (int64_t c = 0; c < latent; c += members) {
                double d_mean = 0, d_spread = 0;
                for (int64_t i = c; i < c + members; ++i) {
                    d_mean -= scale[i] * d_shift[at + i];
                    d_spread -= 0.5 * scale[i] * inverse[i] * inverse[i] * d_scale[at + i];
                }
                for (int64_t i = c; i < c + members; ++i) {
                    to_mean[at + i] = share * (d_mean + 2 * d_spread * (means[at + i] - mean[i]));
                    to_variance[at + i] = share * d_spread;
                }
            }
        }
    }

    // To the mean of Q^T x and the latent's bias.
    void to_mean() {
        double* d_bias = sum_shift_;
        for (int64_t i = 0; i < latent; ++i) d_bias[i] = 0;
        for (int64_t n = 0; n < s.batch; ++n) {
            const double* scale = map_.first.scale_of(n);
            for (int64_t i = 0; i < latent; ++i) {
                // b enters all that norm 1 shifts, the mean only what norm 2's statistics see of it
                const int64_t k = n * width + i;
                d_bias[i] += d_mean1[k] + scale[i] * d_shift1[k];
                if (map_.second_moments) d_mean1[k] += scale[i] * d_inner[k];
            }
            if (g.d_mean) narrow(d_mean1 + n * width, latent, g.d_mean + n * latent);
        }
        if (g.d_latent_bias) narrow(d_bias, latent, g.d_latent_bias);
    }

    const LatentMapGradParams<T>& g;
    const LatentMapParams<T>& s;
    LatentMap<T> map_;
    const int64_t latent, width;
    // A row a sample: of the norms' scales and shifts, of the means and variances that they read, and of m1.
    double *d_scale1, *d_shift1, *d_mean1, *d_variance1, *d_inner;
    double *d_scale2, *d_shift2, *d_mean2, *d_variance2;
    double *sum_scale_, *sum_shift_;  // one row
};

template <class S>
static void latent_map_grad(const LatentMapGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    LatentMapGrad<typename S::Scalar>(s, runtime).run();
}

}  // namespace dcd::DCD_ISA
