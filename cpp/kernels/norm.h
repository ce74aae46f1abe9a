// Normalization: the inner loops. Included by kernels.cpp inside the namespace of one ISA.
//
// Statistics never come from raw sums of squares: a block of about a thousand elements is summed
// around the mean of the blocks before it (the first around that of its first elements), so nothing
// cancels, and blocks are merged in double (Chan, Golub, LeVeque, 1979). Blocks are fixed by the
// shape alone.
//
// Forward is y = (x - center) scale + shift, where center is the mean as a T, and the rest of the
// mean sits in the shift; backward is dx = a dy + b (x - center) + c.

template <class T>
constexpr index_t width_of = vector_bytes / index_t(sizeof(T));
template <class T>
constexpr index_t lanes_of = accumulator_bytes / index_t(sizeof(T));
constexpr int registers = accumulator_bytes / vector_bytes;

// So many numbers on every ISA.
template <class T, index_t n>
using Pack [[gnu::vector_size(n * sizeof(T))]] = T;

constexpr index_t prefetch_bytes = 4096;

// Into the second cache: rows a power of two apart would push each other out of the first one.
inline void prefetch_to_l2(const void* data) {
  __builtin_prefetch(data, 0, 2);
}

// Streamed stores become visible to other threads.
inline void end_of_stream() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// y[i] = f<V>(i) for i < n, vector by vector.
template <class T, bool stream, class F>
void map(index_t n, T* y, F f) {
  constexpr index_t width = width_of<T>;
  index_t i = 0;
  if constexpr (stream) {
    const auto address = reinterpret_cast<__UINTPTR_TYPE__>(y);
    const index_t head = index_t(-address % vector_bytes / sizeof(T));
    for (; i < head && i < n; ++i) y[i] = f.template operator()<T>(i);
  }
  for (; i + width <= n; i += width) {
    store<stream>(y + i, f.template operator()<Vector<T>>(i));
  }
  for (; i < n; ++i) y[i] = f.template operator()<T>(i);
}

// As in torch, a NaN passes.
template <class V>
V rectify(V y) {
  return y <= 0 ? V{} : y;
}
template <class V>
V rectified_gradient(V y, V dy) {
  return y <= 0 ? V{} : dy;
}

// Not returned: vectors wider than a register have no settled way to be.
template <class Whole, class Half>
void add_halves(const Whole& whole, Half& sum) {
  Half halves[2];
  __builtin_memcpy(halves, &whole, sizeof whole);
  sum = halves[0] + halves[1];
}

// 128 bytes of sums; lane k adds the elements k, k + lanes, ... of each run on every ISA, and the
// last lanes of a run are its last elements.
template <class T>
struct Sums {
  Vector<T> part[registers] = {};

  // In T down to eight sums, then in double.
  double total() const {
    Vector<T> folded[registers];
    unrolled<registers>([&](auto r) { folded[r] = part[r]; });
    fold<registers / 2>(folded);
    Pack<T, 8> sums;
    if constexpr (sizeof sums < vector_bytes) {
      add_halves(folded[0], sums);
    } else {
      __builtin_memcpy(&sums, folded, sizeof sums);
    }
    const auto eight = __builtin_convertvector(sums, Pack<double, 8>);
    Pack<double, 4> four;
    Pack<double, 2> two;
    add_halves(eight, four);
    add_halves(four, two);
    return two[0] + two[1];
  }

 private:
  template <int n>
  static void fold(Vector<T>* folded) {
    if constexpr (n * vector_bytes >= index_t(sizeof(Pack<T, 8>))) {
      unrolled<n>([=](auto r) { folded[r] += folded[r + n]; });
      fold<n / 2>(folded);
    }
  }
};

// The last elements of a run, which do not fill the lanes: read as the last lanes of the run, of
// which those already counted are masked out.
template <class T>
struct Tail {
  using Mask = decltype(Vector<T>{} < Vector<T>{});

  // As many zeros as lanes, then as many ones.
  struct Edge {
    decltype(+Mask{}[0]) value[2 * lanes_of<T>] = {};
    constexpr Edge() {
      for (index_t k = lanes_of<T>; k < 2 * lanes_of<T>; ++k) value[k] = -1;
    }
  };
  static constexpr Edge edge{};

