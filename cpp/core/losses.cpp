#include "losses.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "element.h"
#include "memory.h"

namespace fastopt {
namespace {

// With an exp for each, numbers take so many times longer than their traffic in the cache.
constexpr index_t exp_cost = 4;

// Calls run(begin, n) for each part of n units that fall into line.
template <class Run>
void split(const Settings& settings, index_t units, index_t bytes, const Run& run) {
  parallel_for(settings, bytes, [&](int part, int parts) {
    const Range mine = share(units, part, parts);
    if (mine.begin < mine.end) run(mine.begin, mine.end - mine.begin);
  });
}

// A number that does not depend on the caller's floating-point environment.
template <class Formula>
double calculated(const Settings& settings, const Formula& formula) {
  double result = 0;
  parallel_for(settings, 0, [&](int, int) { result = formula(); });
  return result;
}

// In double, in eight sums: one alone would wait for itself.
template <class T>
double sum(const T* x, index_t n) {
  std::array<double, 8> sums{};
  for (index_t i = 0; i < n; ++i) sums[size_t(i % 8)] += double(x[i]);
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

// What the classes count, in units near the largest weight in use: weights that are all too small
// for T, or all too large, still have a mean.
template <class T>
struct ClassWeights {
  std::vector<T> label, base;
  double unit = 1, base_sum = 0, of_all_labels = 0;

  explicit ClassWeights(const CrossEntropy& task)
      : label(size_t(task.columns)),
        base(task.labels == nullptr || task.label_smoothing != 0 ? label.size() : 0) {}

  void calculate(const CrossEntropy& task) {
    const T* const weight = static_cast<const T*>(task.weight);
    const auto each_label = [&](auto visit) {
      for (index_t i = 0; task.labels != nullptr && i < task.rows; ++i) {
        if (task.labels[i] != task.ignored) visit(task.labels[i]);
      }
    };
    if (weight != nullptr) {
      double largest = 0;
      const auto see = [&](index_t c) { largest = std::max(largest, std::abs(double(weight[c]))); };
      each_label(see);
      for (size_t c = 0; c < base.size(); ++c) see(index_t(c));
      if (largest > 0 && std::isfinite(largest)) unit = std::ldexp(1.0, std::ilogb(largest));
    }
    const auto in_units = [&](index_t c) {
      return weight == nullptr ? 1.0 : double(weight[c]) / unit;
    };
    const double classes = double(task.columns);
    double all_weights = 0;
    for (index_t c = 0; c < task.columns; ++c) {
      label[size_t(c)] = T((1 - task.label_smoothing) * in_units(c));
      if (base.empty()) continue;
      base[size_t(c)] = T(task.label_smoothing / classes * in_units(c));
      all_weights += in_units(c);
    }
    base_sum = task.label_smoothing * (all_weights / classes);
    if (weight != nullptr) {
      each_label([&](index_t c) { of_all_labels += in_units(c); });
    } else if (task.labels != nullptr) {
      of_all_labels =
          double(task.rows - std::count(task.labels, task.labels + task.rows, task.ignored));
    }
  }
};

template <class T>
double cross_entropy_of(const Settings& settings, const CrossEntropy& task) {
  ClassWeights<T> weights(task);
  Settings exact = settings;  // a subnormal weight is not zero: it may be divided by its sum
  exact.flush_denormals = false;
  double factor = 1, divisor = 1, scale = 1;
  parallel_for(exact, 0, [&](int, int) {
    weights.calculate(task);
    const bool mean = task.reduction == Reduction::mean, labels = task.labels != nullptr;
    factor = mean && labels ? 1 : weights.unit;
    if (mean) divisor = labels ? weights.of_all_labels : double(task.rows);
    scale = factor / divisor;
  });
  const bool none = task.reduction == Reduction::none;
  const Scratch scratch(1, none ? 0 : task.rows);
  T* const losses = none ? static_cast<T*>(task.losses) : reinterpret_cast<T*>(scratch[0]);
  const CrossEntropyRows rows{
      task.columns,
      task.logits,
      task.labels,
      task.probabilities,
      weights.label.data(),
      weights.base.empty() ? nullptr : weights.base.data(),
      weights.base_sum,
      task.ignored,
      scale,
      losses,
      task.gradient,
  };
  const auto run = settings.table->softmax[size_t(task.dtype)].cross_entropy;
  split(settings, task.rows, exp_cost * 2 * task.rows * task.columns * item_size(task.dtype),
        [&](index_t begin, index_t n) {
          run(rows, begin, begin + n);
          if (!none) return;
          for (index_t i = begin; i < begin + n; ++i) losses[i] = T(factor * double(losses[i]));
        });
  return calculated(exact, [&] { return none ? 0 : factor * sum(losses, task.rows) / divisor; });
}

template <class T>
BadRow described(const T* p, index_t row, index_t columns) {
  p += row * columns;
  return {row, sum(p, columns), double(*std::min_element(p, p + columns))};
}

double sum_of_squares(const Settings& settings, const Residual& r, double factor) {
  const auto run = settings.table->softmax[size_t(r.dtype)].residual;
  const index_t blocks = blocks_of(r.n), size = item_size(r.dtype);
  std::vector<double> sums(static_cast<size_t>(blocks));
  split(settings, blocks, (r.target == nullptr ? 2 : 3) * r.n * size,
        [&](index_t first, index_t count) {
          const index_t begin = first * block;
          run(factor, at(r.x, begin, size), at(r.target, begin, size), at(r.y, begin, size),
              std::min(count * block, r.n - begin), &sums[size_t(first)]);
        });
  return calculated(settings, [&] { return sum(sums.data(), blocks); });
}

// The squares, from their gradient.
template <class T>
void square_halves(const Settings& settings, const Residual& r, void* errors) {
  const T* const y = static_cast<const T*>(r.y);
  T* const squares = static_cast<T*>(errors);
  split(settings, r.n, 2 * r.n * item_size(r.dtype), [&](index_t begin, index_t n) {
    for (index_t i = begin; i < begin + n; ++i) squares[i] = T(0.5) * y[i] * (T(0.5) * y[i]);
  });
}

}  // namespace

void softmax(const Settings& settings, Dtype dtype, bool logarithm, const void* x, void* y,
             index_t rows, index_t columns) {
  const Softmax& kernels = settings.table->softmax[size_t(dtype)];
  const auto run = logarithm ? kernels.log_softmax : kernels.softmax;
  const index_t row_bytes = columns * item_size(dtype);
  split(settings, rows, exp_cost * 2 * rows * row_bytes, [&](index_t begin, index_t n) {
    run(at(x, begin, row_bytes), at(y, begin, row_bytes), n, columns);
  });
}

double cross_entropy(const Settings& settings, const CrossEntropy& task) {
  return task.dtype == Dtype::float32 ? cross_entropy_of<float>(settings, task)
                                      : cross_entropy_of<double>(settings, task);
}

std::optional<BadRow> find_bad_row(const Settings& settings, Dtype dtype, const void* probabilities,
                                   index_t rows, index_t columns) {
  const auto run = settings.table->softmax[size_t(dtype)].bad_row;
  const index_t row_bytes = columns * item_size(dtype);
  std::atomic<index_t> first = rows;
  split(settings, rows, rows * row_bytes, [&](index_t begin, index_t n) {
    const index_t found = run(at(probabilities, begin, row_bytes), n, columns);
    if (found == n) return;
    for (index_t known = first; begin + found < known;) {
      if (first.compare_exchange_weak(known, begin + found)) break;
    }
  });
  if (first == rows) return {};
  return dtype == Dtype::float32
             ? described(static_cast<const float*>(probabilities), first, columns)
             : described(static_cast<const double*>(probabilities), first, columns);
}

double squared_error(const Settings& settings, const Residual& residual, Reduction reduction,
                     void* errors) {
  const double divisor = reduction == Reduction::mean ? double(residual.n) : 1;
  const double total =
      sum_of_squares(settings, residual, calculated(settings, [=] { return 2 / divisor; }));
  if (reduction == Reduction::none) {
    if (residual.dtype == Dtype::float32) {
      square_halves<float>(settings, residual, errors);
    } else {
      square_halves<double>(settings, residual, errors);
    }
  }
  return calculated(settings, [=] { return total / divisor; });
}

double l2_penalty(const Settings& settings, const std::vector<Residual>& residuals,
                  double weight_decay) {
  std::vector<double> totals;
  for (const Residual& residual : residuals) {
    if (weight_decay == 0) {
      std::memset(residual.y, 0, size_t(residual.n * item_size(residual.dtype)));
    } else {
      totals.push_back(sum_of_squares(settings, residual, weight_decay));
    }
  }
  return calculated(settings,
                    [&] { return weight_decay / 2 * sum(totals.data(), index_t(totals.size())); });
}

void elementwise(const Settings& settings, Dtype dtype, bool logarithm, const void* x, void* y,
                 index_t n) {
  const Softmax& kernels = settings.table->softmax[size_t(dtype)];
  const auto run = logarithm ? kernels.log : kernels.exp;
  const index_t size = item_size(dtype);
  split(settings, n, exp_cost * 2 * n * size,
        [&](index_t begin, index_t count) { run(at(x, begin, size), at(y, begin, size), count); });
}

}  // namespace fastopt
