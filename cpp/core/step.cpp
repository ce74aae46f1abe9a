#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"

namespace fastopt {
namespace {

// Calls visit(element, k) for the elements begin, begin + 1, ... of one stream, k from 0 on.
template <class T, class Visit>
void walk(const Strided& strided, int stream, void* data, index_t begin, index_t n, Visit visit) {
  const std::vector<index_t>& strides = strided.strides[size_t(stream)];
  const size_t inner = strided.shape.size() - 1;
  std::vector<index_t> index(inner + 1);
  index_t rest = begin;
  for (size_t axis = inner + 1; axis-- > 0; rest /= strided.shape[axis]) {
    index[axis] = rest % strided.shape[axis];
  }
  for (index_t k = 0; k < n;) {
    char* row = static_cast<char*>(data);
    for (size_t axis = 0; axis <= inner; ++axis) row += index[axis] * strides[axis];
    const index_t count = std::min(n - k, strided.shape[inner] - index[inner]);
    for (index_t j = 0; j < count; ++j, ++k)
      visit(*reinterpret_cast<T*>(row + j * strides[inner]), k);
    index[inner] = 0;
    for (size_t axis = inner; axis-- > 0 && ++index[axis] == strided.shape[axis];) index[axis] = 0;
  }
}

// Block by block: gather the streams, run the same kernel, scatter all but the gradient.
template <class T>
void apply_strided(const Task& task, index_t begin, index_t end) {
  std::vector<T> scratch(size_t(task.stream_count * block));
  std::vector<void*> tiles(size_t(task.stream_count));
  for (int s = 0; s < task.stream_count; ++s) tiles[size_t(s)] = &scratch[size_t(s * block)];
  for (; begin < end; begin += block) {
    const index_t n = std::min(block, end - begin);
    for (int s = 0; s < task.stream_count; ++s) {
      T* const tile = static_cast<T*>(tiles[size_t(s)]);
      walk<T>(*task.strided, s, task.streams[s], begin, n, [=](T& x, index_t k) { tile[k] = x; });
    }
    task.update->run(task.coefficients, tiles.data(), 0, n);
    for (int s = 1; s < task.stream_count; ++s) {
      const T* const tile = static_cast<const T*>(tiles[size_t(s)]);
      walk<T>(*task.strided, s, task.streams[s], begin, n, [=](T& x, index_t k) { x = tile[k]; });
    }
  }
}

template <class T>
void sum_strided(const SquareSum& square_sum, double scale, const Task& task, index_t begin,
                 index_t end, double (*sums)[2]) {
  T tile[block];
  for (; begin < end; begin += block, ++sums) {
    const index_t n = std::min(block, end - begin);
    walk<T>(*task.strided, 0, task.streams[0], begin, n, [&](T& x, index_t k) { tile[k] = x; });
    square_sum.run(scale, tile, n, sums);
  }
}

void set_to_zero(const Task& task, index_t begin, index_t end) {
  const index_t item = item_size(task.update->dtype);
  if (task.strided == nullptr) {
    std::memset(static_cast<char*>(task.streams[0]) + begin * item, 0,
                size_t((end - begin) * item));
  } else if (task.update->dtype == Dtype::float32) {
    walk<float>(*task.strided, 0, task.streams[0], begin, end - begin,
                [](float& x, index_t) { x = 0; });
  } else {
    walk<double>(*task.strided, 0, task.streams[0], begin, end - begin,
                 [](double& x, index_t) { x = 0; });
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

}  // namespace

void update(const Settings& settings, const std::vector<Task>& tasks, bool zero_grads) {
  const Shares shares(tasks, false);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(tasks, part, parts, [&](size_t i, index_t begin, index_t end) {
      const Task& task = tasks[i];
      const index_t piece = zero_grads ? zeroed_piece : end - begin;
      for (index_t next; begin < end; begin = next) {
        next = std::min(begin + piece, end);
        if (task.strided == nullptr) {
          task.update->run(task.coefficients, task.streams, begin, next - begin);
        } else if (task.update->dtype == Dtype::float32) {
          apply_strided<float>(task, begin, next);
        } else {
          apply_strided<double>(task, begin, next);
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

  const auto total = [&](double scale) {
    parallel_for(settings, shares.bytes(), [&](int part, int parts) {
      shares.visit(tasks, part, parts, [&](size_t i, index_t begin, index_t end) {
        const Task& task = tasks[i];
        const SquareSum& square_sum = settings.table->square_sum[size_t(task.update->dtype)];
        double(*const out)[2] = &sums[size_t(first_block[i] + begin / block)].of;
        const char* gradient = static_cast<const char*>(task.streams[0]);
        if (task.strided == nullptr) {
          square_sum.run(scale, gradient + begin * item_size(task.update->dtype), end - begin, out);
        } else if (task.update->dtype == Dtype::float32) {
          sum_strided<float>(square_sum, scale, task, begin, end, out);
        } else {
          sum_strided<double>(square_sum, scale, task, begin, end, out);
        }
      });
    });
    GradientSum result{};
    parallel_for(settings, 0, [&](int, int) {  // for its floating-point environment
      double square = 0, zero = 0;
      for (const Sums& sum : sums) {
        square += sum.of[0];
        zero += sum.of[1];
      }
      result = {std::sqrt(square) / scale, zero == 0.0};
    });
    return result;
  };

  const GradientSum sum = total(1.0);
  if (!sum.finite || std::isfinite(sum.norm)) return sum;
  return total(0x1p-600);  // float64 squares overflow from 1e154 on
}

}  // namespace fastopt
