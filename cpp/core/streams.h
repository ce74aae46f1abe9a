// The streams of a step as the kernels want them: dense, and of the type that a rule computes in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "element.h"
#include "parallel.h"
#include "step.h"

namespace fastopt {

constexpr size_t most_axes = 64;  // NumPy's

inline bool is_dense(const ArrayStep& step, int stream) {
  return step.layout == nullptr || step.layout->streams[size_t(stream)].dense;
}

// Calls visit(element, k) for the elements begin, begin + 1, ... of one stream, k from 0 on.
template <class T, class Visit>
void walk(const ArrayStep& step, int stream, index_t begin, index_t n, Visit visit) {
  char* const data = static_cast<char*>(step.streams[stream]);
  if (is_dense(step, stream)) {
    T* const x = reinterpret_cast<T*>(data) + begin;
    for (index_t k = 0; k < n; ++k) visit(x[k], k);
    return;
  }
  const std::vector<index_t>& shape = step.layout->shape;
  const std::vector<index_t>& strides = step.layout->streams[size_t(stream)].strides;
  const size_t inner = shape.size() - 1;
  index_t index[most_axes];
  index_t rest = begin;
  for (size_t axis = inner + 1; axis-- > 0; rest /= shape[axis]) index[axis] = rest % shape[axis];
  for (index_t k = 0; k < n;) {
    char* row = data;
    for (size_t axis = 0; axis <= inner; ++axis) row += index[axis] * strides[axis];
    const index_t count = std::min(n - k, shape[inner] - index[inner]);
    const auto visit_line = [&](auto apart) {
      for (index_t j = 0; j < count; ++j) visit(*reinterpret_cast<T*>(row + j * apart), k + j);
    };
    if (strides[inner] == 0) {
      visit_line(std::integral_constant<index_t, 0>());
    } else if (strides[inner] == sizeof(T)) {
      visit_line(std::integral_constant<index_t, sizeof(T)>());
    } else {
      visit_line(strides[inner]);
    }
    k += count;
    index[inner] = 0;
    for (size_t axis = inner; axis-- > 0 && ++index[axis] == shape[axis];) index[axis] = 0;
  }
}

inline Key key_of(const Storage& storage, int stream) {
  const std::uint64_t key = mixed(storage.key, std::uint64_t(stream));
  return {{unsigned(key), unsigned(key >> 32)}};
}

// Codes are loaded and stored in tiles of so many: of two blocks, since the codes of one wait for
// its scale; and no more, so that a page has room for several, and the processor, which sees how a
// stream goes on, reads ahead.
constexpr index_t tile_elements = 2 * scale_block;

// The first pass of two that a rule makes changes nothing but what it prepares.
enum class Pass { first, update };

// Streams as the kernels want them, a block at a time. One that is not dense, or not of the rule's
// dtype, is loaded into a tile, as is a gradient that is multiplied by two factors.
template <class T>
class Tiles {
 public:
  Tiles(const Settings& settings, const ArrayStep& step, const double* factors, Pass pass)
      : codecs_(settings.table->codec), step_(step), factors_(factors), pass_(pass) {
    for (int s = 0; s < step.stream_count; ++s) {
      in_place_[s] = is_in_place(s);
      if (step.storage != nullptr) keys_[s] = key_of(*step.storage, s);
    }
  }

  // Calls kernel(streams, element, n) over these elements.
  template <class Kernel>
  void run(Range elements, Kernel kernel) {
    const int master = step_.storage == nullptr ? 0 : step_.storage->master;
    const bool has_master = 0 < master && master < step_.stream_count;
    const bool is_coded = step_.storage != nullptr && pass_ == Pass::update;
    const index_t piece = is_coded ? tile_elements : block;
    for (auto [begin, end] = elements; begin < end; begin += piece) {
      const index_t n = std::min(piece, end - begin);
      void* streams[most_streams];
      std::copy_n(step_.streams, most_streams, streams);
      for (int s = 0; s < step_.stream_count; ++s) {
        streams[s] = in_place_[s] ? at(step_.streams[s], begin, sizeof(T)) : tiles_[s].element;
        const bool is_rounded_master = s == 1 && has_master && !step_.storage->is_first;
        if (!in_place_[s] && !is_rounded_master) load(s, begin, n);
      }
      if (factors_ != nullptr) {
        T* const gradient = tiles_[0].element;
        for (index_t k = 0; k < n; ++k) {
          gradient[k] = T(double(gradient[k]) * factors_[0] * factors_[1]);
        }
      }
      if (has_master) {
        if (step_.storage->is_first)
          std::memcpy(streams[master], streams[1], size_t(n) * sizeof(T));
        streams[1] = streams[master];
      }
      kernel(streams, begin, n);
      for (int s = 1; s < step_.stream_count; ++s) {
        const bool is_shared = step_.layout != nullptr && step_.layout->streams[size_t(s)].shared;
        const bool is_written = !is_shared && (pass_ == Pass::update || s == step_.prepared());
        if (!in_place_[s] && is_written) store(s, begin, n, static_cast<const T*>(streams[s]));
      }
    }
  }

