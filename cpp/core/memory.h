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

// Arrays of n numbers, not initialised.
class Scratch {
 public:
  Scratch(std::ptrdiff_t arrays, std::ptrdiff_t n)
      : n_(n), bytes_(std::size_t(arrays * n) * sizeof(double)), data_(take(bytes_)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { give(data_, bytes_); }

  double* operator[](std::ptrdiff_t array) const {
    return static_cast<double*>(data_) + array * n_;
  }

 private:
  std::ptrdiff_t n_;
  std::size_t bytes_;
  void* data_;
};

}  // namespace fastopt
