// exp and log, and what is made of them along rows: softmax, log-softmax, cross-entropy. Included
// by kernels.cpp inside the namespace of one ISA.
//
// Results do not depend on the ISA: sums have 128 bytes of lanes everywhere, blocks of a row are
// added in double in their order, and nothing is contracted.

template <class T>
struct Real;

// The polynomials interpolate at Chebyshev nodes: (exp(r) - 1 - r) / r^2 over |r| <= ln(2) / 2, and
// (2 artanh(s) - 2 s) / s^3 in s^2 over |s| <= 3 - sqrt(8). ln2_high times any exponent is exact.
template <>
struct Real<float> {
  using Bits = unsigned;
  static constexpr int fraction_bits = 23;
  static constexpr Bits exponent_bias = 127, sqrt_half = 0x3f3504f3;
  static constexpr float infinity = __builtin_inff();
  static constexpr float smallest_normal = 0x1p-126f, subnormal_scale = 0x1p25f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves an integer in the low bits
  static constexpr float lowest_exp = -0x1.5d589ep+6f, highest_exp = 0x1.62e42ep+6f;
  static constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.1219444e-4f;
  static constexpr float exp[] = {5.e-01f, 1.6666576e-01f, 4.1666556e-02f, 8.363203e-03f,
                                  1.3926213e-03f};
  static constexpr float log[] = {6.6666687e-01f, 3.998876e-01f, 2.9580986e-01f};
};

template <>
struct Real<double> {
  using Bits = unsigned long long;
  static constexpr int fraction_bits = 52;
  static constexpr Bits exponent_bias = 1023, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double infinity = __builtin_inf();
  static constexpr double smallest_normal = 0x1p-1022, subnormal_scale = 0x1p54;
  static constexpr double round = 0x1.8p52;
  static constexpr double lowest_exp = -0x1.6232bdd7abcd2p+9, highest_exp = 0x1.62e42fefa39efp+9;
  static constexpr double log2_e = 1.4426950408889634, ln2_high = 0x1.62e42feep-1,
                          ln2_low = 1.9082149292705877e-10;
  static constexpr double exp[] = {
      0.5000000000000001,     0.16666666666666669,    0.04166666666662399,   0.008333333333330051,
      0.0013888888917281794,  0.00019841269863105968, 2.480152119021773e-05, 2.7557268378684192e-06,
      2.7620138719733994e-07, 2.5100424157005067e-08};
  static constexpr double log[] = {0.666666666666667,   0.3999999999989889, 0.28571428626253836,
                                   0.22222211089379496, 0.1818289243253687, 0.15331611722055008,
                                   0.14617807153417325};
};

template <class T>
using Bits = Vector<typename Real<T>::Bits>;

template <class T>
Vector<T> all(T x) {
  return Vector<T>{} + x;
}

// Horner's rule: c[0] + x c[1] + ...
template <class T, int n>
Vector<T> polynomial(Vector<T> x, const T (&c)[n]) {
  Vector<T> sum = all(c[n - 1]);
  for (int i = n - 1; i-- > 0;) sum = sum * x + c[i];
  return sum;
}

// exp(x) = 2^n exp(r), x = n ln(2) + r. A result too small for a normal number is zero.
template <class T>
Vector<T> exp(Vector<T> x) {
  using R = Real<T>;
  const Vector<T> shifted = x * R::log2_e + R::round, n = shifted - R::round;
  const Vector<T> r = x - n * R::ln2_high - n * R::ln2_low;
  Vector<T> y = r * r * polynomial<T>(r, R::exp) + r + T(1);
  y = (Vector<T>)((Bits<T>)y + ((Bits<T>)shifted << R::fraction_bits));
  y = x < R::lowest_exp ? Vector<T>{} : y;
  return x <= R::highest_exp ? y : x + R::infinity;
}

