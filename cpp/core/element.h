// An element's size and place, and who works on which of many.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

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

// A thread's share of many arrays: whole units of them, by their cost in bytes.
class Shares {
 public:
  explicit Shares(size_t arrays = 0) { arrays_.reserve(arrays); }

  // The next array.
  void add(index_t bytes, index_t units) {
    bytes_ += bytes;
    arrays_.push_back({bytes_, units});
  }

  index_t bytes() const { return bytes_; }

  // Calls visit(array index, its units) for everything in this part.
  template <class Visit>
  void visit(int part, int parts, Visit visit) const {
    const Position first = position(part, parts), last = position(part + 1, parts);
    const size_t past = std::min(last.array + 1, arrays_.size());
    for (size_t i = first.array; i < past; ++i) {
      const index_t begin = i == first.array ? first.unit : 0;
      const index_t end = i == last.array ? last.unit : arrays_[i].units;
      if (begin < end) visit(i, Range{begin, end});
    }
  }

 private:
  struct Array {
    index_t end;  // in bytes
    index_t units;
  };
  struct Position {
    size_t array;
    index_t unit;
  };

  Position position(int part, int parts) const {
    if (part == parts || bytes_ == 0) return {arrays_.size(), 0};
    const index_t target = bytes_ / parts * part;
    const auto past = [](index_t bytes, const Array& array) { return bytes < array.end; };
    const auto i =
        size_t(std::upper_bound(arrays_.begin(), arrays_.end(), target, past) - arrays_.begin());
    const index_t start = i == 0 ? 0 : arrays_[i - 1].end;
    const double fraction = double(target - start) / double(arrays_[i].end - start);
    return {i, index_t(fraction * double(arrays_[i].units))};
  }

  std::vector<Array> arrays_;
  index_t bytes_ = 0;
};

}  // namespace fastopt
