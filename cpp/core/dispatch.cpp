#include "dispatch.h"

namespace fastopt {

// FASTOPT_ISAS is X(name) X(name)..., the best first; CMakeLists.txt defines it.
#define X(isa)              \
  namespace isa {           \
  extern const Table table; \
  }
FASTOPT_ISAS
#undef X

namespace {

#define X(isa) &isa::table,
constexpr const Table* tables[] = {FASTOPT_ISAS};
#undef X

}  // namespace

std::span<const Table* const> built_tables() {
  return tables;
}

bool runs_here([[maybe_unused]] const Table& table) {
#if defined(__x86_64__)
  const std::string_view isa = table.isa;
  // The microarchitecture levels by name need GCC 12; these features tell them apart.
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  }
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return true;
}

const Table* find_table(std::string_view isa) {
  for (const Table* table : tables) {
    if (table->isa == isa) return table;
  }
  return nullptr;
}

}  // namespace fastopt
