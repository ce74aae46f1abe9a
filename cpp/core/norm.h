// Normalization over dense arrays, as pointers and sizes: which walk through memory, which thread
// does what. An input is seen as [outer, channels, inner]. Nothing of Python or NumPy.
#pragma once

#include "parallel.h"

namespace fastopt {

// What a normalization is given; the statistics are the results of its forward pass.
struct Normalization {
  Dtype dtype;
  const void* x;
  const void* gamma;      // or nullptr
  const void* beta;       // or nullptr
  Statistics statistics;  // before the forward pass, all units are 1
};

// The results of a backward pass.
struct Gradients {
  void *dx, *dgamma, *dbeta;
};

// Statistics of each channel; those of evaluation are given.
struct BatchNorm : Normalization {
  index_t outer, channels, inner;
  bool training;  // the statistics come from x, and dx goes through them
  bool relu;
};

// What training does with the statistics.
struct Running {
  void* mean;      // or nullptr
  void* variance;  // or nullptr
  double momentum;
  bool unbiased;
};

void batch_norm(const Settings& settings, const BatchNorm& norm, const Running& running,
                const void* residual, void* y);  // residual, y: or nullptr

// y: the output, where the sign of what was rectified does not follow from x; dresidual and y may
// be nullptr.
void batch_norm_backward(const Settings& settings, const BatchNorm& norm, const void* dy,
                         const void* y, const Gradients& gradients, void* dresidual);

// Batch renormalization: y = gamma (xhat r + d) + beta, where r and d lead from the batch's
// statistics towards the running ones, within limits.
struct Renorm {
  double r_max, d_max;
  double *r, *d;  // of each channel; results of the forward pass
};

void batch_renorm(const Settings& settings, const BatchNorm& norm, const Running& running,
                  const Renorm& renorm, void* y);
void batch_renorm_backward(const Settings& settings, const BatchNorm& norm, const Renorm& renorm,
                           const void* dy, const Gradients& gradients);

// Statistics of each sample's groups of channels, gamma and beta of each channel of a sample;
// inputs are [samples, groups * channels, inner].
struct GroupNorm : Normalization {
  index_t samples, groups, channels, inner;
};

void group_norm(const Settings& settings, const GroupNorm& norm, void* y);
void group_norm_backward(const Settings& settings, const GroupNorm& norm, const void* dy,
                         const Gradients& gradients);

// Statistics of each row, gamma and beta of each element of `groups` rows, after which they begin
// anew; the mean is zero unless centered.
struct LayerNorm : Normalization {
  index_t rows, columns, groups;
  bool centered;
};

void layer_norm(const Settings& settings, const LayerNorm& norm, void* y);
void layer_norm_backward(const Settings& settings, const LayerNorm& norm, const void* dy,
                         const Gradients& gradients);

}  // namespace fastopt
