#include "parallel.h"

#include <pthread.h>

#ifdef _OPENMP
#include <omp.h>
#pragma weak omp_pause_resource_all  // an older runtime may lack it
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastopt {
namespace {

// Round to nearest, no traps, subnormals flushed or kept; undone at the end of the scope.
class FloatingPointEnvironment {
#if defined(__x86_64__)
 public:
  explicit FloatingPointEnvironment(bool flush) : saved_(_mm_getcsr()) {
    constexpr unsigned all_masked = 0x1f80, flush_to_zero = 0x8000, denormals_are_zero = 0x0040;
    _mm_setcsr(all_masked | (flush ? flush_to_zero | denormals_are_zero : 0));
  }
  ~FloatingPointEnvironment() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#elif defined(__aarch64__)
 public:
  explicit FloatingPointEnvironment(bool flush) {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    constexpr unsigned long flush_to_zero = 1ul << 24;
    asm volatile("msr fpcr, %0" : : "r"(flush ? flush_to_zero : 0ul));
  }
  ~FloatingPointEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  unsigned long saved_;
#else
 public:
  explicit FloatingPointEnvironment(bool) {}
#endif
  FloatingPointEnvironment(const FloatingPointEnvironment&) = delete;
  void operator=(const FloatingPointEnvironment&) = delete;
};

#ifdef _OPENMP
bool serial = false;

// libgomp's threads do not survive a fork, and it would wait for them for ever in the child. So
// this thread's team is dismissed before the fork; where the runtime cannot do that, the child
// works alone.
[[maybe_unused]] const int fork_handler = pthread_atfork(
    [] {
      if (omp_pause_resource_all != nullptr) omp_pause_resource_all(omp_pause_soft);
    },
    nullptr, [] { serial = omp_pause_resource_all == nullptr; });
#endif

}  // namespace

#ifdef _OPENMP
bool has_openmp() {
  return true;
}
#else
bool has_openmp() {
  return false;
}
#endif

void detail::parallel_for(const Settings& settings, [[maybe_unused]] index_t bytes,
                          void (*call)(const void*, int, int), const void* body) {
#ifdef _OPENMP
  if (settings.threads > 1 && bytes >= parallel_from_bytes && !serial && !omp_in_parallel()) {
#pragma omp parallel num_threads(settings.threads)
    {
      const FloatingPointEnvironment environment(settings.flush_denormals);
      call(body, omp_get_thread_num(), omp_get_num_threads());
    }
    return;
  }
#endif
  const FloatingPointEnvironment environment(settings.flush_denormals);
  call(body, 0, 1);
}

}  // namespace fastopt
