#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <latch>
#include <string>
#include <thread>
#include <vector>

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

// The functions of the OpenMP runtime, GCC's. They are called by address: by name they would be
// those of another library's copy, whichever was loaded first, with its settings and its threads.
struct Runtime {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();
  int (*pause)(int kind);
};
Runtime runtime{};  // without one every call is serial

thread_local int team = 1;  // each thread has a team of its own, of so many threads, itself one

// The runtime's threads do not survive a fork, and it would wait for them for ever in the child. So
// this thread's team is dismissed before the fork.
[[maybe_unused]] const int fork_handler = pthread_atfork(
    [] {
      constexpr int soft = 1;
      if (runtime.pause != nullptr) runtime.pause(soft);
      team = 1;
    },
    nullptr, nullptr);

// Whether this thread's team can be so large. Where a thread cannot be made, for want of memory or
// by a limit, the runtime ends the process; so others try it first, and leave it their stacks.
bool room_for_team(int threads) {
  std::latch all_made(1);
  std::vector<std::thread> others;
  bool made = true;
  try {
    for (int other = 1; other < threads; ++other) others.emplace_back([&] { all_made.wait(); });
  } catch (const std::exception&) {
    made = false;
  }
  all_made.count_down();
  for (std::thread& other : others) other.join();
  return made;
}

struct Call {
  const Settings& settings;
  void (*call)(const void* body, int part, int parts);
  const void* body;
  std::exception_ptr error;  // the first one: there was no memory for scratch
  std::atomic_flag failed;
};

void run_part(void* data) noexcept {
  Call& call = *static_cast<Call*>(data);
  const FloatingPointEnvironment environment(call.settings.flush_denormals);
  try {
    call.call(call.body, runtime.thread(), runtime.threads());
  } catch (...) {
    if (!call.failed.test_and_set()) call.error = std::current_exception();
  }
}

}  // namespace

bool load_openmp() {
  Dl_info here;
  if (dladdr(reinterpret_cast<const void*>(&load_openmp), &here) == 0) return false;
  std::string path = here.dli_fname;
  path.replace(path.rfind('/') + 1, std::string::npos, "libfogomp.so");
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  Runtime found{};
  const auto find = [&]<class F>(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
  };
  if (!find(found.parallel, "GOMP_parallel") || !find(found.thread, "omp_get_thread_num") ||
      !find(found.threads, "omp_get_num_threads") || !find(found.pause, "omp_pause_resource_all")) {
    return false;
  }
  runtime = found;
  return true;
}

void detail::parallel_for(const Settings& settings, index_t bytes,
                          void (*call)(const void*, int, int), const void* body) {
  if (settings.threads > 1 && bytes >= parallel_from_bytes && runtime.parallel != nullptr &&
      (settings.threads <= team || room_for_team(settings.threads))) {
    team = settings.threads;
    Call shared{settings, call, body, nullptr, {}};
    runtime.parallel(&run_part, &shared, unsigned(settings.threads), 0);
    if (shared.error) std::rethrow_exception(shared.error);
    return;
  }
  const FloatingPointEnvironment environment(settings.flush_denormals);
  call(body, 0, 1);
}

}  // namespace fastopt