// log(x) = n ln(2) + log(1 + f), 1 + f from sqrt(1/2) to sqrt(2); log(1 + f) = 2 artanh(s) for
// s = f / (2 + f), which is f - s (f - s^2 p(s^2)).
template <class T>
Vector<T> log(Vector<T> x) {
  using R = Real<T>;
  const auto tiny = x < R::smallest_normal;
  const Vector<T> normal = tiny ? x * R::subnormal_scale : x;
  constexpr typename R::Bits one = R::exponent_bias << R::fraction_bits,
                             fraction = (typename R::Bits(1) << R::fraction_bits) - 1;
  const Bits<T> bits = (Bits<T>)normal + (one - R::sqrt_half);
  const Vector<T> f = (Vector<T>)((bits & fraction) + R::sqrt_half) - T(1);
  const T round = R::round;
  typename R::Bits round_bits;
  __builtin_memcpy(&round_bits, &round, sizeof round);
  const Vector<T> exponent = (Vector<T>)((bits >> R::fraction_bits) + round_bits) - R::round;
  const Vector<T> n = exponent - (tiny ? all(T(R::exponent_bias) + (R::fraction_bits + 2))
                                       : all(T(R::exponent_bias)));
  const Vector<T> s = f / (f + T(2)), square = s * s;
  const Vector<T> half = f * f * T(0.5);
  const Vector<T> low = s * (half + square * polynomial<T>(square, R::log)) + n * R::ln2_low;
  Vector<T> y = n * R::ln2_high - ((half - low) - f);
  y = x == T(0) ? all(-R::infinity) : y;
  y = x == R::infinity ? x : y;
  return x < T(0) ? all(R::infinity - R::infinity) : (x != x ? x : y);
}

// 128 bytes of numbers, added up in one order on every ISA.
template <class T>
struct Lanes {
  static constexpr index_t width = vector_bytes / index_t(sizeof(T));
  static constexpr index_t vectors = accumulator_bytes / vector_bytes;
  static constexpr index_t count = width * vectors;
  Vector<T> vector[vectors] = {};

  T sum() const {
    T lane[count];
    __builtin_memcpy(lane, vector, sizeof lane);
    for (index_t half = count / 2; half > 0; half /= 2) {
      for (index_t k = 0; k < half; ++k) lane[k] += lane[k + half];
    }
    return lane[0];
  }
};

// Calls step(from, to) for every Lanes<T>::count elements of rows that are walked side by side.
// What is left at the end comes in a copy, filled up with -inf in the first row, the logits, and
// zeros in the others.
template <class T, int inputs, class Step>
void along(const T* const (&rows)[inputs], T* out, index_t begin, index_t end, const Step& step) {
  constexpr index_t count = Lanes<T>::count;
  const T* from[inputs];
  index_t i = begin;
  for (; i + count <= end; i += count) {
    for (int r = 0; r < inputs; ++r) from[r] = rows[r] + i;
    step(from, out + i);
  }
  if (i == end) return;
  T rest[inputs][count], rest_out[count];
  for (int r = 0; r < inputs; ++r) {
    const T padding = r == 0 ? -Real<T>::infinity : T(0);
    for (index_t k = 0; k < count; ++k) rest[r][k] = i + k < end ? rows[r][i + k] : padding;
    from[r] = rest[r];
  }
  step(from, rest_out);
  for (index_t k = 0; i + k < end; ++k) out[i + k] = rest_out[k];
}

template <class T>
Vector<T> larger(Vector<T> x, Vector<T> y) {
  return x > y ? x : y;
}

template <class T>
T row_maximum(const T* x, index_t n) {
  constexpr index_t width = Lanes<T>::width;
  Lanes<T> largest;
  for (Vector<T>& v : largest.vector) v = all(-Real<T>::infinity);
  index_t i = 0;
  for (; i + Lanes<T>::count <= n; i += Lanes<T>::count) {
    for (index_t r = 0; r < Lanes<T>::vectors; ++r) {
      largest.vector[r] = larger<T>(load<Vector<T>>(x + i + r * width), largest.vector[r]);
    }
  }
  T result = -Real<T>::infinity;
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  for (const Vector<T>& v : largest.vector) {
    for (index_t k = 0; k < width; ++k) result = v[k] > result ? v[k] : result;
  }
  return result;
}

