#include <cmath>

#include "norm_parts.h"

namespace fastopt {
namespace {

// Batch renormalization from the statistics: r and d, and what stands for gamma and beta.
template <class T>
void correct(const BatchNorm& n, const Running& running, const Renorm& renorm, void* scale_data,
             void* shift_data) {
  const T* const gamma = static_cast<const T*>(n.gamma);
  const T* const beta = static_cast<const T*>(n.beta);
  const T* const running_mean = static_cast<const T*>(running.mean);
  const T* const running_variance = static_cast<const T*>(running.variance);
  const Statistics& s = n.statistics;
  for (index_t c = 0; c < n.channels; ++c) {
    const double unit = s.unit[c], sigma = std::sqrt(s.variance[c] + s.eps * unit * unit) / unit;
    const double running_sigma = std::sqrt(double(running_variance[c]) + s.eps);
    const double distance = s.mean[c] / unit - double(running_mean[c]);
    const double r = std::clamp(sigma / running_sigma, 1 / renorm.r_max, renorm.r_max);
    const double d = std::clamp(distance / running_sigma, -renorm.d_max, renorm.d_max);
    const double weight = gamma == nullptr ? 1.0 : double(gamma[c]);
    renorm.r[c] = r;
    renorm.d[c] = d;
    static_cast<T*>(scale_data)[c] = T(weight * r);
    static_cast<T*>(shift_data)[c] = T(weight * d + (beta == nullptr ? 0.0 : double(beta[c])));
  }
}

template <class T>
void scale_by_r(const BatchNorm& n, const Renorm& renorm, void* scale) {
  const T* const gamma = static_cast<const T*>(n.gamma);
  for (index_t c = 0; c < n.channels; ++c) {
    static_cast<T*>(scale)[c] = T((gamma == nullptr ? 1.0 : double(gamma[c])) * renorm.r[c]);
  }
}

// gamma's part in the scale and in the shift.
template <class T>
void join_gradients(const BatchNorm& n, const Renorm& renorm, const Gradients& gradients) {
  T* const dgamma = static_cast<T*>(gradients.dgamma);
  const T* const dbeta = static_cast<const T*>(gradients.dbeta);
  for (index_t c = 0; c < n.channels; ++c) {
    dgamma[c] = T(renorm.r[c] * double(dgamma[c]) + renorm.d[c] * double(dbeta[c]));
  }
}

}  // namespace

void batch_renorm(const Settings& settings, const BatchNorm& n, const Running& running,
                  const Renorm& renorm, void* y) {
  batch_norm(settings, n, {}, nullptr, nullptr);
  const Scratch parameters(2, n.channels);
  parallel_for(settings, 0, [&](int, int) {
    const auto run = n.dtype == Dtype::float32 ? correct<float> : correct<double>;
    run(n, running, renorm, parameters[0], parameters[1]);
    move_running(settings.table->norm[size_t(n.dtype)], n, running, 0, n.channels);
  });
  BatchNorm corrected = n;
  corrected.training = false;
  corrected.gamma = parameters[0];
  corrected.beta = parameters[1];
  batch_norm(settings, corrected, {}, nullptr, y);
}

void batch_renorm_backward(const Settings& settings, const BatchNorm& n, const Renorm& renorm,
                           const void* dy, const Gradients& gradients) {
  const Scratch scale(1, n.channels);
  BatchNorm corrected = n;
  corrected.gamma = scale[0];
  const bool single = n.dtype == Dtype::float32;
  parallel_for(settings, 0, [&](int, int) {
    single ? scale_by_r<float>(n, renorm, scale[0]) : scale_by_r<double>(n, renorm, scale[0]);
  });
  batch_norm_backward(settings, corrected, dy, nullptr, gradients, nullptr);
  parallel_for(settings, 0, [&](int, int) {
    single ? join_gradients<float>(n, renorm, gradients)
           : join_gradients<double>(n, renorm, gradients);
  });
}

}  // namespace fastopt
