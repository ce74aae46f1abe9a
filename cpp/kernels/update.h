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

// Elements since the begin of the cache line.
template <class T>
index_t past_line(const T* x) {
  return index_t(reinterpret_cast<__UINTPTR_TYPE__>(x) % line_bytes / sizeof(T));
}

// First up to a cache line's begin: large arrays of one shape usually lie alike in their lines, and
// stores that straddle two lines halve the speed (of short arrays they cost what the begin does).
// States in tiles do not: they were stored a moment ago from their begin on, and loads that
// straddle two of those stores would wait for them. Prefetching ahead was measured on Zen 4: no
// faster in DRAM and slower in L3, so the hardware's own must do.
template <class F, class T, class... S>
void stream(F f, index_t n, const T* g, T* p, S*... s) {
  constexpr index_t line = line_bytes / index_t(sizeof(T));
  const index_t past = past_line(p);
  index_t begin = 0;
  if (n >= 16 * line && past != 0 && ((past_line(s) == past) && ...)) {
    begin = line - past;
    each(f, 0, begin, g, p, s...);
  }
  each(f, begin, n, g, p, s...);
}

inline double total_of(const double* lanes_of_sum) {
  Sums<double> all;
  __builtin_memcpy(all.part, lanes_of_sum, sizeof all.part);
  return all.total();
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
      for (index_t k = 0; k < lanes; ++k) f.sum(lane[sum][k]..., g[i + k], p[i + k], s[i + k]...);
    }
    for (index_t k = 0; i + k < end; ++k) f.sum(lane[sum][k]..., g[i + k], p[i + k], s[i + k]...);
    ((sums[sum] = total_of(lane[sum])), ...);
  }
}

// The type of a rule's coefficients: all have the same.
template <class F, int count>
constexpr auto coefficient_type() {
  if constexpr (sizeof(F) == count * sizeof(float)) {
    return float{};
  } else {
    static_assert(sizeof(F) == count * sizeof(double), "every coefficient has a name");
    return double{};
  }
}

template <class F, int... i>
F rule_with(const double* coefficients, Indices<i...>) {
  using C = decltype(coefficient_type<F, sizeof...(i)>());
  const C values[] = {C(coefficients[i])...};
  F f;
  __builtin_memcpy(&f, values, sizeof f);
  return f;
}
template <class F>
F rule_with(const double* coefficients) {
  return rule_with<F>(coefficients, CountTo<count_words(F::names.coefficients)>{});
}

// Calls call(rule, gradient, parameter, state..., what is prepared).
template <class F, class T, class Call, int... state>
void with_streams(const double* coefficients, void* const* streams, Call call, Indices<state...>) {
  const auto f = rule_with<F>(coefficients);
  call(f, static_cast<const T*>(streams[0]), static_cast<T*>(streams[1]),
       static_cast<T*>(streams[2 + state])...);
}
template <class F, class T, class Call>
void with_streams(const double* coefficients, void* const* streams, Call call) {
  constexpr int others = count_words(F::names.state) + count_words(F::names.prepared);
  with_streams<F, T>(coefficients, streams, call, CountTo<others>{});
}

template <class F, class T>
void update(const double* coefficients, void* const* streams, index_t, index_t n) {
  with_streams<F, T>(coefficients, streams, [=](auto f, auto... s) { stream(f, n, s...); });
}

template <class F, class T>
void prepare(const double* coefficients, void* const* streams, index_t, index_t n) {
  with_streams<F, T>(coefficients, streams, [=](auto f, auto... s) {
    stream([f](auto&... x) { f.prepare(x...); }, n, s...);
  });
}

template <class F, class T>
void reduce(const double* coefficients, void* const* streams, index_t, index_t n, double* sums) {
  with_streams<F, T>(coefficients, streams, [=](auto f, auto... s) {
    add_up(f, n, sums, CountTo<count_words(F::names.sums)>{}, s...);
  });
}

template <class F>
bool combine(double* coefficients, const double* sums, index_t size) {
  typename F::Exact f;
  __builtin_memcpy(&f, coefficients, sizeof f);
  bool is_step = true;
  if constexpr (F::names.over_all) {
    is_step = f.combine(sums);
  } else {
    f.combine(sums, double(size));
  }
  __builtin_memcpy(coefficients, &f, sizeof f);
  return is_step;
}

template <class F, class T>
double add_squares(const double* coefficients, const void* gradient, index_t n, double* across) {
  constexpr index_t lanes = lanes_of<double>;
  const auto f = rule_with<F>(coefficients);
  const T* const g = static_cast<const T*>(gradient);
  double lane[lanes] = {};
  const auto add = [&](index_t i, index_t k) {
    const double x = double(f.grad_scale * g[i + k]);
    lane[k] += x * x;
    across[i + k] += x * x;
  };
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) {
#pragma omp simd
    for (index_t k = 0; k < lanes; ++k) add(i, k);
  }
  for (index_t k = 0; i + k < n; ++k) add(i, k);
  return total_of(lane);
}

template <class F, class T>
void factor(const double* coefficients, const Factor& rows, const Factor& columns) {
  const auto f = rule_with<F>(coefficients);
  const auto at = [](void* data, const Factor& of, index_t i) {
    return reinterpret_cast<T*>(static_cast<char*>(data) + i * of.apart);
  };
  const auto move = [&](const Factor& of) {
    double sum = 0;
    for (index_t i = 0; i < of.count; ++i) {
      T& mean = *at(of.mean, of, i);
      mean = f.moved(mean, of.sums[i] / double(of.squares));
      sum += double(mean);
    }
    return sum / double(of.count);
  };
  const auto take_roots = [&](const Factor& of, double divisor) {
    for (index_t i = 0; i < of.count; ++i) {
      *at(of.root, of, i) = T(sqrt(double(*at(of.mean, of, i)) / divisor));
    }
  };
  take_roots(rows, maximum(move(rows), double(f.least())));
  move(columns);
  take_roots(columns, 1);
}
