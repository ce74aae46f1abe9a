// Normalization of runs of neighbours, each with its statistics. Included by kernels.cpp inside the
// namespace of one ISA.
//
// Forward is y = (x - center) scale + shift, where center is the mean as a T, or zero where the
// mean is no larger than the deviation, and the rest of the mean sits in the shift; backward is
// dx = on_dy dy + on_x (x - center) + constant.

// As in torch, a NaN passes.
template <class V>
V rectify(V y) {
  return y <= 0 ? V{} : y;
}
template <class V>
V rectified_gradient(V y, V dy) {
  return y <= 0 ? V{} : dy;
}

template <class T>
void apply(const Forward& f, Activation after, Runs runs, index_t coefficient_stride) {
  with_flags(
      [&](auto relu, auto with_residual, auto stream) {
        for (index_t run = 0; run < runs.count; ++run) {
          const index_t at = run * runs.stride, c = run * coefficient_stride;
          const T* const x = static_cast<const T*>(f.x) + at;
          const T* const residual = with_residual ? static_cast<const T*>(after.residual) + at : x;
          const T center = static_cast<const T*>(f.by.center)[c];
          const T scale = static_cast<const T*>(f.by.scale)[c];
          const T shift = static_cast<const T*>(f.by.shift)[c];
          map<T, stream>(runs.inner, static_cast<T*>(f.y) + at, [=]<class V>(index_t i) {
            V y = (load<V>(x + i) - center) * scale + shift;
            if constexpr (with_residual) y += load<V>(residual + i);
            if constexpr (relu) y = rectify(y);
            return y;
          });
        }
        if (stream) end_of_stream();
      },
      after.relu, after.residual != nullptr, f.stream);
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
void gradient_sums(const Backward& b, const ActivationGradient& before, Runs runs,
                   index_t statistics, index_t apart, GradientSums sums) {
  const index_t ahead = ahead_of<T>(runs);
  const Blocks<T> blocks(runs);
  with_flags(
      [&](auto relu, auto from_y) {
        const T* const dy = static_cast<const T*>(b.dy);
        const T* const x = static_cast<const T*>(b.x);
        const T* const y = from_y ? static_cast<const T*>(before.y) : x;
        for (index_t i = 0; i < statistics; ++i) sums.dy[i] = sums.product[i] = 0;
        blocks.each_of(statistics, [=](index_t i, index_t end, index_t begin, index_t count,
                                       const Tail<T>& tail) __attribute__((noinline)) {
          for (; i < end; ++i) {
            const T center = static_cast<const T*>(b.center)[i];
            const T scale = relu ? static_cast<const T*>(before.scale)[i] : T(0);
            const T shift = relu ? static_cast<const T*>(before.shift)[i] : T(0);
            Sums<T> sum, product;
            for (index_t run = 0; run < count; ++run) {
              const index_t at = i * apart + begin + run * runs.stride;
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
            sums.dy[i] += sum.total();
            sums.product[i] += product.total();
          }
        });
      },
      before.relu, before.y != nullptr);
}

template <class T>
void gradient_apply(const Backward& b, const ActivationGradient& before, Runs runs,
                    index_t coefficient_stride) {
  with_flags(
      [&](auto relu, auto from_y, auto with_residual, auto stream) {
        for (index_t run = 0; run < runs.count; ++run) {
          const index_t at = run * runs.stride, c = run * coefficient_stride;
          const T* const dy = static_cast<const T*>(b.dy) + at;
          const T* const x = static_cast<const T*>(b.x) + at;
          const T* const y = from_y ? static_cast<const T*>(before.y) + at : x;
          T* const dresidual = with_residual ? static_cast<T*>(before.dresidual) + at : nullptr;
          const auto coefficient = [=](const void* array) {
            return static_cast<const T*>(array)[c];
          };
          const T center = coefficient(b.center), on_dy = coefficient(b.by.on_dy);
          const T on_x = coefficient(b.by.on_x), constant = coefficient(b.by.constant);
          const T scale = relu ? coefficient(before.scale) : T(0);
          const T shift = relu ? coefficient(before.shift) : T(0);
          map<T, stream>(runs.inner, static_cast<T*>(b.dx) + at, [=]<class V>(index_t i) {
            const V d = load<V>(x + i) - center;
            const V g = through<T, relu, from_y>(load<V>(dy + i), d, y + i, scale, shift);
            if constexpr (with_residual) store<false>(dresidual + i, g);
            return V((g * on_dy + d * on_x) + constant);
          });
        }
        if (stream) end_of_stream();
      },
      before.relu, before.y != nullptr, before.dresidual != nullptr, b.stream);
}

// --- gamma and beta per element of a row (layer and RMS normalization, groups of short runs) ---

template <class T>
void row_apply(const Forward& f, RowParameters parameters, index_t rows, index_t n) {
  const T* const all_gamma = static_cast<const T*>(parameters.gamma);
  const T* const all_beta = static_cast<const T*>(parameters.beta);
  const index_t apart = parameters.apart;
  with_flags(
      [&](auto with_gamma, auto with_beta, auto stream) {
        for (index_t row = 0; row < rows; ++row) {
          const T* const x = static_cast<const T*>(f.x) + row * n;
          const T* const gamma = all_gamma + (with_gamma ? row * apart : 0);
          const T* const beta = all_beta + (with_beta ? row * apart : 0);
          const T center = static_cast<const T*>(f.by.center)[row];
          const T scale = static_cast<const T*>(f.by.scale)[row];
          const T shift = static_cast<const T*>(f.by.shift)[row];
          map<T, stream>(n, static_cast<T*>(f.y) + row * n, [=]<class V>(index_t i) {
            V y = (load<V>(x + i) - center) * scale + shift;
            if constexpr (with_gamma) y *= load<V>(gamma + i);
            if constexpr (with_beta) y += load<V>(beta + i);
            return y;
          });
        }
        if (stream) end_of_stream();
      },
      all_gamma != nullptr, all_beta != nullptr, f.stream);
}

// As gradient_sums, of gamma dy; here of rows of few elements.
template <class T>
void few_row_gradient_sums(const Backward& b, RowParameters parameters, index_t rows, index_t n,
                           GradientSums sums) {
  const T* const all_dy = static_cast<const T*>(b.dy);
  const T* const all_x = static_cast<const T*>(b.x);
  const T* const centers = static_cast<const T*>(b.center);
  const T* const all_gamma = static_cast<const T*>(parameters.gamma);
  const index_t apart = parameters.apart;
  with_flags(
      [&](auto with_gamma) {
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
            sums.dy[row + r] = double(sum_of[r]);
            sums.product[row + r] = double(product_of[r]);
          }
        }
      },
      all_gamma != nullptr);
}

