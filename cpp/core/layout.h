// Where the elements of arrays lie, and how several arrays are walked together: nothing of who owns
// them.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "kernels/table.h"

namespace fastopt {

// An array: shape and strides, these in bytes, are somebody else's.
struct View {
  char* data;
  Dtype dtype;
  bool writable;
  index_t ndim;
  const index_t* shape;
  const index_t* strides;

  index_t size() const;
};

// The addresses of the first byte and past the last one.
struct Extent {
  const char* begin;
  const char* end;

  explicit Extent(const View& view);
};

// True if the elements fill their extent.
bool is_packed(const View& view);

// True if two elements may lie at one address: the axes must nest, as those of every slice do.
bool overlaps_itself(const View& view);

// Which of many extents meet another.
class Regions {
 public:
  void clear() { parts_.clear(); }
  void add(const Extent& extent, size_t id);

  // After all were added: calls met(id, id) for every two that have bytes in common.
  template <class Met>
  void sort(Met met) {
    const auto first = [](const Part& a, const Part& b) { return a.extent.begin < b.extent.begin; };
    std::stable_sort(parts_.begin(), parts_.end(), first);
    const char* reach = nullptr;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const char* const end = parts_[i].extent.end;
      for (size_t j = i + 1; j < parts_.size() && parts_[j].extent.begin < end; ++j) {
        met(parts_[i].id, parts_[j].id);
      }
      reach = parts_[i].reach = std::max(reach, end);
    }
  }

  // Calls met(id) for every one of them that this has bytes in common with.
  template <class Met>
  void meet(const Extent& extent, Met met) const {
    const auto before = [](const Part& part, const char* end) { return part.extent.begin < end; };
    auto part = std::lower_bound(parts_.begin(), parts_.end(), extent.end, before);
    while (part != parts_.begin() && (--part)->reach > extent.begin) {
      if (part->extent.end > extent.begin) met(part->id);
    }
  }

 private:
  struct Part {
    Extent extent;
    const char* reach;  // the farthest end among this and those before it
    size_t id;
  };
  std::vector<Part> parts_;
};

// The axes in which arrays of one shape are walked, outer to inner, as the elements are counted.
struct Layout {
  struct Stream {
    std::vector<index_t> strides;  // in bytes
    bool dense;                    // elements that follow each other lie side by side
    bool shared;                   // several are one: it is only read
  };
  std::vector<index_t> shape;
  std::vector<Stream> streams;

  bool dense() const;  // all are
};

// In the order of memory of this view; axes are joined that all walk as one.
Layout layout_of(std::span<const View> views, const View& order);

}  // namespace fastopt