  explicit Tail(index_t run) : n(run), begin(n - n % lanes_of<T>) {
    const auto* const from = edge.value + n % lanes_of<T>;
    unrolled<registers>([&](auto r) { mask[r] = load<Mask>(from + r * width_of<T>); });
  }

  index_t n, begin;
  Mask mask[registers];
};

// Calls add(r, read, keep, prefetch) for every register r of every 128 bytes of a run: read(x)
// gives its elements of the array x, keep(v) makes those zero that are not to be counted, and
// prefetch(x) fetches the same place of the array x where that is a new cache line.
template <class T, class Add>
void each_lane(const Tail<T>& tail, Add add, index_t begin = 0) {
  constexpr index_t width = width_of<T>;
  for (index_t i = begin; i < tail.begin; i += lanes_of<T>) {
    unrolled<registers>([&](auto r) {
      add(
          r, [=](const T* x) { return load<Vector<T>>(x + i + r * width); },
          [](Vector<T> v) { return v; },
          [=](const T* x) {
            if (r * vector_bytes % line_bytes == 0) prefetch_to_l2(x + i + r * width);
          });
    });
  }
  if (tail.begin == tail.n) return;
  unrolled<registers>([&](auto r) {
    add(
        r, [&](const T* x) { return load<Vector<T>>(x + tail.n - lanes_of<T> + r * width); },
        [&](Vector<T> v) {
          return reinterpret_cast<Vector<T>>(reinterpret_cast<typename Tail<T>::Mask>(v) &
                                             tail.mask[r]);
        },
        [](const T*) {});
  });
}

// How far ahead to prefetch, in elements: the next run, where runs are neither too short nor too
// long for that.
template <class T>
index_t ahead_of(Runs runs) {
  const index_t bytes = runs.inner * index_t(sizeof(T));
  return bytes >= prefetch_bytes / 2 && bytes <= 8 * prefetch_bytes
             ? runs.stride
             : prefetch_bytes / index_t(sizeof(T));
}

// The blocks of a statistic: whole runs as long as they fit, else equal parts of one. A run is no
// shorter than the lanes.
template <class T>
struct Blocks {
  Runs runs;
  index_t group = 1, length;
  Tail<T> part, last_part;

  explicit Blocks(Runs r) : runs(r), length(length_of(r.inner)), part(length), last_part(rest()) {
    if (runs.inner < block && runs.count > 1) group = block / runs.inner;
  }

  // Calls visit(first element, runs, the elements of each run).
  template <class Visit>
  void each(Visit visit) const {
    if (group > 1) {
      for (index_t run = 0; run < runs.count; run += group) {
        visit(run * runs.stride, run + group <= runs.count ? group : runs.count - run, part);
      }
      return;
    }
    for (index_t run = 0; run < runs.count; ++run) {
      for (index_t i = 0; i < runs.inner; i += length) {
        visit(run * runs.stride + i, Constant<1>{}, i + length < runs.inner ? part : last_part);
      }
    }
  }

 private:
  static index_t length_of(index_t inner) {
    if (inner < block) return inner;
    const index_t parts = (inner + block / 2) / block;
    const index_t even = (inner + parts - 1) / parts;
    return (even + lanes_of<T> - 1) / lanes_of<T> * lanes_of<T>;
  }

  index_t rest() const {
    const index_t over = runs.inner % length;
    return over == 0 ? length : over;
  }
};

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

// Turns flags into constants: call(true or false as types...).
template <bool value>
struct Flag {
  constexpr operator bool() const { return value; }
};
template <class Call>
void with_flags(Call call) {
  call();
}
template <class Call, class... More>
void with_flags(Call call, bool flag, More... more) {
  const auto next = [&](auto constant) {
    with_flags([&](auto... rest) { call(constant, rest...); }, more...);
  };
  flag ? next(Flag<true>{}) : next(Flag<false>{});
}

// --- statistics along rows ---

