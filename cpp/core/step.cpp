#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "factors.h"

namespace fastopt {
namespace {

constexpr size_t most_axes = 64;  // NumPy's

bool is_dense(const ArrayStep& step, int stream) {
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

Key key_of(const ArrayStep& step, int stream) {
  const std::uint64_t key = mixed(step.key, std::uint64_t(stream));
  return {{unsigned(key), unsigned(key >> 32)}};
}

// Codes are loaded and stored in tiles of so many: a page has room for several, so that the
// processor sees how a stream goes on, and reads ahead.
constexpr index_t tile_elements = scale_block;

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
      keys_[s] = key_of(step, s);
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
        const bool is_rounded_master = s == 1 && has_master && !step_.is_first;
        if (!in_place_[s] && !is_rounded_master) load(s, begin, n);
      }
      if (factors_ != nullptr) {
        T* const gradient = tiles_[0].element;
        for (index_t k = 0; k < n; ++k) {
          gradient[k] = T(double(gradient[k]) * factors_[0] * factors_[1]);
        }
      }
      if (has_master) {
        if (step_.is_first) std::memcpy(streams[master], streams[1], size_t(n) * sizeof(T));
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
        codec.store_at_random(tile, begin, n, keys_[s], to);
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

bool needs_tiles(const ArrayStep& step, const double* factors) {
  return step.layout != nullptr || step.storage != nullptr || factors != nullptr;
}

// Calls kernel(streams, element, n) over these elements.
template <class Kernel>
void run(const Settings& settings, const ArrayStep& step, const double* factors, Pass pass,
         Range elements, Kernel kernel) {
  if (!needs_tiles(step, factors)) {
    const index_t n = elements.end - elements.begin;
    if (elements.begin == 0) return kernel(step.streams, 0, n);
    void* streams[most_streams];
    const index_t item = item_size(step.rule->dtype);
    for (int s = 0; s < most_streams; ++s) streams[s] = at(step.streams[s], elements.begin, item);
    kernel(streams, elements.begin, n);
  } else if (step.rule->dtype == Dtype::float32) {
    Tiles<float>(settings, step, factors, pass).run(elements, kernel);
  } else {
    Tiles<double>(settings, step, factors, pass).run(elements, kernel);
  }
}

void set_to_zero(const ArrayStep& step, index_t begin, index_t end) {
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

// Gradients are set to zero in pieces of this many elements, while they are in the cache.
constexpr index_t zeroed_piece = 8 * block;

// A thread's share: whole blocks, by their cost in bytes. An array costs something however short.
constexpr index_t array_cost_bytes = 1024;

class BlockShares {
 public:
  BlockShares(const std::vector<ArrayStep>& steps, bool gradient_only) {
    for (const ArrayStep& step : steps) {
      const index_t streams = gradient_only ? 1 : 2 * step.stream_count - 1;  // read; written
      const index_t bytes = step.size * item_size(step.rule->dtype) * streams;
      shares_.add(array_cost_bytes + bytes, blocks_of(step.size));
    }
  }

  index_t bytes() const { return shares_.bytes(); }

  // Calls visit(array index, first element, end) for everything in this part.
  template <class Visit>
  void visit(const std::vector<ArrayStep>& steps, int part, int parts, Visit visit) const {
    shares_.visit(part, parts, [&](size_t i, Range blocks) {
      visit(i, blocks.begin * block, std::min(blocks.end * block, steps[i].size));
    });
  }

 private:
  Shares shares_;
};

// Products and quotients round as those of doubles do.
Wide wide(double x) {
  if (!std::isfinite(x)) return {x, 0};
  Wide result;
  result.fraction = std::frexp(x, &result.exponent);
  return result;
}
double rounded(Wide x) {
  return std::ldexp(x.fraction, x.exponent);
}
Wide operator*(Wide a, Wide b) {
  return {a.fraction * b.fraction, a.exponent + b.exponent};
}
Wide operator/(Wide a, Wide b) {
  return {a.fraction / b.fraction, a.exponent - b.exponent};
}

// What is added up over the blocks of arrays.
class BlockSums {
 public:
  // The next array, with so many numbers a block.
  void add_array(index_t size, int count) {
    arrays_.push_back({sums_.size(), count});
    sums_.resize(sums_.size() + size_t(blocks_of(size) * count));
  }

  // Adds up these elements of an array; they begin with a block.
  void add(const Settings& settings, size_t array, const ArrayStep& step, Reduce reduce,
           const double* coefficients, const double* factors, Range elements) {
    const auto kernel = [&](void* const* streams, index_t element, index_t n) {
      const Array& of = arrays_[array];
      double* const sums = sums_.data() + of.begin + size_t(element / block * of.count);
      reduce(coefficients, streams, element, n, sums);
    };
    run(settings, step, factors, Pass::first, elements, kernel);
  }

  // Adds the sums of an array, in the order of its blocks, to these.
  void total(size_t array, double* sums) const {
    const auto [begin, count] = arrays_[array];
    const size_t end = array + 1 < arrays_.size() ? arrays_[array + 1].begin : sums_.size();
    for (size_t i = begin; i < end; ++i) sums[(i - begin) % size_t(count)] += sums_[i];
  }

 private:
  struct Array {
    size_t begin;
    int count;
  };
  std::vector<Array> arrays_;
  std::vector<double> sums_;
};

struct SquareSums {
  double square, nonfinite;
};

// Of the gradients times 2^exponent.
SquareSums sum_gradients(const Settings& settings, const std::vector<ArrayStep>& steps,
                         int exponent) {
  const BlockShares shares(steps, true);
  BlockSums blocks;
  for (const ArrayStep& step : steps) blocks.add_array(step.size, 2);
  const double scale = std::ldexp(1.0, exponent);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts, [&](size_t i, index_t begin, index_t end) {
      ArrayStep gradient = steps[i];
      gradient.stream_count = 1;
      const Reduce reduce = settings.table->gradient_norm[size_t(gradient.rule->dtype)];
      blocks.add(settings, i, gradient, reduce, &scale, nullptr, {begin, end});
    });
  });
  double sums[2] = {};
  parallel_for(settings, 0, [&](int, int) {  // for its floating-point environment
    for (size_t i = 0; i < steps.size(); ++i) blocks.total(i, sums);
  });
  return {sums[0], sums[1]};
}

// Adds up the squares of factored arrays, and moves what follows from them.
void factor(const Settings& settings, const Factors& factors, const double* scale) {
  if (factors.empty()) return;
  parallel_for(settings, factors.bytes(), [&](int part, int parts) {
    factors.each_line(part, parts, [&](const Line& line) {
      const auto& [step, element, apart, n, along, across] = line;
      const auto add = [&](const void* gradient) {
        along = step.rule->add_squares(step.coefficients, gradient, n, across);
      };
      if (apart == 1) {
        run(settings, step, scale, Pass::first, {element, element + n},
            [&](void* const* streams, index_t, index_t) { add(streams[0]); });
        return;
      }
      const index_t item = item_size(step.rule->dtype);
      double gathered[block];
      for (index_t k = 0; k < n; ++k) {
        const index_t from = element + k * apart;
        const auto gather = [&](void* const* streams, index_t, index_t) {
          std::memcpy(at(gathered, k, item), streams[0], size_t(item));
        };
        run(settings, step, scale, Pass::first, {from, from + 1}, gather);
      }
      add(gathered);
    });
  });
  Settings exact = settings;
  exact.flush_denormals = false;
  parallel_for(exact, factors.bytes_of_sums(),
               [&](int part, int parts) { factors.finish(part, parts); });
}

struct Coefficients {
  double value[most_coefficients];
};

// Those of every array of a rule that adds up: from its sums follow its own.
std::vector<Coefficients> reduce_and_combine(const Settings& settings,
                                             const std::vector<ArrayStep>& steps,
                                             const BlockShares& shares, const Factors& of_rows,
                                             const double* factors) {
  const auto adds_up = [](const ArrayStep& step) { return step.rule->reduce != nullptr; };
  if (std::none_of(steps.begin(), steps.end(), adds_up)) return {};
  BlockSums blocks;
  for (const ArrayStep& step : steps) blocks.add_array(step.size, step.rule->sum_count);
  std::vector<Coefficients> combined(steps.size());
  // No memory is asked for from here on: states are written.
  factor(settings, of_rows, factors);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts, [&](size_t i, index_t begin, index_t end) {
      if (!adds_up(steps[i])) return;
      const ArrayStep& step = steps[i];
      blocks.add(settings, i, step, step.rule->reduce, step.coefficients, factors, {begin, end});
    });
  });
  Settings exact = settings;
  exact.flush_denormals = false;
  parallel_for(exact, 0, [&](int, int) {
    for (size_t i = 0; i < steps.size(); ++i) {
      if (!adds_up(steps[i])) continue;
      std::copy_n(steps[i].coefficients, most_coefficients, combined[i].value);
      double sums[most_sums] = {};
      blocks.total(i, sums);
      steps[i].rule->combine(combined[i].value, sums, steps[i].size);
    }
  });
  return combined;
}

}  // namespace

