#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"

namespace fastopt {
namespace {

constexpr size_t most_axes = 64;  // NumPy's

// Calls visit(element, k) for the elements begin, begin + 1, ... of one stream, k from 0 on.
template <class T, class Visit>
void walk(const Task& task, int stream, index_t begin, index_t n, Visit visit) {
  char* const data = static_cast<char*>(task.streams[stream]);
  if (task.strided == nullptr) {
    T* const x = reinterpret_cast<T*>(data) + begin;
    for (index_t k = 0; k < n; ++k) visit(x[k], k);
    return;
  }
  const std::vector<index_t>& shape = task.strided->shape;
  const std::vector<index_t>& strides = task.strided->strides[size_t(stream)];
  const size_t inner = shape.size() - 1;
  index_t index[most_axes];
  index_t rest = begin;
  for (size_t axis = inner + 1; axis-- > 0; rest /= shape[axis]) index[axis] = rest % shape[axis];
  for (index_t k = 0; k < n;) {
    char* row = data;
    for (size_t axis = 0; axis <= inner; ++axis) row += index[axis] * strides[axis];
    const index_t count = std::min(n - k, shape[inner] - index[inner]);
    for (index_t j = 0; j < count; ++j, ++k)
      visit(*reinterpret_cast<T*>(row + j * strides[inner]), k);
    index[inner] = 0;
    for (size_t axis = inner; axis-- > 0 && ++index[axis] == shape[axis];) index[axis] = 0;
  }
}

// Block by block: gather the streams, run the same kernel, scatter all but the gradient.
template <class T>
void apply_in_tiles(const Task& task, const GradientScale& scale, index_t begin, index_t end) {
  T tiles[most_streams][block];
  void* streams[most_streams];
  for (int s = 0; s < task.stream_count; ++s) streams[s] = tiles[s];
  for (; begin < end; begin += block) {
    const index_t n = std::min(block, end - begin);
    for (int s = 0; s < task.stream_count; ++s) {
      T* const tile = tiles[s];
      walk<T>(task, s, begin, n, [=](T& x, index_t k) { tile[k] = x; });
    }
    if (scale.is_beyond) {
      for (index_t k = 0; k < n; ++k) {
        tiles[0][k] = T(double(tiles[0][k]) * scale.beyond[0] * scale.beyond[1]);
      }
    }
    task.update->run(task.coefficients, streams, 0, n);
    for (int s = 1; s < task.stream_count; ++s) {
      const T* const tile = tiles[s];
      walk<T>(task, s, begin, n, [=](T& x, index_t k) { x = tile[k]; });
    }
  }
}

template <class T>
void sum_strided(const SquareSum& square_sum, double scale, const Task& task, index_t begin,
                 index_t end, double (*sums)[2]) {
  T tile[block];
  for (; begin < end; begin += block, ++sums) {
    const index_t n = std::min(block, end - begin);
    walk<T>(task, 0, begin, n, [&](T& x, index_t k) { tile[k] = x; });
    square_sum.run(scale, tile, n, sums);
  }
}

void set_to_zero(const Task& task, index_t begin, index_t end) {
  const index_t item = item_size(task.update->dtype);
  if (task.strided == nullptr) {
    std::memset(static_cast<char*>(task.streams[0]) + begin * item, 0,
                size_t((end - begin) * item));
  } else if (task.update->dtype == Dtype::float32) {
    walk<float>(task, 0, begin, end - begin, [](float& x, index_t) { x = 0; });
  } else {
    walk<double>(task, 0, begin, end - begin, [](double& x, index_t) { x = 0; });
  }
}

// Gradients are set to zero in pieces of this many elements, while they are in the cache.
constexpr index_t zeroed_piece = 8 * block;

// A thread's share: whole blocks, by their cost in bytes. An array costs something however short.
constexpr index_t array_cost_bytes = 1024;

class Shares {
 public:
  Shares(const std::vector<Task>& tasks, bool gradient_only) {
    ends_.reserve(tasks.size());
    for (const Task& task : tasks) {
      const index_t streams = gradient_only ? 1 : 2 * task.stream_count - 1;  // read; written
      bytes_ += array_cost_bytes + task.size * item_size(task.update->dtype) * streams;
      ends_.push_back(bytes_);
    }
  }

  index_t bytes() const { return bytes_; }

  // Calls visit(task index, first element, end) for everything in this part.
  template <class Visit>
  void visit(const std::vector<Task>& tasks, int part, int parts, Visit visit) const {
    const Position first = position(tasks, part, parts), last = position(tasks, part + 1, parts);
    for (size_t i = first.task; i < tasks.size() && i <= last.task; ++i) {
      const index_t begin = i == first.task ? first.element : 0;
      const index_t end = i == last.task ? last.element : tasks[i].size;
      if (begin < end) visit(i, begin, end);
    }
  }

 private:
  struct Position {
    size_t task;
    index_t element;
  };

  Position position(const std::vector<Task>& tasks, int part, int parts) const {
    if (part == parts || tasks.empty()) return {tasks.size(), 0};
    const index_t target = bytes_ / parts * part;
    const size_t i = size_t(std::upper_bound(ends_.begin(), ends_.end(), target) - ends_.begin());
    const index_t start = i == 0 ? 0 : ends_[i - 1];
    const double fraction = double(target - start) / double(ends_[i] - start);
    return {i, index_t(fraction * double(blocks_of(tasks[i].size))) * block};
  }

  std::vector<index_t> ends_;
  index_t bytes_ = 0;
};

// fraction * 2^exponent, which reaches beyond a double. Products and quotients round as those of
// doubles do.
struct Wide {
  double fraction;
  int exponent;