template <class T>
void apply(const Forward& f, Runs runs, index_t coefficient_stride) {
  with_flags(
      [&](auto relu, auto with_residual, auto stream) {
        for (index_t run = 0; run < runs.count; ++run) {
          const index_t at = run * runs.stride, c = run * coefficient_stride;
          const T* const x = static_cast<const T*>(f.x) + at;
          const T* const residual = with_residual ? static_cast<const T*>(f.residual) + at : x;
          const T center = static_cast<const T*>(f.center)[c];
          const T scale = static_cast<const T*>(f.scale)[c];
          const T shift = static_cast<const T*>(f.shift)[c];
          map<T, stream>(runs.inner, static_cast<T*>(f.y) + at, [=]<class V>(index_t i) {
            V y = (load<V>(x + i) - center) * scale + shift;
            if constexpr (with_residual) y += load<V>(residual + i);
            if constexpr (relu) y = rectify(y);
            return y;
          });
        }
        if (stream) end_of_stream();
      },
      f.relu, f.residual != nullptr, f.stream);
}

// What reaches the normalization through the activation.
template <class T, bool relu, bool from_y, class V, class C>
V through(V dy, V x, const T* y, C scale, C shift) {
  if constexpr (!relu) {
    return dy;
  } else if constexpr (from_y) {
    return rectified_gradient(load<V>(y), dy);
  } else {
    return rectified_gradient(V(x * scale + shift), dy);
  }
}

// Sums of dy and products dy (x - center) of every statistic, each with its coefficients.
template <class T>
void gradient_sums(const Backward& b, Runs runs, index_t statistics, index_t apart, double* sums,
                   double* products) {
  const index_t ahead = ahead_of<T>(runs);
  const Blocks<T> blocks(runs);
  with_flags(
      [&](auto relu, auto from_y) {
        for (index_t i = 0; i < statistics; ++i) {
          const T* const dy = static_cast<const T*>(b.dy) + i * apart;
          const T* const x = static_cast<const T*>(b.x) + i * apart;
          const T* const y = from_y ? static_cast<const T*>(b.y) + i * apart : x;
          const T center = static_cast<const T*>(b.center)[i];
          const T scale = relu ? static_cast<const T*>(b.scale)[i] : T(0);
          const T shift = relu ? static_cast<const T*>(b.shift)[i] : T(0);
          double dy_total = 0, product_total = 0;
          blocks.each([&](index_t begin, auto count, const Tail<T>& tail) {
            Sums<T> sum, product;
            for (index_t run = 0; run < count; ++run) {
              const index_t at = begin + run * runs.stride;
              each_lane<T>(tail, [&](auto r, auto read, auto keep, auto prefetch) {
                prefetch(x + at + ahead);
                prefetch(dy + at + ahead);
                const Vector<T> d = read(x + at) - center;
                Vector<T> g = read(dy + at);
                if constexpr (relu) {
                  const Vector<T> v = from_y ? read(y + at) : d * scale + shift;
                  g = rectified_gradient(v, g);
                }
                sum.part[r] += keep(g);
                product.part[r] += keep(g * d);
              });
            }
            dy_total += sum.total();
            product_total += product.total();
          });
          sums[i] = dy_total;
          products[i] = product_total;
        }
      },
      b.relu, b.y != nullptr);
}

template <class T>
void gradient_apply(const Backward& b, Runs runs, index_t coefficient_stride) {
  with_flags(
      [&](auto relu, auto from_y, auto with_residual, auto stream) {
        for (index_t run = 0; run < runs.count; ++run) {
          const index_t at = run * runs.stride, c = run * coefficient_stride;
          const T* const dy = static_cast<const T*>(b.dy) + at;
          const T* const x = static_cast<const T*>(b.x) + at;
          const T* const y = from_y ? static_cast<const T*>(b.y) + at : x;
          T* const dresidual = with_residual ? static_cast<T*>(b.dresidual) + at : nullptr;
          const auto coefficient = [=](const void* array) {
            return static_cast<const T*>(array)[c];
          };
          const T center = coefficient(b.center), on_dy = coefficient(b.on_dy);
          const T on_x = coefficient(b.on_x), constant = coefficient(b.constant);
          const T scale = relu ? coefficient(b.scale) : T(0);
          const T shift = relu ? coefficient(b.shift) : T(0);
          map<T, stream>(runs.inner, static_cast<T*>(b.dx) + at, [=]<class V>(index_t i) {
            const V d = load<V>(x + i) - center;
            const V g = through<T, relu, from_y>(load<V>(dy + i), d, y + i, scale, shift);
            if constexpr (with_residual) store<false>(dresidual + i, g);
            return V((g * on_dy + d * on_x) + constant);
          });
        }
        if (stream) end_of_stream();
      },
      b.relu, b.y != nullptr, b.dresidual != nullptr, b.stream);
}

