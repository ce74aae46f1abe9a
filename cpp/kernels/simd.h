// One register of numbers. Included by kernels.cpp inside the namespace of one ISA; GCC's and
// clang's vector extensions, so the same source serves every ISA.

constexpr index_t line_bytes = 64;

// Reductions keep 128 bytes of sums on every ISA: the same order of additions everywhere.
#if defined(__AVX512F__)
constexpr index_t vector_bytes = 64;
#elif defined(__AVX__)
constexpr index_t vector_bytes = 32;
#else
constexpr index_t vector_bytes = 16;
#endif
constexpr index_t accumulator_bytes = 128;

template <class T>
using Vector __attribute__((vector_size(vector_bytes))) = T;

template <int... i>
struct Indices {};
template <int n, int... i>
struct Count : Count<n - 1, n - 1, i...> {};
template <int... i>
struct Count<0, i...> {
  using Result = Indices<i...>;
};
template <int n>
using CountTo = typename Count<n>::Result;

// Calls f(i) for every i < n, each a constant: an array that only constants index can live in
// registers.
template <int i>
struct Constant {
  constexpr operator index_t() const { return i; }
};
template <class F, int... i>
[[gnu::always_inline]] inline void unrolled(F f, Indices<i...>) {
  (f(Constant<i>{}), ...);
}
template <int n, class F>
[[gnu::always_inline]] inline void unrolled(F f) {
  unrolled(f, CountTo<n>{});
}

// V is a vector, or one T.
template <class V, class T>
V load(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// Streamed stores of vectors pass by the caches.
template <bool stream, class V, class T>
void store(T* to, V value) {
  if constexpr (!stream || sizeof(V) == sizeof(T)) {
    __builtin_memcpy(to, &value, sizeof value);
  } else {
#if defined(__clang__)
    __builtin_nontemporal_store(value, reinterpret_cast<V*>(to));
#elif defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) __builtin_ia32_movntps512(to, value);
    if constexpr (sizeof(T) == 8) __builtin_ia32_movntpd512(to, value);
#elif defined(__AVX__)
    if constexpr (sizeof(T) == 4) __builtin_ia32_movntps256(to, value);
    if constexpr (sizeof(T) == 8) __builtin_ia32_movntpd256(to, value);
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 4) __builtin_ia32_movntps(to, value);
    if constexpr (sizeof(T) == 8) __builtin_ia32_movntpd(to, value);
#else
    __builtin_memcpy(to, &value, sizeof value);
#endif
  }
}

inline float sqrt(float x) {
  return __builtin_sqrtf(x);
}
inline double sqrt(double x) {
  return __builtin_sqrt(x);
}

inline float absolute(float x) {
  return __builtin_fabsf(x);
}
inline double absolute(double x) {
  return __builtin_fabs(x);
}

// -1, 0 or 1; that of NaN is NaN, as in NumPy.
template <class T>
T sign(T x) {
  const T sign = T(x > 0) - T(x < 0);
  return x == x ? sign : x;
}

// As in NumPy and torch, NaN is larger than every number.
template <class T>
T maximum(T x, T y) {
  return x <= y || y != y ? y : x;
}
template <class T>
T minimum(T x, T y) {
  return x >= y || y != y ? y : x;
}

template <class T>
T clamp(T x, T low, T high) {
  const T raised = x < low ? low : x;
  return raised > high ? high : raised;
}

template <class T>
constexpr index_t width_of = vector_bytes / index_t(sizeof(T));

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