  static Wide of(double x) {
    if (!std::isfinite(x)) return {x, 0};
    Wide wide;
    wide.fraction = std::frexp(x, &wide.exponent);
    return wide;
  }
  double rounded() const { return std::ldexp(fraction, exponent); }
};
Wide operator*(Wide a, Wide b) {
  return {a.fraction * b.fraction, a.exponent + b.exponent};
}
Wide operator/(Wide a, Wide b) {
  return {a.fraction / b.fraction, a.exponent - b.exponent};
}

struct GradientSum {
  Wide norm;
  bool finite;  // every element is
};

GradientSum gradient_norm(const Settings& settings, const std::vector<Task>& tasks) {
  const Shares shares(tasks, true);
  std::vector<index_t> first_block;
  index_t blocks = 0;
  for (const Task& task : tasks) {
    first_block.push_back(blocks);
    blocks += blocks_of(task.size);
  }
  struct Sums {
    double of[2];
  };
  std::vector<Sums> sums(static_cast<size_t>(blocks));

  // Of the gradients times 2^exponent.
  const auto total = [&](int exponent) {
    const double scale = std::ldexp(1.0, exponent);
    parallel_for(settings, shares.bytes(), [&](int part, int parts) {
      shares.visit(tasks, part, parts, [&](size_t i, index_t begin, index_t end) {
        const Task& task = tasks[i];
        const SquareSum& square_sum = settings.table->square_sum[size_t(task.update->dtype)];
        double(*const out)[2] = &sums[size_t(first_block[i] + begin / block)].of;
        if (task.strided == nullptr) {
          const index_t item = item_size(task.update->dtype);
          square_sum.run(scale, at(task.streams[0], begin, item), end - begin, out);
        } else if (task.update->dtype == Dtype::float32) {
          sum_strided<float>(square_sum, scale, task, begin, end, out);
        } else {
          sum_strided<double>(square_sum, scale, task, begin, end, out);
        }
      });
    });
    double square = 0, zero = 0;
    Wide root{};
    parallel_for(settings, 0, [&](int, int) {  // for its floating-point environment
      for (const Sums& sum : sums) {
        square += sum.of[0];
        zero += sum.of[1];
      }
      root = Wide::of(std::sqrt(square));
    });
    return std::pair(square, GradientSum{{root.fraction, root.exponent - exponent}, zero == 0.0});
  };

  // Squares of float64 overflow from 1e154 on, and below 1e-154 they lose digits.
  const auto [square, sum] = total(0);
  if (!sum.finite || (square >= 0x1p-900 && std::isfinite(square))) return sum;
  return total(square < 1 ? 600 : -600).second;
}

}  // namespace

GradientScale scale_gradients(const Settings& settings, const std::vector<Task>& tasks,
                              double loss_scale, std::optional<double> max_norm, bool measure) {
  GradientScale result;
  Settings exact = settings;  // the numbers of a step: in round-to-nearest, no one is flushed
  exact.flush_denormals = false;
  const bool measured = max_norm || measure;
  if (!measured && loss_scale == 1) return result;
  GradientSum sum{};
  if (measured) sum = gradient_norm(settings, tasks);
  parallel_for(exact, 0, [&](int, int) {
    Wide scale = Wide::of(1) / Wide::of(loss_scale);
    if (measured) {
      const Wide norm = sum.norm * scale;
      result.norm = norm.rounded();
      result.finite = sum.finite;
      if (max_norm) {
        // As torch: at most 1, and NaN stays NaN. A finite norm may be beyond a double.
        const bool in_reach = std::isfinite(result.norm) || !sum.finite;
        const Wide clip = Wide::of(*max_norm) / (in_reach ? Wide::of(result.norm + 1e-6) : norm);
        if (!(clip.rounded() > 1)) scale = scale * clip;
      }
    }
    result.factor = scale.rounded();
    const auto beyond = [&](const Task& task) {
      return task.update->dtype == Dtype::float32 ? !std::isnormal(float(result.factor))
                                                  : !std::isnormal(result.factor);
    };
    const bool is_number = scale.fraction != 0 && std::isfinite(scale.fraction);
    // What is a normal float is a normal double: usually no array is asked.
    const bool usual = std::isnormal(float(result.factor));
    if (!usual && is_number && std::any_of(tasks.begin(), tasks.end(), beyond)) {
      const int half = scale.exponent / 2;
      result.factor = 1;
      result.beyond[0] = std::ldexp(1.0, half);
      result.beyond[1] = std::ldexp(scale.fraction, scale.exponent - half);
      result.is_beyond = true;
    }
  });
  return result;
}

void update(const Settings& settings, const std::vector<Task>& tasks, const GradientScale& scale,
            bool zero_grads) {
  const Shares shares(tasks, false);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(tasks, part, parts, [&](size_t i, index_t begin, index_t end) {
      const Task& task = tasks[i];
      const index_t piece = zero_grads ? zeroed_piece : end - begin;
      for (index_t next; begin < end; begin = next) {
        next = std::min(begin + piece, end);
        if (task.strided == nullptr && !scale.is_beyond) {
          task.update->run(task.coefficients, task.streams, begin, next - begin);
        } else if (task.update->dtype == Dtype::float32) {
          apply_in_tiles<float>(task, scale, begin, next);
        } else {
          apply_in_tiles<double>(task, scale, begin, next);
        }
        if (zero_grads) set_to_zero(task, begin, next);
      }
    });
  });
}

void zero_gradients(const Settings& settings, const std::vector<Task>& tasks) {
  const Shares shares(tasks, true);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(tasks, part, parts,
                 [&](size_t i, index_t begin, index_t end) { set_to_zero(tasks[i], begin, end); });
  });
}

}  // namespace fastopt
