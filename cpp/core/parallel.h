// The only threads of the library, and the floating-point environment in which kernels run.
#pragma once

#include "kernels/table.h"

namespace fastopt {

// How a call runs: Python resolves it (fastopt.get_config) and hands it down.
struct Settings {
  const Table* table;
  int threads;
  bool flush_denormals;
};

// Below this, about 20 us of work, a second thread saves 10 us where calls follow each other and it
// is awake; where it sleeps, to wake it took up to 180 us.
inline index_t parallel_from_bytes = 1 << 20;  // tests lower it

// Loads the OpenMP runtime that lies beside this object; false where there is none, or it lacks a
// function.
bool load_openmp();

namespace detail {
void parallel_for(const Settings& settings, index_t bytes,
                  void (*call)(const void* body, int part, int parts), const void* body);
}

// Calls body(part, parts) for every part, in parallel where `bytes` of memory traffic make that
// worth it, each in round-to-nearest with subnormals as the settings say. The caller's
// floating-point environment is as before when it returns.
template <class Body>
void parallel_for(const Settings& settings, index_t bytes, const Body& body) {
  detail::parallel_for(
      settings, bytes,
      [](const void* b, int part, int parts) { (*static_cast<const Body*>(b))(part, parts); },
      &body);
}

}  // namespace fastopt
