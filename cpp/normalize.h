// Normalization over dense arrays, as pointers and sizes: which walk through memory, which thread
// does what. An input is seen as [outer, channels, inner]. Nothing of Python or NumPy.
#pragma once

#include "parallel.h"

namespace fastopt {

// One call of batch normalization; pointers that may be nullptr are marked.
struct BatchNorm {
  Dtype dtype;
  index_t outer, channels, inner;
  double eps;
  bool training;  // the statistics come from x, and dx goes through them
  bool relu;
  const void* gamma;  // or nullptr
  const void* beta;   // or nullptr
  const void* x;
  double* mean;      // in double, of each channel: results in training, else given
  double* variance;  // biased
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
                         const void* y, void* dx, void* dresidual, void* dgamma, void* dbeta);

// Statistics of each sample's groups of channels; inputs are [samples, groups * channels, inner].
struct GroupNorm {
  Dtype dtype;
  index_t samples, groups, channels, inner;
  double eps;
  const void* gamma;  // or nullptr; one per channel of the sample, as beta
  const void* beta;   // or nullptr
  const void* x;
  double* mean;  // of each group of each sample
  double* variance;
};

void group_norm(const Settings& settings, const GroupNorm& norm, void* y);
void group_norm_backward(const Settings& settings, const GroupNorm& norm, const void* dy, void* dx,
                         void* dgamma, void* dbeta);

// Statistics of each row, gamma and beta of each column; the mean is zero unless centered.
struct LayerNorm {
  Dtype dtype;
  index_t rows, columns;
  double eps;
  bool centered;
  const void* gamma;  // or nullptr
  const void* beta;   // or nullptr
  const void* x;
  double* mean;
  double* variance;
};

void layer_norm(const Settings& settings, const LayerNorm& norm, void* y);
void layer_norm_backward(const Settings& settings, const LayerNorm& norm, const void* dy, void* dx,
                         void* dgamma, void* dbeta);

}  // namespace fastopt