// splitmix64.
std::uint64_t mixed(std::uint64_t key, std::uint64_t part) {
  key = (key ^ part) + 0x9e3779b97f4a7c15;
  key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
  key = (key ^ key >> 27) * 0x94d049bb133111eb;
  return key ^ key >> 31;
}

GradientNorm measure(const Settings& settings, const std::vector<ArrayStep>& steps) {
  int exponent = 0;
  SquareSums sums = sum_gradients(settings, steps, exponent);
  // Squares of float64 overflow from 1e154 on, and below 1e-154 they lose digits.
  if (sums.nonfinite == 0.0 && !(sums.square >= 0x1p-900 && std::isfinite(sums.square))) {
    exponent = sums.square < 1 ? 600 : -600;
    sums = sum_gradients(settings, steps, exponent);
  }
  GradientNorm norm{{0, 0}, sums.nonfinite == 0.0};
  parallel_for(settings, 0, [&](int, int) { norm.norm = wide(std::sqrt(sums.square)); });
  norm.norm.exponent -= exponent;
  return norm;
}

GradientScale scale_of(const Settings& settings, const std::vector<ArrayStep>& steps,
                       const std::optional<GradientNorm>& measured, double loss_scale,
                       std::optional<double> max_norm) {
  GradientScale result;
  if (!measured && loss_scale == 1) return result;
  Settings exact = settings;  // the numbers of a step: in round-to-nearest, no one is flushed
  exact.flush_denormals = false;
  parallel_for(exact, 0, [&](int, int) {
    Wide scale = wide(1) / wide(loss_scale);
    if (measured) {
      const Wide norm = measured->norm * scale;
      result.norm = rounded(norm);
      result.finite = measured->finite;
      if (max_norm) {
        // As torch: at most 1, and NaN stays NaN. A finite norm may be beyond a double.
        const bool in_reach = std::isfinite(result.norm) || !measured->finite;
        const Wide clip = wide(*max_norm) / (in_reach ? wide(result.norm + 1e-6) : norm);
        if (!(rounded(clip) > 1)) scale = scale * clip;
      }
    }
    result.factor = rounded(scale);
    const auto beyond = [&](const ArrayStep& step) {
      return step.rule->dtype == Dtype::float32 ? !std::isnormal(float(result.factor))
                                                : !std::isnormal(result.factor);
    };
    const bool is_number = scale.fraction != 0 && std::isfinite(scale.fraction);
    // What is a normal float is a normal double: usually no array is asked.
    const bool usual = std::isnormal(float(result.factor));
    if (!usual && is_number && std::any_of(steps.begin(), steps.end(), beyond)) {
      const int half = scale.exponent / 2;
      result.factor = 1;
      result.beyond[0] = std::ldexp(1.0, half);
      result.beyond[1] = std::ldexp(scale.fraction, scale.exponent - half);
      result.is_beyond = true;
    }
  });
  return result;
}