// --- statistics along columns: rows of `columns` neighbours, `stride` apart ---

// Sums in T are moved to double after this many rows.
constexpr index_t block_rows = 64;
constexpr index_t center_rows = 8;  // of the first block, for its center

// Where to prefetch while column c of row k in a group of four rows is read, in elements from the
// group's first: rows without gaps are prefetched in the order of memory, as DRAM likes it.
template <class T>
struct RowsAhead {
  index_t distance, per_column, per_row;

  RowsAhead(index_t stride, index_t columns)
      : per_column(stride == columns ? 4 : 1), per_row(stride == columns ? width_of<T> : stride) {
    const index_t group = 4 * columns * index_t(sizeof(T));
    distance = (2 * prefetch_bytes + group - 1) / group * (4 * stride);
  }

  index_t operator()(index_t c, index_t k) const { return distance + c * per_column + k * per_row; }
};

// Calls visit(row, Flag) for groups of four rows (true) and then single ones.
template <class Visit>
void four_rows(index_t begin, index_t end, Visit visit) {
  for (; begin + 4 <= end; begin += 4) visit(begin, Flag<true>{});
  for (; begin < end; ++begin) visit(begin, Flag<false>{});
}

template <class T>
void column_moments(const void* data, index_t rows, index_t stride, index_t columns,
                    double* __restrict mean, double* __restrict m2, void* scratch) {
  const T* const x = static_cast<const T*>(data);
  T* __restrict const center = static_cast<T*>(scratch);
  T* __restrict const sum = center + columns;
  T* __restrict const square = sum + columns;
  const RowsAhead<T> ahead(stride, columns);
  const auto clear = [=](T* values) {
    for (index_t c = 0; c < columns; ++c) values[c] = 0;
  };
  for (index_t begin = 0; begin < rows; begin += block_rows) {
    const index_t end = begin + block_rows <= rows ? begin + block_rows : rows;
    const double count = double(end - begin), counted = double(begin);
    if (begin == 0) {
      // The mean of a few rows from all over the block: its distance from the block's mean costs
      // three bits at most, because those rows' own deviations are part of the sum.
      const index_t some = rows < center_rows ? rows : center_rows;
      clear(center);
      for (index_t k = 0; k < some; ++k) {
        const T* __restrict const row = x + k * end / some * stride;
#pragma omp simd
        for (index_t c = 0; c < columns; ++c) center[c] += row[c];
      }
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) center[c] /= T(some);
    }
    clear(sum);
    clear(square);
    four_rows(begin, end, [=](index_t r, auto four) {
      const T* const row = x + r * stride;
      constexpr index_t count = four ? 4 : 1;
      map<T, false>(columns, sum, [=]<class V>(index_t c) {
        V d[count];
        for (index_t k = 0; k < count; ++k) {
          prefetch_to_l2(row + ahead(c, k));
          d[k] = load<V>(row + k * stride + c) - load<V>(center + c);
        }
        if constexpr (four) {
          store<false>(square + c, V(load<V>(square + c) +
                                     ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]))));
          return V(load<V>(sum + c) + ((d[0] + d[1]) + (d[2] + d[3])));
        } else {
          store<false>(square + c, V(load<V>(square + c) + d[0] * d[0]));
          return V(load<V>(sum + c) + d[0]);
        }
      });
    });
    const double inverse = 1 / count;
    const double weight = count / (counted + count), both = counted * weight;
#pragma omp simd
    for (index_t c = 0; c < columns; ++c) {
      const double d = double(sum[c]) * inverse;
      const double block_mean = double(center[c]) + d;
      const double cancelled = double(square[c]) - d * d * count;
      const double block_m2 = cancelled < 0 ? 0 : cancelled;
      const double known_mean = begin == 0 ? block_mean : mean[c];
      const double known_m2 = begin == 0 ? 0 : m2[c];
      const double delta = block_mean - known_mean;
      mean[c] = known_mean + delta * weight;
      m2[c] = known_m2 + block_m2 + delta * delta * both;
      center[c] = T(mean[c]);
    }
  }
  for (index_t c = 0; c < columns; ++c) {
    if (!finite(m2[c])) {
      moments_of_huge(x + c, {rows, stride, 1}, true, mean + c, m2 + c);
    }
  }
}

