// The floor: the least that a step must do with memory. Reads one stream and adds one to each of
// the others in place; every variant is tried, and the fastest counts.
#include <omp.h>

#include <cstddef>

namespace {

constexpr std::ptrdiff_t line = 64 / sizeof(float);

template <int streams, int ahead>
void add_one(std::ptrdiff_t n, const float* __restrict g, float* __restrict a, float* __restrict b,
             float* __restrict c) {
  std::ptrdiff_t i = 0;
  for (; i + line <= n; i += line) {
    if constexpr (ahead > 0) {
      __builtin_prefetch(g + i + ahead);
      __builtin_prefetch(a + i + ahead, 1);
      if constexpr (streams > 1) __builtin_prefetch(b + i + ahead, 1);
      if constexpr (streams > 2) __builtin_prefetch(c + i + ahead, 1);
    }
#pragma omp simd
    for (std::ptrdiff_t j = i; j < i + line; ++j) {
      a[j] += g[j];
      if constexpr (streams > 1) b[j] += 1.0f;
      if constexpr (streams > 2) c[j] += 1.0f;
    }
  }
  for (; i < n; ++i) {
    a[i] += g[i];
    if constexpr (streams > 1) b[i] += 1.0f;
    if constexpr (streams > 2) c[i] += 1.0f;
  }
}

template <int ahead>
void run(std::ptrdiff_t n, int streams, const float* g, float* const* s) {
  if (streams == 1) return add_one<1, ahead>(n, g, s[0], nullptr, nullptr);
  if (streams == 2) return add_one<2, ahead>(n, g, s[0], s[1], nullptr);
  add_one<3, ahead>(n, g, s[0], s[1], s[2]);
}

}  // namespace

// Elements of 4 bytes; variant 0: plain, 1 and 2: prefetched 512 and 1024 elements ahead.
extern "C" void floor_step(std::ptrdiff_t n, int streams, const float* g, float* const* s,
                           int variant, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const std::ptrdiff_t parts = omp_get_num_threads(), part = omp_get_thread_num();
    const std::ptrdiff_t begin = n / parts * part, end = part + 1 == parts ? n : begin + n / parts;
    float* shifted[3] = {};
    for (int k = 0; k < streams; ++k) shifted[k] = s[k] + begin;
    constexpr void (*variants[])(std::ptrdiff_t, int, const float*, float* const*) = {
        run<0>, run<512>, run<1024>};
    variants[variant](end - begin, streams, g + begin, shifted);
  }
}
