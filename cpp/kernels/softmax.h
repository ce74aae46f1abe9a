// Softmax, log-softmax, cross-entropy along rows, and squared errors. Included by kernels.cpp
// inside the namespace of one ISA.
//
// Results do not depend on the ISA: sums have 128 bytes of lanes everywhere, blocks of a row are
// added in double in their order, and nothing is contracted.

// Calls step(from, to) for every lanes_of<T> elements of rows that are walked side by side.
// What is left at the end comes in a copy, filled up with -inf in the first row, the logits, and
// zeros in the others.
template <class T, int inputs, class Step>
void along(const T* const (&rows)[inputs], T* out, index_t begin, index_t end, const Step& step) {
  constexpr index_t count = lanes_of<T>;
  const T* from[inputs];
  index_t i = begin;
  for (; i + count <= end; i += count) {
    for (int r = 0; r < inputs; ++r) from[r] = rows[r] + i;
    step(from, out + i);
  }
  if (i == end) return;
  // Without conditional stores: gcc 12 makes some of them that fault where they do not store.
  T rest[inputs][count], rest_out[count];
  const auto copy = [left = end - i](const T* source, T* to) {
    map<T, false>(left, to, [=]<class V>(index_t k) { return load<V>(source + k); });
  };
  for (int r = 0; r < inputs; ++r) {
    for (T& x : rest[r]) x = r == 0 ? -Real<T>::infinity : T(0);
    copy(rows[r] + i, rest[r]);
    from[r] = rest[r];
  }
  step(from, rest_out);
  copy(rest_out, out + i);
}

template <class T>
Vector<T> larger(Vector<T> x, Vector<T> y) {
  return x > y ? x : y;
}

template <class T>
Vector<T> smaller(Vector<T> x, Vector<T> y) {
  return x < y ? x : y;
}

template <class T, index_t n>
T largest_of(const Pack<T, n>& v) {
  Pack<T, n / 2> halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  halves[0] = halves[0] > halves[1] ? halves[0] : halves[1];
  if constexpr (n == 2) {
    return halves[0][0];
  } else {
    return largest_of<T, n / 2>(halves[0]);
  }
}

// Of more elements than there are lanes: the last lanes overlap those before them.
template <class T>
T row_maximum(const T* x, index_t n) {
  Vector<T> largest[registers];
  for (Vector<T>& v : largest) v = all(-Real<T>::infinity);
  const auto see = [&](const T* from) {
    unrolled<registers>([&](auto r) {
      largest[r] = larger<T>(load<Vector<T>>(from + r * width_of<T>), largest[r]);
    });
  };
  for (index_t i = 0; i + lanes_of<T> <= n; i += lanes_of<T>) see(x + i);
  see(x + n - lanes_of<T>);
  for (int r = 1; r < registers; ++r) largest[0] = larger<T>(largest[r], largest[0]);
  return largest_of<T, width_of<T>>(largest[0]);
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
  constexpr index_t width = width_of<T>;
  double sum = 0, q_sum = 0, q_x_sum = 0;
  for (index_t begin = 0; begin < n; begin += block) {
    Sums<T> sums, q_sums, q_x_sums;
    along(rows, out, begin, n - begin < block ? n : begin + block,
          [&](const T* const(&from)[inputs], T* to) {
            for (index_t r = 0; r < registers; ++r) {
              const Vector<T> x = load<Vector<T>>(from[0] + r * width) - max, y = exp<T>(x);
              store<false>(to + r * width, y);
              sums.part[r] += y;
              if constexpr (inputs > 1) {
                Vector<T> q = load<Vector<T>>(from[1] + r * width);
                if constexpr (inputs == 4) {
                  q = q * load<Vector<T>>(from[2] + r * width) +
                      load<Vector<T>>(from[3] + r * width);
                  q_sums.part[r] += q;
                }
                q_x_sums.part[r] += unless_zero<T>(q, x);
              }
            }
          });
    sum += sums.total();
    if constexpr (inputs == 4) q_sum += q_sums.total();
    if constexpr (inputs > 1) q_x_sum += q_x_sums.total();
  }
  return {T(sum), T(q_sum), T(q_x_sum)};
}

// The same without an output: what blocks of a row yield is rounded.
template <class T>
T exp_sum(const T* x, T max, index_t n) {
  T scratch[block];
  double sum = 0;
  for (index_t begin = 0; begin < n; begin += block) {
    sum += double(exp_row({x + begin}, max, scratch, n - begin < block ? n - begin : block).exp);
  }
  return T(sum);
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
  // Rows at a time, pass by pass: no row waits for the sum of the one before it.
  constexpr index_t hot = 4096, width = width_of<T>;
  const index_t most = columns * width <= hot ? width : columns < hot ? hot / columns : 1;
  for (index_t row = 0; row < rows; row += most) {
    const index_t count = rows - row < most ? rows - row : most;
    T max[width], sums[width] = {}, normalizers[width];
    for (index_t r = 0; r < count; ++r) max[r] = row_maximum(x + r * columns, columns);
    for (index_t r = 0; r < count; ++r) {
      sums[r] = logarithm ? exp_sum(x + r * columns, max[r], columns)
                          : exp_row({x + r * columns}, max[r], y + r * columns, columns).exp;
    }
    const auto sum = load<Vector<T>>(sums);
    store<false>(normalizers, logarithm ? log<T>(sum) : T(1) / sum);
    for (index_t r = 0; r < count; ++r, x += columns, y += columns) {
      const T shift = max[r], normalizer = normalizers[r];
      map<T, false>(columns, y, [=]<class V>(index_t c) {
        return V(logarithm ? (load<V>(x + c) - shift) - normalizer : load<V>(y + c) * normalizer);
      });
    }
  }
}

