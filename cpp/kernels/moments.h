// Means and sums of squared deviations. Included by kernels.cpp inside the namespace of one ISA.
//
// They never come from raw sums of squares: a block of about a thousand elements is summed around
// the mean of the blocks before it (the first around the mean of an eighth of its own elements), so
// nothing cancels, and blocks are merged in double (Chan, Golub, LeVeque, 1979). Blocks are fixed
// by the shape alone.

// The moments of a become those of a and b.
inline void merge(double count_a, Moments a, double count_b, Moments b, index_t n) {
  const double weight = count_b / (count_a + count_b), both = count_a * weight;
#pragma omp simd
  for (index_t c = 0; c < n; ++c) {
    const double delta = b.mean[c] - a.mean[c];
    a.mean[c] += delta * weight;
    a.m2[c] += b.m2[c] + delta * delta * both;
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
    if (centered && counted == 0) center = center_of(x + begin, runs.stride, count, tail);
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
    const auto add_rest = [&](auto r, auto read, auto keep, auto) {
      const Vector<T> d = keep(read(from) - center);
      sum.part[r] += d;
      square.part[r] += d * d;
    };
    for (; run < count; ++run, from += stride) each_lane<T>(tail, add_rest, i);
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
      merge(counted, {mean, m2}, elements, {&block_mean, &block_m2}, 1);
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

// Of `statistics` that begin `apart` from each other, with runs of more than a few elements.
template <class T>
void moments(const void* data, Runs runs, index_t statistics, index_t apart, bool centered,
             Moments to) {
  const T* const x = static_cast<const T*>(data);
  const Blocks<T> blocks(runs);
  for (index_t i = 0; i < statistics; ++i) {
    moments_of(x + i * apart, blocks, centered, to.mean + i, to.m2 + i);
  }
}

// Of rows of n elements, which lie one after the other.
template <class T>
void row_moments(const void* x, index_t rows, index_t n, bool centered, Moments to) {
  if (n <= few_columns) {
    moments_of_few(static_cast<const T*>(x), rows, n, centered, to.mean, to.m2);
  } else {
    moments<T>(x, {1, n, n}, rows, n, centered, to);
  }
}

// --- units ---

inline bool finite(double x) {
  return x - x == 0;
}

inline int exponent_of(double x) {
  return int(__builtin_bit_cast(unsigned long long, x) >> 52 & 0x7ff) - 1023;
}
inline double power_of_two(int exponent) {
  return __builtin_bit_cast(double, static_cast<unsigned long long>(exponent + 1023) << 52);
}

// Powers of two up to which, and down to which, the square of a deviation's inverse, a sum of
// squares and a number have room in a T.
template <class T>
struct Room {
  static constexpr int deviation = sizeof(T) == 4 ? 30 : 250;
  static constexpr int square = sizeof(T) == 4 ? -90 : -900;
  static constexpr int number = sizeof(T) == 4 ? 126 : 1020;
};

template <class T>
int clamped(int exponent) {
  constexpr int most = Room<T>::number;
  return exponent > most ? most : exponent < -most ? -most : exponent;
}

// Calls visit(numbers, n) for a statistic's elements times `unit`, at most a block at a time; in
// the order of memory, or where runs are short, across them.
template <class T, class Visit>
void each_copy(const T* x, Runs runs, T unit, Visit visit) {
  const bool across = runs.inner < runs.count;
  const index_t lines = across ? runs.inner : runs.count, apart = across ? 1 : runs.stride;
  const index_t length = across ? runs.count : runs.inner, step = across ? runs.stride : 1;
  T copy[block];
  index_t n = 0;
  for (index_t line = 0; line < lines; ++line) {
    for (index_t i = 0, count; i < length; i += count) {
      const T* const from = x + line * apart + i * step;
      count = length - i < block - n ? length - i : block - n;
#pragma omp simd
      for (index_t k = 0; k < count; ++k) copy[n + k] = from[k * step] * unit;
      n += count;
      if (n == block) {
        visit(copy, n);
        n = 0;
      }
    }
  }
  if (n > 0) visit(copy, n);
}

// Mean and variance anew, in a unit in which x has room for its squares.
template <class T>
void moments_in_units(const T* x, Runs runs, bool centered, const Statistics& s) {
  Vector<T> largest{}, small{};
  each_copy(x, runs, T(1), [&](T* v, index_t n) {
    for (index_t i = n; i % width_of<T> != 0; ++i) v[i] = 0;
    for (index_t i = 0; i < n; i += width_of<T>) {
      const auto value = load<Vector<T>>(v + i), size = value < T(0) ? -value : value;
      small += (centered ? value : size) * T(0x1p-64);
      largest = size > largest ? size : largest;
    }
  });
  double most = 0, sum = 0;
  for (index_t k = 0; k < width_of<T>; ++k) {
    most = maximum(most, double(largest[k]));
    sum += double(small[k]);
  }
  *s.mean = centered ? sum : 0;
  *s.variance = centered ? sum * 0 : sum;
  *s.unit = 1;
  if (!finite(sum)) return;  // x is not: no sum of so small numbers overflows
  if (most > 0) *s.unit = power_of_two(clamped<T>(-exponent_of(most)));
  double counted = 0, mean = 0, m2 = 0, block_mean = 0, block_m2 = 0;
  each_copy(x, runs, T(*s.unit), [&](const T* v, index_t n) {
    row_moments<T>(v, 1, n, centered, {&block_mean, &block_m2});
    merge(counted, {&mean, &m2}, double(n), {&block_mean, &block_m2}, 1);
    counted += double(n);
  });
  *s.mean = mean;
  *s.variance = m2 / counted;
}

// From the variances to the units. Where the squares had no room either, the moments are computed
// anew from the elements of x, whose statistics begin `apart` from each other; nullptr if the
// statistics are given.
template <class T>
void choose_units(const void* data, Runs runs, index_t statistics, index_t apart, bool centered,
                  const Statistics& s) {
  const double least = power_of_two(-2 * Room<T>::deviation);
  const double most = power_of_two(2 * Room<T>::deviation);
  const auto square = [&s](index_t i) { return s.variance[i] + s.eps * s.unit[i] * s.unit[i]; };
  double odd = 0;
#pragma omp simd reduction(+ : odd)
  for (index_t i = 0; i < statistics; ++i) {
    odd += square(i) >= least && square(i) <= most ? 0.0 : 1.0;
  }
  for (index_t i = 0; odd > 0 && i < statistics; ++i) {
    const Statistics one{s.mean + i, s.variance + i, s.unit + i, s.eps};
    if (square(i) >= least && square(i) <= most) continue;
    const bool has_room = finite(square(i)) && square(i) >= power_of_two(Room<T>::square);
    if (data != nullptr && !has_room) {
      moments_in_units(static_cast<const T*>(data) + i * apart, runs, centered, one);
    }
    const double of_x = sqrt(*one.variance) / *one.unit, of_eps = sqrt(s.eps);
    const double sigma = of_x <= of_eps ? of_eps : of_x;
    int exponent = 0;
    if (finite(sigma) && sigma > 0) {
      const int size = exponent_of(sigma), of_mean = exponent_of(*one.mean / *one.unit);
      if (size < -Room<T>::deviation || size > Room<T>::deviation) exponent = -size;
      // The mean needs room, too.
      if (exponent > Room<T>::number - 20 - of_mean) exponent = Room<T>::number - 20 - of_mean;
      if (size < 0 && exponent < 0) exponent = 0;
    }
    const double factor = power_of_two(clamped<T>(exponent)) / *one.unit;
    *one.mean *= factor;
    *one.variance = *one.variance * factor * factor;
    *one.unit *= factor;
  }
}