// f<V>(element, column) for every element, y's stores streamed or not. Streamed rows that lie one
// after the other are one run: the columns' coefficients go on past the last one with the first.
template <class T, bool stream, class F>
void map_columns(index_t rows, index_t stride, index_t columns, T* y, F f) {
  if (stream && stride == columns) {
    index_t column = 0;
    map<T, stream>(rows * columns, y, [&]<class V>(index_t i) {
      const index_t c = column;
      column += index_t(sizeof(V) / sizeof(T));
      while (column >= columns) column -= columns;
      return f.template operator()<V>(i, c);
    });
    return;
  }
  for (index_t row = 0; row < rows; ++row) {
    const index_t at = row * stride;
    map<T, stream>(columns, y + at,
                   [=]<class V>(index_t c) { return f.template operator()<V>(at + c, c); });
  }
}

template <class T>
void column_apply(const Forward& f, index_t rows, index_t stride, index_t columns) {
  const T* const x = static_cast<const T*>(f.x);
  const T* const residual = static_cast<const T*>(f.residual);
  const T* const center = static_cast<const T*>(f.center);
  const T* const scale = static_cast<const T*>(f.scale);
  const T* const shift = static_cast<const T*>(f.shift);
  with_flags(
      [&](auto relu, auto with_residual, auto stream) {
        map_columns<T, stream>(
            rows, stride, columns, static_cast<T*>(f.y), [=]<class V>(index_t i, index_t c) {
              V y =
                  (load<V>(x + i) - load<V>(center + c)) * load<V>(scale + c) + load<V>(shift + c);
              if constexpr (with_residual) y += load<V>(residual + i);
              if constexpr (relu) y = rectify(y);
              return y;
            });
        if (stream) end_of_stream();
      },
      f.relu, f.residual != nullptr, f.stream);
}

template <class T>
void column_gradient_sums(const Backward& b, index_t rows, index_t stride, index_t columns,
                          double* __restrict sums, double* __restrict products, void* scratch) {
  const T* const all_dy = static_cast<const T*>(b.dy);
  const T* const all_x = static_cast<const T*>(b.x);
  const T* const all_y = static_cast<const T*>(b.y);
  const T* __restrict const center = static_cast<const T*>(b.center);
  const T* __restrict const scale = static_cast<const T*>(b.scale);
  const T* __restrict const shift = static_cast<const T*>(b.shift);
  T* __restrict const sum = static_cast<T*>(scratch);
  T* __restrict const product = sum + columns;
  const RowsAhead<T> ahead(stride, columns);
  for (index_t c = 0; c < columns; ++c) sums[c] = products[c] = 0;
  with_flags(
      [&](auto relu, auto from_y) {
        for (index_t begin = 0; begin < rows; begin += block_rows) {
          const index_t end = begin + block_rows <= rows ? begin + block_rows : rows;
          for (index_t c = 0; c < columns; ++c) sum[c] = product[c] = 0;
          four_rows(begin, end, [=](index_t r, auto four) {
            const T* __restrict const dy = all_dy + r * stride;
            const T* __restrict const x = all_x + r * stride;
            const T* __restrict const y = from_y ? all_y + r * stride : x;
            constexpr index_t count = four ? 4 : 1;
            map<T, false>(columns, sum, [=]<class V>(index_t c) {
              V g[count], gd[count];
              for (index_t k = 0; k < count; ++k) {
                const index_t i = c + k * stride;
                prefetch_to_l2(x + ahead(c, k));
                prefetch_to_l2(dy + ahead(c, k));
                const V d = load<V>(x + i) - load<V>(center + c);
                if constexpr (relu) {
                  g[k] = through<T, relu, from_y>(load<V>(dy + i), d, y + i, load<V>(scale + c),
                                                  load<V>(shift + c));
                } else {
                  g[k] = load<V>(dy + i);
                }
                gd[k] = g[k] * d;
              }
              if constexpr (four) {
                store<false>(product + c,
                             V(load<V>(product + c) + ((gd[0] + gd[1]) + (gd[2] + gd[3]))));
                return V(load<V>(sum + c) + ((g[0] + g[1]) + (g[2] + g[3])));
              } else {
                store<false>(product + c, V(load<V>(product + c) + gd[0]));
                return V(load<V>(sum + c) + g[0]);
              }
            });
          });
#pragma omp simd
          for (index_t c = 0; c < columns; ++c) {
            sums[c] += double(sum[c]);
            products[c] += double(product[c]);
          }
        }
      },
      b.relu, b.y != nullptr);
}

