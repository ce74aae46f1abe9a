// Memory of outputs and of scratch arrays. Mapping fresh memory costs as much as the work on it, so
// what was large and is given back is kept, within a bound, for the next request of its size.
#pragma once

#include <cstddef>

namespace fastopt {

constexpr std::size_t kept_from_bytes = 1 << 16;  // below it others do well

// Not initialised.
void* take(std::size_t bytes);

// As many bytes as were taken.
void give(void* data, std::size_t bytes);

// Returns what is kept to the system.
void empty_cache();

// The same, and nothing is kept from now on.
void close_cache();

}  // namespace fastopt