void prepare(const Settings& settings, const std::vector<ArrayStep>& steps,
             const GradientScale& scale) {
  const double* const factors = scale.is_beyond ? scale.beyond : nullptr;
  const BlockShares shares(steps, false);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts, [&](size_t i, index_t begin, index_t end) {
      const ArrayStep& step = steps[i];
      const auto kernel = [&](void* const* streams, index_t element, index_t n) {
        step.rule->prepare(step.coefficients, streams, element, n);
      };
      run(settings, step, factors, Pass::first, {begin, end}, kernel);
    });
  });
}

void apply(const Settings& settings, const std::vector<ArrayStep>& given,
           const GradientScale& scale, bool zero_grads) {
  const double* const factors = scale.is_beyond ? scale.beyond : nullptr;
  const Factors of_rows(given);
  const std::vector<ArrayStep>& steps = of_rows.empty() ? given : of_rows.steps();
  const BlockShares shares(steps, false);
  const std::vector<Coefficients> combined =
      reduce_and_combine(settings, steps, shares, of_rows, factors);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts, [&](size_t i, index_t begin, index_t end) {
      const ArrayStep& step = steps[i];
      const double* const coefficients =
          step.rule->reduce == nullptr ? step.coefficients : combined[i].value;
      // States in tiles are as they were before the first pass.
      const bool adds_again = step.rule->reduce != nullptr && step.rule->factor == nullptr &&
                              needs_tiles(step, factors);
      const auto kernel = [&](void* const* streams, index_t element, index_t n) {
        double counted[most_sums];  // before
        if (adds_again) step.rule->reduce(step.coefficients, streams, element, n, counted);
        step.rule->update(coefficients, streams, element, n);
      };
      const index_t piece = zero_grads ? zeroed_piece : end - begin;
      for (index_t next; begin < end; begin = next) {
        next = std::min(begin + piece, end);
        run(settings, step, factors, Pass::update, {begin, next}, kernel);
        if (zero_grads) set_to_zero(step, begin, next);
      }
    });
  });
}

void zero_gradients(const Settings& settings, const std::vector<ArrayStep>& steps) {
  const BlockShares shares(steps, true);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts,
                 [&](size_t i, index_t begin, index_t end) { set_to_zero(steps[i], begin, end); });
  });
}

}  // namespace fastopt