template <class T>
void column_gradient_apply(const Backward& b, index_t rows, index_t stride, index_t columns) {
  const T* const dy = static_cast<const T*>(b.dy);
  const T* const x = static_cast<const T*>(b.x);
  const T* const y = static_cast<const T*>(b.y);
  T* const dresidual = static_cast<T*>(b.dresidual);
  const T* const center = static_cast<const T*>(b.center);
  const T* const scale = static_cast<const T*>(b.scale);
  const T* const shift = static_cast<const T*>(b.shift);
  const T* const on_dy = static_cast<const T*>(b.on_dy);
  const T* const on_x = static_cast<const T*>(b.on_x);
  const T* const constant = static_cast<const T*>(b.constant);
  with_flags(
      [&](auto relu, auto from_y, auto with_residual, auto stream) {
        map_columns<T, stream>(
            rows, stride, columns, static_cast<T*>(b.dx), [=]<class V>(index_t i, index_t c) {
              const V d = load<V>(x + i) - load<V>(center + c);
              V g = load<V>(dy + i);
              if constexpr (relu) {
                g = through<T, relu, from_y>(g, d, y + i, load<V>(scale + c), load<V>(shift + c));
              }
              if constexpr (with_residual) store<false>(dresidual + i, g);
              return V((g * load<V>(on_dy + c) + d * load<V>(on_x + c)) + load<V>(constant + c));
            });
        if (stream) end_of_stream();
      },
      b.relu, b.y != nullptr, b.dresidual != nullptr, b.stream);
}

// --- gamma and beta per element of a row (layer and RMS normalization, groups of short runs): rows
// of n elements; those of the next row are `apart` from those of this one ---

template <class T>
void row_apply(const Forward& f, const void* gamma_data, const void* beta_data, index_t apart,
               index_t rows, index_t n) {
  with_flags(
      [&](auto with_gamma, auto with_beta, auto stream) {
        for (index_t row = 0; row < rows; ++row) {
          const T* const x = static_cast<const T*>(f.x) + row * n;
          const T* const gamma = static_cast<const T*>(gamma_data) + (with_gamma ? row * apart : 0);
          const T* const beta = static_cast<const T*>(beta_data) + (with_beta ? row * apart : 0);
          const T center = static_cast<const T*>(f.center)[row];
          const T scale = static_cast<const T*>(f.scale)[row];
          const T shift = static_cast<const T*>(f.shift)[row];
          map<T, stream>(n, static_cast<T*>(f.y) + row * n, [=]<class V>(index_t i) {
            V y = (load<V>(x + i) - center) * scale + shift;
            if constexpr (with_gamma) y *= load<V>(gamma + i);
            if constexpr (with_beta) y += load<V>(beta + i);
            return y;
          });
        }
        if (stream) end_of_stream();
      },
      gamma_data != nullptr, beta_data != nullptr, f.stream);
}