 private:
  // Tiles that lie a multiple of a page apart would wait for each other.
  struct Tile {
    alignas(64) T element[block];
    char apart[5 * 64];
  };

  Dtype dtype(int s) const {
    return step_.storage == nullptr ? step_.rule->dtype : step_.storage->dtype[s];
  }

  bool is_in_place(int s) const {
    const bool is_changed = pass_ == Pass::first && s > 1 && s != step_.prepared();
    return is_dense(step_, s) && dtype(s) == step_.rule->dtype && !is_changed &&
           (s > 0 || factors_ == nullptr);
  }

  void load(int s, index_t begin, index_t n) {
    T* const tile = tiles_[s].element;
    if (dtype(s) == step_.rule->dtype) {
      walk<T>(step_, s, begin, n, [=](T& x, index_t k) { tile[k] = x; });
    } else if constexpr (sizeof(T) == sizeof(float)) {
      const void* from = at(step_.streams[s], begin, item_size(dtype(s)));
      std::uint16_t gathered[block];
      if (!is_dense(step_, s)) {
        walk<std::uint16_t>(step_, s, begin, n,
                            [&](std::uint16_t& x, index_t k) { gathered[k] = x; });
        from = gathered;
      }
      codecs_[size_t(dtype(s))].load(from, scales(s, begin), n, tile);
    }
  }

  void store(int s, index_t begin, index_t n, const T* tile) {
    if (dtype(s) == step_.rule->dtype) {
      walk<T>(step_, s, begin, n, [=](T& x, index_t k) { x = tile[k]; });
    } else if constexpr (sizeof(T) == sizeof(float)) {
      const Codec& codec = codecs_[size_t(dtype(s))];
      std::uint16_t rounded[block];
      const bool is_direct = is_dense(step_, s);
      void* const to = is_direct ? at(step_.streams[s], begin, item_size(dtype(s)))
                                 : static_cast<void*>(rounded);
      if (step_.storage->at_random[s]) {
        codec.store_at_random(tile, step_.storage->first + begin, n, keys_[s], to);
      } else {
        codec.store(tile, n, to, scales(s, begin));
      }
      if (!is_direct) {
        walk<std::uint16_t>(step_, s, begin, n,
                            [&](std::uint16_t& x, index_t k) { x = rounded[k]; });
      }
    }
  }

  float* scales(int s, index_t begin) const {
    float* const all = step_.storage->scales[s];
    return all == nullptr ? nullptr : all + begin / scale_block;
  }

  const Codec* codecs_;
  const ArrayStep& step_;
  const double* factors_;
  const Pass pass_;
  bool in_place_[most_streams];
  Key keys_[most_streams];
  Tile tiles_[most_streams];
};

inline bool needs_tiles(const ArrayStep& step, const double* factors) {
  return step.layout != nullptr || step.storage != nullptr || factors != nullptr;
}

// Apart, since tiles take much of the stack.
template <class Kernel>
[[gnu::noinline]] void run_in_tiles(const Settings& settings, const ArrayStep& step,
                                    const double* factors, Pass pass, Range elements,
                                    Kernel kernel) {
  if (step.rule->dtype == Dtype::float32) {
    Tiles<float>(settings, step, factors, pass).run(elements, kernel);
  } else {
    Tiles<double>(settings, step, factors, pass).run(elements, kernel);
  }
}

// Calls kernel(streams, element, n) over these elements.
template <class Kernel>
void run(const Settings& settings, const ArrayStep& step, const double* factors, Pass pass,
         Range elements, Kernel kernel) {
  if (needs_tiles(step, factors)) {
    return run_in_tiles(settings, step, factors, pass, elements, kernel);
  }
  const index_t n = elements.end - elements.begin;
  if (elements.begin == 0) return kernel(step.streams, 0, n);
  void* streams[most_streams];
  const index_t item = item_size(step.rule->dtype);
  for (int s = 0; s < most_streams; ++s) streams[s] = at(step.streams[s], elements.begin, item);
  kernel(streams, elements.begin, n);
}

inline void set_to_zero(const ArrayStep& step, index_t begin, index_t end) {
  const Dtype dtype = step.storage == nullptr ? step.rule->dtype : step.storage->dtype[0];
  const index_t item = item_size(dtype);
  const auto zero = [](auto& x, index_t) { x = 0; };
  if (is_dense(step, 0)) {
    std::memset(at(step.streams[0], begin, item), 0, size_t((end - begin) * item));
  } else if (item == 2) {
    walk<std::uint16_t>(step, 0, begin, end - begin, zero);
  } else if (item == 4) {
    walk<float>(step, 0, begin, end - begin, zero);
  } else {
    walk<double>(step, 0, begin, end - begin, zero);
  }
}

}  // namespace fastopt