// What a row is compared with: its loss is sum_c q_c (log(sum(exp(x))) - x_c). The rows beside the
// logits x are, for labels, none: q is class_weight at the label; for smoothed ones `base`, which
// is added to that; for probabilities p these, class_weight and base: q = class_weight p + base.
enum Target { labels = 1, smoothed = 2, probabilities = 4 };

template <class T>
struct RowSums {
  T exp = 0, q = 0, q_x = 0;  // of exp(x - max), q, and q (x - max)
};

template <class T>
Vector<T> unless_zero(Vector<T> q, Vector<T> x) {
  return q == T(0) ? q : q * x;  // 0 log(0) is 0
}

// out = exp(x - max), and the sums.
template <class T, int inputs>
RowSums<T> exp_row(const T* const (&rows)[inputs], T max, T* out, index_t n) {
  constexpr index_t width = Lanes<T>::width;
  double sum = 0, q_sum = 0, q_x_sum = 0;
  for (index_t begin = 0; begin < n; begin += block) {
    Lanes<T> sums, q_sums, q_x_sums;
    along(rows, out, begin, n - begin < block ? n : begin + block,
          [&](const T* const(&from)[inputs], T* to) {
            for (index_t r = 0; r < Lanes<T>::vectors; ++r) {
              const Vector<T> x = load<Vector<T>>(from[0] + r * width) - max, y = exp<T>(x);
              store<false>(to + r * width, y);
              sums.vector[r] += y;
              if constexpr (inputs > 1) {
                Vector<T> q = load<Vector<T>>(from[1] + r * width);
                if constexpr (inputs == 4) {
                  q = q * load<Vector<T>>(from[2] + r * width) +
                      load<Vector<T>>(from[3] + r * width);
                  q_sums.vector[r] += q;
                }
                q_x_sums.vector[r] += unless_zero<T>(q, x);
              }
            }
          });
    sum += double(sums.sum());
    if constexpr (inputs == 4) q_sum += double(q_sums.sum());
    if constexpr (inputs > 1) q_x_sum += double(q_x_sums.sum());
  }
  return {T(sum), T(q_sum), T(q_x_sum)};
}

// Rows of so many classes are worked on across the rows.
constexpr index_t few_classes = 128;
template <class T>
using FewClasses = Tile<T, few_classes>;

// Sums of parts are added: one long sum would round as often as it has terms.
template <class Visit>
void in_parts(index_t columns, Visit visit) {
  constexpr index_t part = 16;
  for (index_t begin = 0; begin < columns; begin += part) {
    visit(begin, begin + part < columns ? begin + part : columns);
  }
}

template <class T>
Vector<T> column_maximum(const FewClasses<T>& tile, index_t columns) {
  Vector<T> largest = tile.column[0];
  for (index_t c = 1; c < columns; ++c) largest = larger<T>(tile.column[c], largest);
  return largest;
}

template <class T, bool logarithm>
void softmax(const void* x_data, void* y_data, index_t rows, index_t columns) {
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  if (columns <= few_classes) {
    constexpr index_t width = FewClasses<T>::rows;
    for (index_t row = 0; row < rows; row += width) {
      const index_t count = rows - row < width ? rows - row : width;
      FewClasses<T> tile;
      load_columns(x + row * columns, rows - row, columns, tile);
      const Vector<T> max = column_maximum(tile, columns);
      Vector<T> sum{};
      in_parts(columns, [&](index_t begin, index_t end) {
        Vector<T> part{};
        for (index_t c = begin; c < end; ++c) {
          const Vector<T> shifted = tile.column[c] - max, e = exp<T>(shifted);
          part += e;
          tile.column[c] = logarithm ? shifted : e;
        }
        sum += part;
      });
      const Vector<T> normalizer = logarithm ? log<T>(sum) : T(1) / sum;
      for (index_t c = 0; c < columns; ++c) {
        Vector<T>& v = tile.column[c];
        v = logarithm ? v - normalizer : v * normalizer;
      }
      store_columns(tile, y + row * columns, count, columns);
    }
    return;
  }
  for (; rows > 0; --rows, x += columns, y += columns) {
    const T max = row_maximum(x, columns);
    if constexpr (logarithm) {
      T scratch[block];
      double sum = 0;
      for (index_t begin = 0; begin < columns; begin += block) {
        const index_t n = columns - begin < block ? columns - begin : block;
        const T* const from[] = {x + begin};
        sum += double(exp_row(from, max, scratch, n).exp);
      }
      const T normalizer = log<T>(all(T(sum)))[0];
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) y[c] = (x[c] - max) - normalizer;
    } else {
      const T* const from[] = {x};
      const T normalizer = T(1) / exp_row(from, max, y, columns).exp;
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) y[c] *= normalizer;
    }
  }
}

