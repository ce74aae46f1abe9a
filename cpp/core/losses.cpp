#include "losses.h"

#include <array>
#include <vector>

#include "element.h"

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

// In double, in eight sums: one alone would wait for itself.
template <class T>
double sum(const T* x, index_t n) {
  std::array<double, 8> sums{};
  for (index_t i = 0; i < n; ++i) sums[size_t(i % 8)] += double(x[i]);
  double total = 0;
  for (const double s : sums) total += s;
  return total;
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

double cross_entropy(const Settings& settings, Dtype dtype, const CrossEntropy& task,
                     index_t rows) {
  const auto run = settings.table->softmax[size_t(dtype)].cross_entropy;
  split(settings, rows, exp_cost * 2 * rows * task.columns * item_size(dtype),
        [&](index_t begin, index_t n) { run(task, begin, begin + n); });
  double total = 0;
  parallel_for(settings, 0, [&](int, int) {
    total = dtype == Dtype::float32 ? sum(static_cast<const float*>(task.losses), rows)
                                    : sum(static_cast<const double*>(task.losses), rows);
  });
  return total;
}

double residual(const Settings& settings, Dtype dtype, double factor, const void* x,
                const void* target, void* y, index_t n) {
  const auto run = settings.table->softmax[size_t(dtype)].residual;
  const index_t blocks = blocks_of(n), size = item_size(dtype);
  struct Sums {
    double of[2];
  };
  std::vector<Sums> sums(static_cast<size_t>(blocks));
  split(settings, blocks, (target == nullptr ? 2 : 3) * n * size,
        [&](index_t first, index_t count) {
          const index_t begin = first * block;
          run(factor, at(x, begin, size), at(target, begin, size), at(y, begin, size),
              std::min(count * block, n - begin), &sums[size_t(first)].of);
        });
  double total = 0;
  parallel_for(settings, 0, [&](int, int) {
    for (const Sums& s : sums) total += s.of[0];
  });
  return total;
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
