// What the normalizations' walks through memory have in common.
#pragma once

#include "element.h"
#include "memory.h"
#include "norm.h"

namespace fastopt {

// Measured on Zen 4 with 1 MiB of L2 per core. They are constants, so that the shape alone decides
// about partial sums, and the bits are the same on every machine.
constexpr index_t slice_bytes = 1 << 18;         // of columns that are visited twice
constexpr index_t stream_from_bytes = 16 << 20;  // outputs that no cache will hold
constexpr index_t most_chunks = 64;
constexpr index_t hot_bytes = 1 << 16;  // of rows or groups that are visited twice

inline bool streams(index_t bytes) {
  return bytes >= stream_from_bytes;
}

// The statistics' elements in equal chunks that are summed on their own and merged in order.
struct Chunks {
  index_t size, count;

  Chunks(index_t n, index_t smallest, index_t unit, index_t most = most_chunks)
      : size(std::max(smallest, ((n + most - 1) / most + unit - 1) / unit * unit)),
        count((n + size - 1) / size) {}

  Range operator()(index_t chunk, index_t n) const {
    return {chunk * size, std::min(n, (chunk + 1) * size)};
  }
};

// Each of n numbers so many times.
template <class T>
void repeat(const void* from, index_t n, index_t times, void* to) {
  T* next = static_cast<T*>(to);
  for (index_t i = 0; i < n; ++i, next += times) {
    std::fill_n(next, times, static_cast<const T*>(from)[i]);
  }
}
inline void repeat(const void* from, index_t n, index_t times, index_t item, void* to) {
  item == 4 ? repeat<float>(from, n, times, to) : repeat<double>(from, n, times, to);
}

// Arrays of coefficients: three of the forward pass, then three of the backward.
inline ForwardCoefficients forward_in(const Scratch& arrays) {
  return {arrays[0], arrays[1], arrays[2]};
}
inline BackwardCoefficients backward_in(const Scratch& arrays) {
  return {arrays[3], arrays[4], arrays[5]};
}

// Those from the statistic i on.
inline Statistics from(const Statistics& s, index_t i) {
  return {s.mean + i, s.variance + i, s.unit + i, s.eps};
}

inline bool has_units(const Statistics& s, index_t n) {
  index_t units = 0;
  for (index_t i = 0; i < n; ++i) units += s.unit[i] != 1;
  return units > 0;
}

// Rows of so many columns that lie one after the other, each times its unit.
inline void multiply_by_units(const Norm& kernels, const double* unit, const void* x, index_t rows,
                              index_t columns, void* y) {
  const Scratch coefficients(2, rows);
  void *const units = coefficients[0], *const zeros = coefficients[1];
  kernels.round_sums(rows, unit, units);
  std::fill_n(coefficients[1], rows, 0.0);
  kernels.apply({x, y, {zeros, units, zeros}, false}, {}, {rows, columns, columns}, 1);
}

// Calls pass(n) with x in the units of its rows, which repeat themselves after so many statistics,
// and brings dx back out of them.
template <class N, class Pass>
void in_units(const Settings& settings, const N& n, index_t statistics, index_t rows,
              index_t columns, void* dx, const Pass& pass) {
  if (!has_units(n.statistics, statistics)) return pass(n);
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype);
  const Scratch copy(rows, columns);
  const auto multiply = [&](const void* from, void* to) {
    parallel_for(settings, 2 * rows * columns * item, [&](int part, int parts) {
      const Range mine = share(rows, part, parts);
      for (index_t row = mine.begin, end; row < mine.end; row = end) {
        const index_t i = row % statistics, first = row * columns;
        end = std::min(row + statistics - i, mine.end);
        multiply_by_units(kernels, n.statistics.unit + i, at(from, first, item), end - row, columns,
                          at(to, first, item));
      }
    });
  };
  multiply(n.x, copy[0]);
  N scaled = n;
  scaled.x = copy[0];
  pass(scaled);
  multiply(dx, dx);
}

// Moves the running statistics of the channels c to end, where there are such.
void move_running(const Norm& kernels, const BatchNorm& n, const Running& running, index_t c,
                  index_t end);

// Every row's dx, and dgamma and dbeta, each of `run` neighbours in a sample.
void row_gradients(const Settings& settings, const LayerNorm& n, index_t run, const void* dy,
                   const Gradients& gradients);

}  // namespace fastopt