// As gradient_sums, of gamma dy.
template <class T>
void row_gradient_sums(const Backward& b, const void* gamma_data, index_t apart, index_t rows,
                       index_t n, double* sums, double* products) {
  const T* const all_dy = static_cast<const T*>(b.dy);
  const T* const all_x = static_cast<const T*>(b.x);
  const T* const centers = static_cast<const T*>(b.center);
  const T* const all_gamma = static_cast<const T*>(gamma_data);
  with_flags(
      [&](auto with_gamma, auto few) {
        if constexpr (few) {
          constexpr index_t height = FewColumns<T>::rows;
          FewColumns<T> dy, x, gamma;
          for (index_t row = 0; row < rows; row += height) {
            const index_t count = row + height <= rows ? height : rows - row;
            load_columns(all_dy + row * n, rows - row, n, dy);
            load_columns(all_x + row * n, rows - row, n, x);
            if constexpr (with_gamma) {
              if (apart == n) load_columns(all_gamma + row * n, rows - row, n, gamma);
              if (apart == 0 && row == 0) {
                for (index_t c = 0; c < n; ++c) gamma.column[c] = Vector<T>{} + all_gamma[c];
              }
            }
            T center[height] = {}, sum_of[height], product_of[height];
            for (index_t r = 0; r < count; ++r) center[r] = centers[row + r];
            Vector<T> sum{}, product{};
            for (index_t c = 0; c < n; ++c) {
              Vector<T> g = dy.column[c];
              if constexpr (with_gamma) g *= gamma.column[c];
              sum += g;
              product += g * (x.column[c] - load<Vector<T>>(center));
            }
            store<false>(sum_of, sum);
            store<false>(product_of, product);
            for (index_t r = 0; r < count; ++r) {
              sums[row + r] = double(sum_of[r]);
              products[row + r] = double(product_of[r]);
            }
          }
        } else {
          const Blocks<T> blocks({1, n, n});
          for (index_t row = 0; row < rows; ++row) {
            const T* const dy = all_dy + row * n;
            const T* const x = all_x + row * n;
            const T* const gamma = with_gamma ? all_gamma + row * apart : x;
            const T center = centers[row];
            double dy_total = 0, product_total = 0;
            blocks.each([&](index_t begin, auto, const Tail<T>& tail) {
              Sums<T> sum, product;
              each_lane<T>(tail, [&](auto r, auto read, auto keep, auto) {
                Vector<T> g = read(dy + begin);
                if constexpr (with_gamma) g *= read(gamma + begin);
                sum.part[r] += keep(g);
                product.part[r] += keep(g * (read(x + begin) - center));
              });
              dy_total += sum.total();
              product_total += product.total();
            });
            sums[row] = dy_total;
            products[row] = product_total;
          }
        }
      },
      gamma_data != nullptr, n <= few_columns);
}

// dx of n elements of rows that begin `stride` apart, and their part of dgamma and dbeta, which is
// added to those sums in T.
template <class T>
void row_gradient_apply(const Backward& b, const void* gamma_data, index_t apart, index_t rows,
                        index_t stride, index_t n, void* dgamma_data, void* dbeta_data) {
  // Streamed stores need the other rows at the first one's place in a line.
  const bool on_lines = stride * index_t(sizeof(T)) % line_bytes == 0;
  with_flags(
      [&](auto with_gamma, auto by_four, auto stream) {
        const auto visit = [&](index_t row, auto four) {
          constexpr int count = four ? 4 : 1;
          const T* const gamma = static_cast<const T*>(gamma_data) + (with_gamma ? row * apart : 0);
          T* const dgamma = static_cast<T*>(dgamma_data) + row * apart;
          T* const dbeta = static_cast<T*>(dbeta_data) + row * apart;
          const T* const dy = static_cast<const T*>(b.dy) + row * stride;
          const T* const x = static_cast<const T*>(b.x) + row * stride;
          T* const dx = static_cast<T*>(b.dx) + row * stride;
          struct Coefficient {
            T of_row[count];
            Coefficient(const void* array, index_t first) {
              __builtin_memcpy(of_row, static_cast<const T*>(array) + first, sizeof of_row);
            }
          };
          const Coefficient center(b.center, row), scale(b.scale, row), shift(b.shift, row);
          const Coefficient on_dy(b.on_dy, row), on_x(b.on_x, row), constant(b.constant, row);
          map<T, stream>(n, dx, [=]<class V>(index_t i) {
            V for_gamma[count], for_beta[count], result[count];
            unrolled<count>([&](auto k) {
              const V d = load<V>(x + k * stride + i) - center.of_row[k];
              V g = load<V>(dy + k * stride + i);
              for_gamma[k] = g * (d * scale.of_row[k] + shift.of_row[k]);
              for_beta[k] = g;
              if constexpr (with_gamma) g *= load<V>(gamma + i);
              result[k] = (g * on_dy.of_row[k] + d * on_x.of_row[k]) + constant.of_row[k];
              if constexpr (k > 0) store<stream>(dx + k * stride + i, result[k]);
            });
            const auto add = [=](T* sums, const V* v) {
              V sum = v[0];
              if constexpr (four) sum = (v[0] + v[1]) + (v[2] + v[3]);
              store<false>(sums + i, V(load<V>(sums + i) + sum));
            };
            add(dgamma, for_gamma);
            add(dbeta, for_beta);
            return result[0];
          });
        };
        if constexpr (by_four) {
          four_rows(0, rows, visit);
        } else {
          for (index_t row = 0; row < rows; ++row) visit(row, Flag<false>{});
        }
        if (stream) end_of_stream();
      },
      gamma_data != nullptr, apart == 0 && (!b.stream || on_lines), b.stream);
}

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

