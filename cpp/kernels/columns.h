// Normalization of columns, each with its statistics. Included by kernels.cpp inside the namespace
// of one ISA.

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
void column_moments(const void* data, Rows rows, Moments to, void* scratch) {
  const index_t stride = rows.stride, columns = rows.columns;
  double* __restrict const mean = to.mean, * __restrict const m2 = to.m2;
  const T* const x = static_cast<const T*>(data);
  T* __restrict const center = static_cast<T*>(scratch);
  T* __restrict const sum = center + columns;
  T* __restrict const square = sum + columns;
  const RowsAhead<T> ahead(stride, columns);
  const auto row_bytes = sizeof(T) * static_cast<__SIZE_TYPE__>(columns);
  for (index_t begin = 0; begin < rows.count; begin += block_rows) {
    const index_t end = begin + block_rows <= rows.count ? begin + block_rows : rows.count;
    const double count = double(end - begin), counted = double(begin);
    if (begin == 0) {
      // The mean of a few rows from all over the block: its distance from the block's mean costs
      // three bits at most, because those rows' own deviations are part of the sum.
      const index_t some = rows.count < center_rows ? rows.count : center_rows;
      __builtin_memset(center, 0, row_bytes);
      for (index_t k = 0; k < some; ++k) {
        const T* __restrict const row = x + k * end / some * stride;
#pragma omp simd
        for (index_t c = 0; c < columns; ++c) center[c] += row[c];
      }
#pragma omp simd
      for (index_t c = 0; c < columns; ++c) center[c] /= T(some);
    }
    __builtin_memset(sum, 0, 2 * row_bytes);  // and square
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
    const double inverse = 1 / count, weight = count / (counted + count), both = counted * weight;
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
}

// f<V>(element, column) for every element, y's stores streamed or not. Streamed rows that lie one
// after the other are one run: the columns' coefficients go on past the last one with the first.
template <class T, bool stream, class F>
void map_columns(Rows rows, T* y, F f) {
  const index_t columns = rows.columns;
  if (stream && rows.stride == columns) {
    index_t column = 0;
    map<T, stream>(rows.count * columns, y, [&]<class V>(index_t i) {
      const index_t c = column;
      column += index_t(sizeof(V) / sizeof(T));
      while (column >= columns) column -= columns;
      return f.template operator()<V>(i, c);
    });
    return;
  }
  for (index_t row = 0; row < rows.count; ++row) {
    const index_t at = row * rows.stride;
    map<T, stream>(columns, y + at,
                   [=]<class V>(index_t c) { return f.template operator()<V>(at + c, c); });
  }
}

template <class T>
void column_apply(const Forward& f, Activation after, Rows rows) {
  const T* const x = static_cast<const T*>(f.x);
  const T* const residual = static_cast<const T*>(after.residual);
  const T* const center = static_cast<const T*>(f.by.center);
  const T* const scale = static_cast<const T*>(f.by.scale);
  const T* const shift = static_cast<const T*>(f.by.shift);
  with_flags(
      [&](auto relu, auto with_residual, auto stream) {
        map_columns<T, stream>(rows, static_cast<T*>(f.y), [=]<class V>(index_t i, index_t c) {
          V y = (load<V>(x + i) - load<V>(center + c)) * load<V>(scale + c) + load<V>(shift + c);
          if constexpr (with_residual) y += load<V>(residual + i);
          if constexpr (relu) y = rectify(y);
          return y;
        });
        if (stream) end_of_stream();
      },
      after.relu, residual != nullptr, f.stream);
}

template <class T>
void column_gradient_sums(const Backward& b, const ActivationGradient& before, Rows rows,
                          GradientSums sums, void* scratch) {
  const index_t stride = rows.stride, columns = rows.columns;
  double* __restrict const dy_sums = sums.dy;
  double* __restrict const products = sums.product;
  const T* const all_dy = static_cast<const T*>(b.dy);
  const T* const all_x = static_cast<const T*>(b.x);
  const T* const all_y = static_cast<const T*>(before.y);
  const T* __restrict const center = static_cast<const T*>(b.center);
  const T* __restrict const scale = static_cast<const T*>(before.scale);
  const T* __restrict const shift = static_cast<const T*>(before.shift);
  T* __restrict const sum = static_cast<T*>(scratch);
  T* __restrict const product = sum + columns;
  const RowsAhead<T> ahead(stride, columns);
  for (index_t c = 0; c < columns; ++c) dy_sums[c] = products[c] = 0;
  with_flags(
      [&](auto relu, auto from_y) {
        for (index_t begin = 0; begin < rows.count; begin += block_rows) {
          const index_t end = begin + block_rows <= rows.count ? begin + block_rows : rows.count;
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
            dy_sums[c] += double(sum[c]);
            products[c] += double(product[c]);
          }
        }
      },
      before.relu, all_y != nullptr);
}

template <class T>
void column_gradient_apply(const Backward& b, const ActivationGradient& before, Rows rows) {
  const T* const dy = static_cast<const T*>(b.dy);
  const T* const x = static_cast<const T*>(b.x);
  const T* const y = static_cast<const T*>(before.y);
  T* const dresidual = static_cast<T*>(before.dresidual);
  const T* const center = static_cast<const T*>(b.center);
  const T* const scale = static_cast<const T*>(before.scale);
  const T* const shift = static_cast<const T*>(before.shift);
  const T* const on_dy = static_cast<const T*>(b.by.on_dy);
  const T* const on_x = static_cast<const T*>(b.by.on_x);
  const T* const constant = static_cast<const T*>(b.by.constant);
  with_flags(
      [&](auto relu, auto from_y, auto with_residual, auto stream) {
        map_columns<T, stream>(rows, static_cast<T*>(b.dx), [=]<class V>(index_t i, index_t c) {
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
      before.relu, y != nullptr, dresidual != nullptr, b.stream);
}
