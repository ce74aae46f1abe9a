// The loops that drive a rule. Included by kernels.cpp inside the namespace of one ISA.

constexpr int count_words(const char* text) {
  int words = 0;
  for (; *text; ++text) words += *text != ' ' && (text[1] == ' ' || text[1] == 0);
  return words;
}

// The only loop over the elements of a step.
template <class F, class T, class... S>
void each(F f, index_t begin, index_t end, const T* __restrict g, T* __restrict p,
          S* __restrict... s) {
#pragma omp simd
  for (index_t i = begin; i < end; ++i) f(g[i], p[i], s[i]...);
}

// First up to a cache line's begin: large arrays of one shape usually lie alike in their lines, and
// stores that straddle two lines halve the speed. Prefetching ahead was measured on Zen 4: no
// faster in DRAM and slower in L3, so the hardware's own must do.
template <class F, class T, class... S>
void stream(F f, index_t n, const T* g, T* p, S*... s) {
  constexpr index_t line = line_bytes / index_t(sizeof(T));
  const auto past_line = index_t(reinterpret_cast<__UINTPTR_TYPE__>(p) % line_bytes / sizeof(T));
  const index_t head = past_line == 0 ? 0 : line - past_line;
  const index_t first = head < n ? head : n;
  each(f, 0, first, g, p, s...);
  each(f, first, n, g, p, s...);
}

template <class F, class T, int... coefficient, int... state>
void run(const double* coefficients, void* const* streams, index_t begin, index_t n,
         Indices<coefficient...>, Indices<state...>) {
  const F f{T(coefficients[coefficient])...};
  stream(f, n, static_cast<const T*>(streams[0]) + begin, static_cast<T*>(streams[1]) + begin,
         (static_cast<T*>(streams[2 + state]) + begin)...);
}

template <class F, class T>
void run(const double* coefficients, void* const* streams, index_t begin, index_t n) {
  constexpr int count = count_words(F::names.coefficients);
  static_assert(sizeof(F) == count * sizeof(T), "every coefficient has a name");
  run<F, T>(coefficients, streams, begin, n, CountTo<count>{},
            CountTo<count_words(F::names.state)>{});
}

// Sums of squares in double, since a float32 square overflows from 2e19 on.
template <class T>
void sum_squares(double scale, const void* data, index_t n, double (*sums)[2]) {
  constexpr index_t width = width_of<double>, lanes = lanes_of<double>;
  const T* x = static_cast<const T*>(data);
  for (; n > 0; n -= block, x += block, ++sums) {
    const index_t count = n < block ? n : block;
    Sums<double> squares, zeros;
    const auto add = [&](const T* values) {
      for (index_t r = 0; r < registers; ++r) {
        Vector<double> value;
        for (index_t k = 0; k < width; ++k) value[k] = double(values[r * width + k]);
        zeros.part[r] += value * 0.0;  // NaN for infinity and NaN
        value *= scale;
        squares.part[r] += value * value;
      }
    };
    index_t i = 0;
    for (; i + lanes <= count; i += lanes) add(x + i);
    if (i < count) {
      T rest[lanes] = {};
      for (index_t k = 0; i + k < count; ++k) rest[k] = x[i + k];
      add(rest);
    }
    (*sums)[0] = squares.total();
    (*sums)[1] = zeros.total();
  }
}