template <class T, Target target>
void cross_entropy_few(const CrossEntropy& task, index_t begin, index_t end) {
  constexpr index_t width = FewClasses<T>::rows;
  const index_t columns = task.columns;
  const T scale = T(task.scale);
  const T* const class_weight = static_cast<const T*>(task.class_weight);
  const T* const base = static_cast<const T*>(task.base);
  for (index_t row = begin; row < end; row += width) {
    const index_t count = end - row < width ? end - row : width;
    const T* const x = static_cast<const T*>(task.logits) + row * columns;
    T* const gradient = static_cast<T*>(task.gradient) + row * columns;
    FewClasses<T> tile, q_tile;
    load_columns(x, end - row, columns, tile);
    if constexpr (target == probabilities) {
      load_columns(static_cast<const T*>(task.probabilities) + row * columns, end - row, columns,
                   q_tile);
    }
    const Vector<T> max = column_maximum(tile, columns);
    Vector<T> sum{}, q_sum{}, q_x_sum{};
    if constexpr (target != probabilities) {
      Vector<T> label_x{};
      for (index_t r = 0; r < count; ++r) {
        const index_t label = task.labels[row + r];
        if (label == task.ignored) continue;
        label_x[r] = x[r * columns + label];
        q_sum[r] = class_weight[label];
      }
      q_x_sum = unless_zero<T>(q_sum, label_x - max);
      q_sum += T(task.base_sum);
    }
    in_parts(columns, [&](index_t first, index_t last) {
      Vector<T> part{}, q_part{}, q_x_part{};
      for (index_t c = first; c < last; ++c) {
        const Vector<T> shifted = tile.column[c] - max;
        tile.column[c] = exp<T>(shifted);
        part += tile.column[c];
        if constexpr (target == smoothed) q_x_part += unless_zero<T>(all(base[c]), shifted);
        if constexpr (target == probabilities) {
          q_tile.column[c] = q_tile.column[c] * class_weight[c] + base[c];
          q_part += q_tile.column[c];
          q_x_part += unless_zero<T>(q_tile.column[c], shifted);
        }
      }
      sum += part;
      q_sum += q_part;
      q_x_sum += q_x_part;
    });
    const Vector<T> losses = q_sum * log<T>(sum) - q_x_sum, factor = q_sum * scale / sum;
    for (index_t c = 0; c < columns; ++c) {
      tile.column[c] *= factor;
      if constexpr (target == smoothed) tile.column[c] -= scale * base[c];
      if constexpr (target == probabilities) tile.column[c] -= scale * q_tile.column[c];
    }
    store_columns(tile, gradient, count, columns);
    for (index_t r = 0; r < count; ++r) {
      T& loss = static_cast<T*>(task.losses)[row + r];
      loss = losses[r];
      if constexpr (target != probabilities) {
        const index_t label = task.labels[row + r];
        if (label == task.ignored) {
          loss = 0;
          for (index_t c = 0; c < columns; ++c) gradient[r * columns + c] = 0;
        } else {
          gradient[r * columns + label] -= scale * class_weight[label];
        }
      }
    }
  }
}

