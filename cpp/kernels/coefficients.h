// From statistics and sums to the coefficients of a pass, many at a time. Included by kernels.cpp
// inside the namespace of one ISA.

// Adds n sums in T to those in double and starts them anew.
template <class T>
void flush_sums(void* data, index_t n, double* __restrict sums) {
  T* __restrict const values = static_cast<T*>(data);
#pragma omp simd
  for (index_t i = 0; i < n; ++i) {
    sums[i] += double(values[i]);
    values[i] = 0;
  }
}

inline void add_sums(index_t n, const double* __restrict from, double* __restrict to) {
#pragma omp simd
  for (index_t i = 0; i < n; ++i) to[i] += from[i];
}

template <class T>
void round_sums(index_t n, const double* __restrict from, void* to_data) {
  T* __restrict const to = static_cast<T*>(to_data);
#pragma omp simd
  for (index_t i = 0; i < n; ++i) to[i] = T(from[i]);
}

// running = (1 - momentum) running + momentum value.
template <class T>
void move_average(index_t n, double momentum, double factor, const double* __restrict value,
                  void* data) {
  T* __restrict const running = static_cast<T*>(data);
#pragma omp simd
  for (index_t i = 0; i < n; ++i) {
    running[i] = T((1 - momentum) * double(running[i]) + momentum * (value[i] * factor));
  }
}

template <class T>
void forward_coefficients(index_t n, const Statistics& s, const void* gamma_data,
                          const void* beta_data, const ForwardCoefficients& to) {
  const double* __restrict const mean = s.mean;
  const double* __restrict const variance = s.variance;
  const double* __restrict const unit = s.unit;
  const double eps = s.eps;
  const T* const gamma = static_cast<const T*>(gamma_data);
  const T* const beta = static_cast<const T*>(beta_data);
  T* __restrict const center = static_cast<T*>(to.center);
  T* __restrict const scale = static_cast<T*>(to.scale);
  T* __restrict const shift = static_cast<T*>(to.shift);
  with_flags(
      [=](auto with_gamma, auto with_beta) {
#pragma omp simd
        for (index_t i = 0; i < n; ++i) {
          const double sigma = sqrt(variance[i] + eps * unit[i] * unit[i]);
          const double weight = (with_gamma ? double(gamma[i]) : 1) / sigma;
          // Around zero the difference would round as much as the larger product does.
          const bool around_zero = mean[i] * mean[i] <= variance[i];
          center[i] = around_zero ? T(0) : T(mean[i]);
          scale[i] = T(weight);
          shift[i] = T((with_beta ? double(beta[i]) : 0) - (mean[i] - double(center[i])) * weight);
        }
      },
      gamma != nullptr, beta != nullptr);
}

// From the sums of dy and dy (x - center), which become those of dy and dy xhat (dbeta and
// dgamma), the coefficients of dx; `count` elements have a statistic in common, infinitely many
// where it is a constant.
template <class T>
void backward_coefficients(index_t n, const Statistics& s, double count, const void* gamma_data,
                           GradientSums both, const void* center_data,
                           const BackwardCoefficients& to) {
  const double* __restrict const sums = both.dy;
  double* __restrict const products = both.product;
  const double* __restrict const mean = s.mean;
  const double* __restrict const variance = s.variance;
  const double* __restrict const unit = s.unit;
  const double eps = s.eps;
  const T* const gamma = static_cast<const T*>(gamma_data);
  const T* __restrict const center = static_cast<const T*>(center_data);
  T* __restrict const on_dy = static_cast<T*>(to.on_dy);
  T* __restrict const on_x = static_cast<T*>(to.on_x);
  T* __restrict const constant = static_cast<T*>(to.constant);
  with_flags(
      [=](auto with_gamma) {
        const double each = 1 / count;
#pragma omp simd
        for (index_t i = 0; i < n; ++i) {
          const double rest = mean[i] - double(center[i]);
          const double inverse = 1 / sqrt(variance[i] + eps * unit[i] * unit[i]);
          const double weight = (with_gamma ? double(gamma[i]) : 1) * inverse;
          const double dot = (products[i] - rest * sums[i]) * inverse;
          // 0 - x is no negative zero: in evaluation a dx of 0 has the same sign in every batch.
          const double slope = 0 - weight * inverse * dot * each;
          products[i] = dot;
          on_dy[i] = T(weight);
          on_x[i] = T(slope);
          constant[i] = T(0 - weight * sums[i] * each - slope * rest);
        }
      },
      gamma != nullptr);
}

// The same for groups of n channels, which have a statistic in common.
template <class T>
void group_coefficients(index_t groups, index_t n, const Statistics& s, double count,
                        const void* gamma_data, GradientSums both, const void* center_data,
                        const BackwardCoefficients& to) {
  const double* const sums = both.dy;
  double* const products = both.product;
  const T* const gamma = static_cast<const T*>(gamma_data);
  const T* const center = static_cast<const T*>(center_data);
  T* const on_dy = static_cast<T*>(to.on_dy);
  T* const on_x = static_cast<T*>(to.on_x);
  T* const constant = static_cast<T*>(to.constant);
  with_flags(
      [=, &s](auto with_gamma) {
        const double each = 1 / count;
        for (index_t g = 0; g < groups; ++g) {
          const index_t begin = g * n, end = begin + n;
          const double rest = s.mean[g] - double(center[begin]);
          const double inverse = 1 / sqrt(s.variance[g] + s.eps * s.unit[g] * s.unit[g]);
          double sum = 0, dot = 0;
          for (index_t i = begin; i < end; ++i) {
            const double weight = with_gamma ? double(gamma[i]) : 1;
            products[i] = (products[i] - rest * sums[i]) * inverse;
            sum += weight * sums[i];
            dot += weight * products[i];
          }
          const double slope = -inverse * inverse * dot * each;
          for (index_t i = begin; i < end; ++i) {
            on_dy[i] = T((with_gamma ? double(gamma[i]) : 1) * inverse);
            on_x[i] = T(slope);
            constant[i] = T(-inverse * sum * each - slope * rest);
          }
        }
      },
      gamma != nullptr);
}
