// Means and sums of squared deviations. Included by kernels.cpp inside the namespace of one ISA.
//
// They never come from raw sums of squares: a block of about a thousand elements is summed around
// the mean of the blocks before it (the first around the mean of an eighth of its own elements), so
// nothing cancels, and blocks are merged in double (Chan, Golub, LeVeque, 1979). Blocks are fixed
// by the shape alone.

// The mean and the sum of squared deviations of a and of b become that of both.
inline void merge(double count_a, double* mean_a, double* m2_a, double count_b,
                  const double* mean_b, const double* m2_b, index_t n) {
  const double weight = count_b / (count_a + count_b), both = count_a * weight;
#pragma omp simd
  for (index_t c = 0; c < n; ++c) {
    const double delta = mean_b[c] - mean_a[c];
    mean_a[c] += delta * weight;
    m2_a[c] += m2_b[c] + delta * delta * both;
  }
}

// The mean of an eighth of a block's elements, from all over it.
template <class T>
T center_of(const T* x, index_t stride, index_t count, const Tail<T>& tail) {
  constexpr index_t part = 8;
  const index_t lanes = lanes_of<T>, in_run = tail.n / lanes;
  Sums<T> sum;
  index_t some = 0;
  for (index_t i = 0; i < count * in_run; i += part, ++some) {
    const T* const from = x + i / in_run * stride + i % in_run * lanes;
    unrolled<registers>([&](auto r) { sum.part[r] += load<Vector<T>>(from + r * width_of<T>); });
  }
  return T(sum.total() / double(some * lanes));
}

template <class T>
void moments_of(const T* x, const Blocks<T>& blocks, bool centered, double* mean, double* m2) {
  const Runs runs = blocks.runs;
  const index_t ahead = ahead_of<T>(runs);
  double counted = 0;
  T center = 0;
  *mean = *m2 = 0;
  blocks.each([&](index_t begin, auto count, const Tail<T>& tail) {
    const index_t n = tail.n;
    if (centered && counted == 0) {
      center = center_of(x + begin, runs.stride, count, tail);
    }
    // Four squares are added before they meet a long sum: inputs with few bits left of their mean
    // have squares that are 0 or 1 modulo 4, and rounding would always go down.
    Sums<T> sum, square;
    const auto add_four = [&](auto r, Vector<T> a, Vector<T> b, Vector<T> c, Vector<T> d) {
      sum.part[r] += (a + b) + (c + d);
      square.part[r] += (a * a + b * b) + (c * c + d * d);
    };
    const index_t stride = runs.stride, lanes = lanes_of<T>;
    const T* from = x + begin;
    index_t run = 0, i = 0;
    for (; run + 4 <= count; run += 4, from += 4 * stride) {
      each_lane<T>(tail, [&](auto r, auto read, auto keep, auto) {
        const auto d = [&](index_t k) { return keep(read(from + k * stride) - center); };
        add_four(r, d(0), d(1), d(2), d(3));
      });
    }
    if (count == 1) {
      for (; i + 4 * lanes <= n; i += 4 * lanes) {
        unrolled<registers>([&](auto r) {
          const auto d = [&](index_t k) {
            const T* const at = from + i + k * lanes + r * width_of<T>;
            if (r * vector_bytes % line_bytes == 0) prefetch_to_l2(at + ahead);
            return load<Vector<T>>(at) - center;
          };
          add_four(r, d(0), d(1), d(2), d(3));
        });
      }
    }
    for (; run < count; ++run, from += stride) {
      each_lane<T>(
          tail,
          [&](auto r, auto read, auto keep, auto) {
            const Vector<T> d = keep(read(from) - center);
            sum.part[r] += d;
            square.part[r] += d * d;
          },
          i);
    }
    const double elements = double(count * n);
    double block_mean = 0, block_m2 = square.total();
    if (centered) {
      const double d = sum.total() / elements;
      block_mean = center + d;
      block_m2 -= d * d * elements;
      if (block_m2 < 0) block_m2 = 0;
    }
    if (counted == 0) {
      *mean = block_mean;
      *m2 = block_m2;
    } else {
      merge(counted, mean, m2, elements, &block_mean, &block_m2, 1);
    }
    counted += elements;
    center = T(*mean);
  });
}

template <class T>
using FewColumns = Tile<T, few_columns>;

// Of rows that lie one after the other.
template <class T>
void moments_of_few(const T* x, index_t rows, index_t columns, bool centered,
                    double* __restrict mean, double* __restrict m2) {
  constexpr index_t height = FewColumns<T>::rows;
  const double elements = double(columns);
  for (index_t row = 0; row < rows; row += height) {
    const index_t count = row + height <= rows ? height : rows - row;
    FewColumns<T> tile;
    load_columns(x + row * columns, rows - row, columns, tile);
    Vector<T> center{}, sum{}, square{};
    if (centered) {
      for (index_t c = 0; c < columns; ++c) center += tile.column[c];
      center /= T(columns);
    }
    const auto from_center = [&](index_t c) { return tile.column[c] - center; };
    index_t column = 0;
    for (; column + 4 <= columns; column += 4) {
      const Vector<T> a = from_center(column), b = from_center(column + 1);
      const Vector<T> c = from_center(column + 2), d = from_center(column + 3);
      sum += (a + b) + (c + d);
      square += (a * a + b * b) + (c * c + d * d);
    }
    for (; column < columns; ++column) {
      const Vector<T> d = from_center(column);
      sum += d;
      square += d * d;
    }
    T centers[height], sums[height], squares[height];
    store<false>(centers, center);
    store<false>(sums, sum);
    store<false>(squares, square);
    for (index_t r = 0; r < count; ++r) {
      const double d = centered ? double(sums[r]) / elements : 0;
      const double row_m2 = double(squares[r]) - d * d * elements;
      mean[row + r] = double(centers[r]) + d;
      m2[row + r] = row_m2 < 0 ? 0 : row_m2;
    }
  }
}

// Number by number, in double: where squares overflow a T.
template <class T>
void moments_of_huge(const T* x, Runs runs, bool centered, double* mean, double* m2) {
  constexpr double shrink = sizeof(T) == 4 ? 1 : 0x1p-600;
  const auto sum = [=](auto term) {
    double total = 0;
    for (index_t run = 0; run < runs.count; ++run) {
      for (index_t i = 0; i < runs.inner; ++i) {
        total += term(double(x[run * runs.stride + i]) * shrink);
      }
    }
    return total;
  };
  const double elements = double(runs.count * runs.inner);
  const double center = centered ? sum([](double v) { return v; }) / elements : 0;
  *mean = center / shrink;
  *m2 = sum([=](double v) { return (v - center) * (v - center); }) / shrink / shrink;
}

inline bool finite(double x) {
  return x - x == 0;
}

// Of `statistics` that begin `apart` from each other. Runs of few elements are rows: each is a
// statistic of its own, and they lie one after the other.
template <class T>
void moments(const void* data, Runs runs, index_t statistics, index_t apart, bool centered,
             double* mean, double* m2) {
  const T* x = static_cast<const T*>(data);
  if (runs.inner <= few_columns) {
    moments_of_few(x, statistics, runs.inner, centered, mean, m2);
  } else {
    const Blocks<T> blocks(runs);
    for (index_t i = 0; i < statistics; ++i) {
      moments_of(x + i * apart, blocks, centered, mean + i, m2 + i);
    }
  }
  for (index_t i = 0; i < statistics; ++i) {
    if (!finite(m2[i])) moments_of_huge(x + i * apart, runs, centered, mean + i, m2 + i);
  }
}