template <class T, Target target>
void cross_entropy_rows(const CrossEntropy& task, index_t begin, index_t end) {
  const index_t columns = task.columns;
  const T scale = T(task.scale);
  const T* const class_weight = static_cast<const T*>(task.class_weight);
  const T* const base = static_cast<const T*>(task.base);
  for (index_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(task.logits) + row * columns;
    T* const gradient = static_cast<T*>(task.gradient) + row * columns;
    T& loss = static_cast<T*>(task.losses)[row];
    const index_t label = target == probabilities ? 0 : task.labels[row];
    if (target != probabilities && label == task.ignored) {
      loss = 0;
      for (index_t c = 0; c < columns; ++c) gradient[c] = 0;
      continue;
    }
    const T max = row_maximum(x, columns);
    RowSums<T> sums;
    if constexpr (target == probabilities) {
      const T* const p = static_cast<const T*>(task.probabilities) + row * columns;
      const T* const from[] = {x, p, class_weight, base};
      sums = exp_row(from, max, gradient, columns);
      const T factor = sums.q * scale / sums.exp;
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) {
        gradient[c] = gradient[c] * factor - scale * (p[c] * class_weight[c] + base[c]);
      }
    } else {
      const T q = class_weight[label], label_x = x[label] - max;
      const T q_x = q == 0 ? q : q * label_x;
      if constexpr (target == smoothed) {
        const T* const from[] = {x, base};
        sums = exp_row(from, max, gradient, columns);
      } else {
        const T* const from[] = {x};
        sums = exp_row(from, max, gradient, columns);
      }
      sums.q = q + T(task.base_sum);
      sums.q_x += q_x;
      const T factor = sums.q * scale / sums.exp;
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) {
        gradient[c] = gradient[c] * factor;
        if constexpr (target == smoothed) gradient[c] -= scale * base[c];
      }
      gradient[label] -= scale * q;
    }
    loss = sums.q * log<T>(all(sums.exp))[0] - sums.q_x;
  }
}

template <class T>
void cross_entropy(const CrossEntropy& task, index_t begin, index_t end) {
  const bool few = task.columns <= few_classes;
  const auto run =
      task.probabilities != nullptr
          ? (few ? cross_entropy_few<T, probabilities> : cross_entropy_rows<T, probabilities>)
      : task.base != nullptr
          ? (few ? cross_entropy_few<T, smoothed> : cross_entropy_rows<T, smoothed>)
          : (few ? cross_entropy_few<T, labels> : cross_entropy_rows<T, labels>);
  run(task, begin, end);
}

template <class T, Vector<T> (*function)(Vector<T>)>
void elementwise(const void* x_data, void* y_data, index_t n) {
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  const T* const from[] = {x};
  along(from, y, 0, n, [](const T* const(&in)[1], T* out) {
    for (index_t r = 0; r < Lanes<T>::vectors; ++r) {
      store<false>(out + r * Lanes<T>::width,
                   function(load<Vector<T>>(in[0] + r * Lanes<T>::width)));
    }
  });
}

// y = factor (x - target), and the sums of (x - target)^2 by block as SquareSum has them.
template <class T>
void residual(double factor, const void* x_data, const void* target_data, void* y_data, index_t n,
              double (*sums)[2]) {
  const T* x = static_cast<const T*>(x_data);
  const T* target = static_cast<const T*>(target_data);
  T* y = static_cast<T*>(y_data);
  const T scale = T(factor);
  T difference[block];
  for (index_t begin = 0; begin < n; begin += block, ++sums) {
    const index_t count = n - begin < block ? n - begin : block;
#pragma omp simd
    for (index_t i = 0; i < count; ++i) {
      difference[i] = target == nullptr ? x[begin + i] : x[begin + i] - target[begin + i];
    }
    sum_squares<T>(1.0, difference, count, sums);
#pragma omp simd
    for (index_t i = 0; i < count; ++i) y[begin + i] = scale * difference[i];
  }
}
