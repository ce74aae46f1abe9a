// An element's size and place, and who works on which of many.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels/table.h"

namespace fastopt {

inline index_t item_size(Dtype dtype) {
  constexpr index_t bytes[dtype_count] = {4, 8, 2, 2, 1, 1};
  return bytes[size_t(dtype)];
}

// What is computed in.
inline Dtype compute_dtype(Dtype stored) {
  return stored == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// The element of this index; nothing has no elements.
inline const void* at(const void* data, index_t index, index_t item) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + index * item;
}
inline void* at(void* data, index_t index, index_t item) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + index * item;
}

struct Range {
  index_t begin, end;
};

// A part's share of n units; the first ones have one more where they do not come out even.
inline Range share(index_t n, int part, int parts) {
  return {n / parts * part + std::min<index_t>(n % parts, part),
          n / parts * (part + 1) + std::min<index_t>(n % parts, part + 1)};
}

// How many blocks n elements are; the last one may be short.
inline index_t blocks_of(index_t n) {
  return (n + block - 1) / block;
}

}  // namespace fastopt