template <class T>
void row_gradient_sums(const Backward& b, RowParameters parameters, index_t rows, index_t n,
                       GradientSums sums) {
  if (n <= few_columns) return few_row_gradient_sums<T>(b, parameters, rows, n, sums);
  const T* const all_dy = static_cast<const T*>(b.dy);
  const T* const all_x = static_cast<const T*>(b.x);
  const T* const centers = static_cast<const T*>(b.center);
  const T* const all_gamma = static_cast<const T*>(parameters.gamma);
  const index_t apart = parameters.apart;
  with_flags(
      [&](auto with_gamma) {
        for (index_t row = 0; row < rows; ++row) sums.dy[row] = sums.product[row] = 0;
        Blocks<T>({1, n, n}).each_of(rows, [=](index_t row, index_t end, index_t begin, index_t,
                                               const Tail<T>& tail) __attribute__((noinline)) {
          for (; row < end; ++row) {
            const T* const dy = all_dy + row * n + begin;
            const T* const x = all_x + row * n + begin;
            const T* const gamma = with_gamma ? all_gamma + row * apart + begin : x;
            const T center = centers[row];
            Sums<T> sum, product;
            each_lane<T>(tail, [&](auto r, auto read, auto keep, auto) {
              Vector<T> g = read(dy);
              if constexpr (with_gamma) g *= read(gamma);
              sum.part[r] += keep(g);
              product.part[r] += keep(g * (read(x) - center));
            });
            sums.dy[row] += sum.total();
            sums.product[row] += product.total();
          }
        });
      },
      all_gamma != nullptr);
}

// dx, and each row's part of dgamma and dbeta.
template <class T>
void row_gradient_apply(const Backward& b, const ForwardCoefficients& xhat,
                        RowParameters parameters, Rows rows, RowGradients gradients) {
  const T* const all_gamma = static_cast<const T*>(parameters.gamma);
  const index_t apart = parameters.apart, stride = rows.stride;
  // Streamed stores need the other rows at the first one's place in a line.
  const bool on_lines = stride * index_t(sizeof(T)) % line_bytes == 0;
  with_flags(
      [&](auto with_gamma, auto by_four, auto stream) {
        const auto visit = [&](index_t row, auto four) {
          constexpr int count = four ? 4 : 1;
          const T* const gamma = all_gamma + (with_gamma ? row * apart : 0);
          T* const dgamma = static_cast<T*>(gradients.dgamma) + row * apart;
          T* const dbeta = static_cast<T*>(gradients.dbeta) + row * apart;
          const T* const dy = static_cast<const T*>(b.dy) + row * stride;
          const T* const x = static_cast<const T*>(b.x) + row * stride;
          T* const dx = static_cast<T*>(b.dx) + row * stride;
          struct Coefficient {
            T of_row[count];
            Coefficient(const void* array, index_t first) {
              __builtin_memcpy(of_row, static_cast<const T*>(array) + first, sizeof of_row);
            }
          };
          const Coefficient center(b.center, row), scale(xhat.scale, row), shift(xhat.shift, row);
          const Coefficient on_dy(b.by.on_dy, row), on_x(b.by.on_x, row);
          const Coefficient constant(b.by.constant, row);
          map<T, stream>(rows.columns, dx, [=]<class V>(index_t i) {
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
          four_rows(0, rows.count, visit);
        } else {
          for (index_t row = 0; row < rows.count; ++row) visit(row, Flag<false>{});
        }
        if (stream) end_of_stream();
      },
      all_gamma != nullptr, apart == 0 && (!b.stream || on_lines), b.stream);
}