// --- from statistics to coefficients, n statistics at a time ---

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

// center, scale and shift of the forward pass.
template <class T>
void forward_coefficients(index_t n, double eps, const double* __restrict mean,
                          const double* __restrict variance, const void* gamma_data,
                          const void* beta_data, void* center_data, void* scale_data,
                          void* shift_data) {
  const T* const gamma = static_cast<const T*>(gamma_data);
  const T* const beta = static_cast<const T*>(beta_data);
  T* __restrict const center = static_cast<T*>(center_data);
  T* __restrict const scale = static_cast<T*>(scale_data);
  T* __restrict const shift = static_cast<T*>(shift_data);
  with_flags(
      [=](auto with_gamma, auto with_beta) {
#pragma omp simd
        for (index_t i = 0; i < n; ++i) {
          const double weight = (with_gamma ? double(gamma[i]) : 1) / sqrt(variance[i] + eps);
          // Around zero a difference would only round.
          const bool around_zero = 4 * mean[i] * mean[i] <= variance[i];
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
void backward_coefficients(index_t n, double eps, double count, const double* __restrict mean,
                           const double* __restrict variance, const void* gamma_data,
                           const double* __restrict sums, double* __restrict products,
                           const void* center_data, void* on_dy_data, void* on_x_data,
                           void* constant_data) {
  const T* const gamma = static_cast<const T*>(gamma_data);
  const T* __restrict const center = static_cast<const T*>(center_data);
  T* __restrict const on_dy = static_cast<T*>(on_dy_data);
  T* __restrict const on_x = static_cast<T*>(on_x_data);
  T* __restrict const constant = static_cast<T*>(constant_data);
  with_flags(
      [=](auto with_gamma) {
        const double each = 1 / count;
#pragma omp simd
        for (index_t i = 0; i < n; ++i) {
          const double rest = mean[i] - double(center[i]);
          const double inverse = 1 / sqrt(variance[i] + eps);
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
void group_coefficients(index_t groups, index_t n, double eps, double count, const double* mean,
                        const double* variance, const void* gamma_data, const double* sums,
                        double* products, const void* center_data, void* on_dy_data,
                        void* on_x_data, void* constant_data) {
  const T* const gamma = static_cast<const T*>(gamma_data);
  const T* const center = static_cast<const T*>(center_data);
  T* const on_dy = static_cast<T*>(on_dy_data);
  T* const on_x = static_cast<T*>(on_x_data);
  T* const constant = static_cast<T*>(constant_data);
  with_flags(
      [=](auto with_gamma) {
        const double each = 1 / count;
        for (index_t g = 0; g < groups; ++g) {
          const index_t begin = g * n, end = begin + n;
          const double rest = mean[g] - double(center[begin]);
          const double inverse = 1 / sqrt(variance[g] + eps);
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

template <class T>
constexpr Norm norm_of{
    moments<T>,
    apply<T>,
    gradient_sums<T>,
    gradient_apply<T>,
    column_moments<T>,
    column_apply<T>,
    column_gradient_sums<T>,
    column_gradient_apply<T>,
    row_apply<T>,
    row_gradient_sums<T>,
    row_gradient_apply<T>,
    flush_sums<T>,
    add_sums,
    round_sums<T>,
    merge,
    move_average<T>,
    forward_coefficients<T>,
    backward_coefficients<T>,
    group_coefficients<T>,
};
