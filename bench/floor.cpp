// The floor: the least that a job must do with memory, one addition for every element that it
// writes. Every variant is tried, and the fastest counts.
#include <omp.h>

#include <cstddef>
#include <cstdint>

namespace {

using index_t = std::ptrdiff_t;

// The part of n elements that this thread works on: it begins and ends at a cache line of `at`.
template <class T>
struct Part {
  static constexpr index_t line = 64 / index_t(sizeof(T));
  index_t begin, end;

  Part(index_t n, const T* at) {
    const index_t parts = omp_get_num_threads(), part = omp_get_thread_num();
    const index_t offset = index_t(reinterpret_cast<std::uintptr_t>(at) % 64 / sizeof(T));
    const auto border = [&](index_t k) {
      const index_t i = n / parts * k;
      const index_t aligned = i - (i + offset) % line;
      return k == 0 || aligned < 0 ? 0 : aligned;
    };
    begin = border(part);
    end = part + 1 == parts ? n : border(part + 1);
  }
};

// Reads one stream and adds one to each of the others in place.
template <class T, int streams>
void add_one(index_t n, const T* __restrict g, T* __restrict a, T* __restrict b, T* __restrict c,
             T* __restrict d, T* __restrict e) {
#pragma omp simd
  for (index_t i = 0; i < n; ++i) {
    a[i] += g[i];
    if constexpr (streams > 1) b[i] += T(1);
    if constexpr (streams > 2) c[i] += T(1);
    if constexpr (streams > 3) d[i] += T(1);
    if constexpr (streams > 4) e[i] += T(1);
  }
}

template <class T, int streams>
void step(index_t n, const T* g, T* const* s, index_t ahead) {
  constexpr index_t line = Part<T>::line;
  const auto add = [&](index_t from, index_t count) {
    add_one<T, streams>(count, g + from, s[0] + from, s[1] + from, s[2] + from, s[3] + from,
                        s[4] + from);
  };
  if (ahead == 0) return add(0, n);
  const auto past_line = index_t(reinterpret_cast<std::uintptr_t>(s[0]) % 64 / sizeof(T));
  index_t i = past_line == 0 ? 0 : line - past_line;
  if (i > n) i = n;
  add(0, i);
  for (; i + line <= n; i += line) {
    __builtin_prefetch(g + i + ahead);
    for (int k = 0; k < streams; ++k) __builtin_prefetch(s[k] + i + ahead, 1);
    add(i, line);
  }
  add(i, n - i);
}

template <class T>
void steps(index_t n, int streams, const T* g, T* const* s, index_t ahead, int threads) {
  constexpr void (*of_streams[])(index_t, const T*, T* const*, index_t) = {
      step<T, 1>, step<T, 2>, step<T, 3>, step<T, 4>, step<T, 5>};
#pragma omp parallel num_threads(threads)
  {
    const Part<T> part(n, s[0]);
    T* from[5] = {};
    for (int k = 0; k < streams; ++k) from[k] = s[k] + part.begin;
    of_streams[streams - 1](part.end - part.begin, g + part.begin, from, ahead);
  }
}

}  // namespace

// Gradient g, updated streams s (1 to 5), elements of 4 or 8 bytes; prefetched `ahead` elements
// ahead, or not if it is 0.
extern "C" void floor_step(index_t n, int streams, int item_bytes, const void* g, void* const* s,
                           index_t ahead, int threads) {
  if (item_bytes == 4)
    steps(n, streams, static_cast<const float*>(g), reinterpret_cast<float* const*>(s), ahead,
          threads);
  else
    steps(n, streams, static_cast<const double*>(g), reinterpret_cast<double* const*>(s), ahead,
          threads);
}

// Writes y = x + 1, or y = x + dy where dy is given, into memory that is mapped already; with
// stores that pass the caches by if `streaming`.
extern "C" void floor_write(index_t n, const float* x, const float* dy, float* y, int streaming,
                            int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Part<float> part(n, y);
    index_t i = part.begin;
#if defined(__SSE__)
    if (streaming) {
      using Four [[gnu::vector_size(16), gnu::aligned(4)]] = float;
      for (; i < part.end && reinterpret_cast<std::uintptr_t>(y + i) % 16 != 0; ++i)
        y[i] = x[i] + (dy ? dy[i] : 1.0f);
      for (; i + 4 <= part.end; i += 4) {
        const Four a = *reinterpret_cast<const Four*>(x + i);
        const Four b = dy ? *reinterpret_cast<const Four*>(dy + i) : Four{1, 1, 1, 1};
        __builtin_ia32_movntps(y + i, a + b);
      }
    }
#endif
    if (dy) {
#pragma omp simd
      for (index_t j = i; j < part.end; ++j) y[j] = x[j] + dy[j];
    } else {
#pragma omp simd
      for (index_t j = i; j < part.end; ++j) y[j] = x[j] + 1.0f;
    }
#if defined(__SSE__)
    if (streaming) __builtin_ia32_sfence();
#endif
  }
}
