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

// Block by block: lane k of each sum adds up the elements k, k + lanes, ... of a block.
template <class F, class T, int... sum, class... S>
void add_up(F f, index_t n, double* sums, Indices<sum...>, const T* __restrict g, T* __restrict p,
            S* __restrict... s) {
  constexpr index_t lanes = lanes_of<double>;
  for (index_t begin = 0; begin < n; begin += block, sums += sizeof...(sum)) {
    const index_t end = begin + block < n ? begin + block : n;
    double lane[sizeof...(sum)][lanes] = {};
    index_t i = begin;
    for (; i + lanes <= end; i += lanes) {
#pragma omp simd
      for (index_t k = 0; k < lanes; ++k) f(g[i + k], p[i + k], s[i + k]..., lane[sum][k]...);
    }
    for (index_t k = 0; i + k < end; ++k) f(g[i + k], p[i + k], s[i + k]..., lane[sum][k]...);
    const auto total = [](const double* lanes_of_sum) {
      Sums<double> all;
      __builtin_memcpy(all.part, lanes_of_sum, sizeof all.part);
      return all.total();
    };
    ((sums[sum] = total(lane[sum])), ...);
  }
}

// A coefficient in the type of the rule's.
struct Number {
  double value;
  template <class T>
  operator T() const {
    return T(value);
  }
};

template <class F, class T, int... coefficient, int... state>
void run(const double* coefficients, void* const* streams, index_t n, double* sums,
         Indices<coefficient...>, Indices<state...>) {
  const F f{Number{coefficients[coefficient]}...};
  const T* const g = static_cast<const T*>(streams[0]);
  T* const p = static_cast<T*>(streams[1]);
  constexpr int sum_count = count_words(F::names.sums);
  if constexpr (sum_count == 0) {
    stream(f, n, g, p, static_cast<T*>(streams[2 + state])...);
  } else {
    add_up(f, n, sums, CountTo<sum_count>{}, g, p, static_cast<T*>(streams[2 + state])...);
  }
}

template <class F, class T>
void run(const double* coefficients, void* const* streams, index_t, index_t n, double* sums) {
  run<F, T>(coefficients, streams, n, sums, CountTo<count_words(F::names.coefficients)>{},
            CountTo<count_words(F::names.state)>{});
}