// The first row that is no distribution, or `rows`: all are at least 0, with the sum 1.
template <class T>
index_t bad_row(const void* data, index_t rows, index_t columns) {
  constexpr index_t width = width_of<T>;
  const T* x = static_cast<const T*>(data);
  const auto is_bad = [](T sum, T least) {
    const T off = sum - T(1);
    return !(least >= T(0) && off <= T(1e-3) && off >= T(-1e-3));
  };
  if (columns <= few_classes) {
    for (index_t row = 0; row < rows; row += width) {
      FewClasses<T> tile;
      load_columns(x + row * columns, rows - row, columns, tile);
      Vector<T> sum{}, least{};
      for (index_t c = 0; c < columns; ++c) {
        sum += tile.column[c];
        least = smaller<T>(tile.column[c], least);
      }
      for (index_t r = 0; r < width && row + r < rows; ++r) {
        if (is_bad(sum[r], least[r])) return row + r;
      }
    }
    return rows;
  }
  for (index_t row = 0; row < rows; ++row, x += columns) {
    double sum = 0;
    Vector<T> lowest[registers] = {};
    index_t i = 0;
    for (; i + lanes_of<T> <= columns;) {
      Sums<T> sums;
      const index_t end = columns - i < block ? columns : i + block;
      for (; i + lanes_of<T> <= end; i += lanes_of<T>) {
        for (index_t r = 0; r < registers; ++r) {
          const Vector<T> v = load<Vector<T>>(x + i + r * width);
          sums.part[r] += v;
          lowest[r] = smaller<T>(v, lowest[r]);
        }
      }
      sum += sums.total();
    }
    T least = 0;
    for (; i < columns; ++i) {
      sum += double(x[i]);
      least = x[i] < least ? x[i] : least;
    }
    for (const Vector<T>& v : lowest) {
      for (index_t k = 0; k < width; ++k) least = v[k] < least ? v[k] : least;
    }
    if (is_bad(T(sum), least)) return row;
  }
  return rows;
}

// Takes the label off its row's gradient; an ignored row has none, and no loss.
template <class T>
void subtract_label(const CrossEntropyRows& task, index_t row) {
  T* const gradient = static_cast<T*>(task.gradient) + row * task.columns;
  const index_t label = task.labels[row];
  if (label == task.ignored) {
    static_cast<T*>(task.losses)[row] = 0;
    for (index_t c = 0; c < task.columns; ++c) gradient[c] = 0;
  } else {
    gradient[label] -= T(task.scale) * static_cast<const T*>(task.class_weight)[label];
  }
}

template <class T, Target target>
void cross_entropy_few(const CrossEntropyRows& task, index_t begin, index_t end) {
  constexpr index_t width = FewClasses<T>::rows;
  const index_t columns = task.columns;
  const T scale = T(task.scale);
  const T* const class_weight = static_cast<const T*>(task.class_weight);
  const T* const base = static_cast<const T*>(task.base);
  for (index_t row = begin; row < end; row += width) {
    const index_t count = end - row < width ? end - row : width;
    const T* const x = static_cast<const T*>(task.logits) + row * columns;
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
    store_columns(tile, static_cast<T*>(task.gradient) + row * columns, count, columns);
    for (index_t r = 0; r < count; ++r) {
      static_cast<T*>(task.losses)[row + r] = losses[r];
      if constexpr (target != probabilities) subtract_label<T>(task, row + r);
    }
  }
}

template <class T, Target target>
void cross_entropy_rows(const CrossEntropyRows& task, index_t begin, index_t end) {
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
void cross_entropy(const CrossEntropyRows& task, index_t begin, index_t end) {
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
    for (index_t r = 0; r < registers; ++r) {
      store<false>(out + r * width_of<T>, function(load<Vector<T>>(in[0] + r * width_of<T>)));
    }
  });
}

// y = factor (x - target), and the sums of (x - target)^2 by block. All in double: float32 squares
// overflow from 2e19 on, and a factor may be out of float32's range where its product is not.
template <class T>
void residual(double factor, const void* x_data, const void* target_data, void* y_data, index_t n,
              double* sums) {
  constexpr index_t width = width_of<double>, lanes = lanes_of<double>;
  using Narrow = Pack<T, width>;
  const T* x = static_cast<const T*>(x_data);
  const T* target = static_cast<const T*>(target_data);
  T* y = static_cast<T*>(y_data);
  for (; n > 0; n -= block, ++sums) {
    const index_t count = n < block ? n : block;
    Sums<double> squares;
    const auto step = [&](const T* from, const T* other, T* to) {
      for (index_t r = 0; r < registers; ++r) {
        auto difference = __builtin_convertvector(load<Narrow>(from + r * width), Vector<double>);
        if (other != nullptr) {
          difference -= __builtin_convertvector(load<Narrow>(other + r * width), Vector<double>);
        }
        squares.part[r] += difference * difference;
        store<false>(to + r * width, __builtin_convertvector(factor * difference, Narrow));
      }
    };
    index_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      step(x + i, target == nullptr ? nullptr : target + i, y + i);
    }
    if (i < count) {
      T rest[lanes] = {}, rest_target[lanes] = {}, rest_y[lanes];
      for (index_t k = 0; i + k < count; ++k) {
        rest[k] = x[i + k];
        if (target != nullptr) rest_target[k] = target[i + k];
      }
      step(rest, rest_target, rest_y);
      for (index_t k = 0; i + k < count; ++k) y[i + k] = rest_y[k];
    }
    *sums = squares.total();
    x += block;
    y += block;
    if (target != nullptr) target += block;
  }
}
