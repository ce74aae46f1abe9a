#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "factors.h"
#include "streams.h"

namespace fastopt {
namespace {

// Gradients are set to zero in pieces of this many elements, while they are in the cache.
constexpr index_t zeroed_piece = 8 * block;

// A thread's share: whole blocks, by their cost in bytes. An array costs something however short.
constexpr index_t array_cost_bytes = 1024;

class BlockShares {
 public:
  BlockShares(const std::vector<ArrayStep>& steps, bool gradient_only) : shares_(steps.size()) {
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

  // Of all arrays, where others have the rest of them.
  void exchange(const Exchange& with_others, int count) {
    if (!with_others) return;
    sums_ = with_others(sums_, count);
  }

  // Adds the sums of all arrays, which have so many each, to these.
  void total_of_all(int count, double* sums) const {
    for (size_t i = 0; i < sums_.size(); ++i) sums[i % size_t(count)] += sums_[i];
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
                         int exponent, const Exchange& exchange) {
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
  blocks.exchange(exchange, 2);
  double sums[2] = {};
  // For its floating-point environment.
  parallel_for(settings, 0, [&](int, int) { blocks.total_of_all(2, sums); });
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

struct Combined {
  std::vector<Coefficients> of;
  bool is_step = true;
};

// The coefficients of every array of a rule that adds up: they follow from its sums, or from those
// of all arrays.
Combined reduce_and_combine(const Settings& settings, const std::vector<ArrayStep>& steps,
                            const BlockShares& shares, const Factors& of_rows,
                            const double* factors, const Exchange& exchange) {
  const auto adds_up = [](const ArrayStep& step) { return step.rule->reduce != nullptr; };
  if (std::none_of(steps.begin(), steps.end(), adds_up)) return {};
  BlockSums blocks;
  for (const ArrayStep& step : steps) blocks.add_array(step.size, step.rule->sum_count);
  Combined combined{std::vector<Coefficients>(steps.size())};
  // No memory is asked for from here on: states are written.
  factor(settings, of_rows, factors);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts, [&](size_t i, index_t begin, index_t end) {
      if (!adds_up(steps[i])) return;
      const ArrayStep& step = steps[i];
      blocks.add(settings, i, step, step.rule->reduce, step.coefficients, factors, {begin, end});
    });
  });
  const Rule& first = *steps[0].rule;
  if (first.over_all) blocks.exchange(exchange, first.sum_count);
  Settings exact = settings;
  exact.flush_denormals = false;
  parallel_for(exact, 0, [&](int, int) {
    double over_all[most_sums] = {};
    if (first.over_all) blocks.total_of_all(first.sum_count, over_all);
    for (size_t i = 0; i < steps.size(); ++i) {
      const Rule& rule = *steps[i].rule;
      if (!adds_up(steps[i])) continue;
      double* const coefficients = combined.of[i].value;
      std::copy_n(steps[i].coefficients, most_coefficients, coefficients);
      double own[most_sums] = {};
      if (!rule.over_all) blocks.total(i, own);
      const double* const sums = rule.over_all ? over_all : own;
      combined.is_step &= rule.combine(coefficients, sums, steps[i].size);
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

GradientNorm measure(const Settings& settings, const std::vector<ArrayStep>& steps,
                     const Exchange& exchange) {
  int exponent = 0;
  SquareSums sums = sum_gradients(settings, steps, exponent, exchange);
  // Squares of float64 overflow from 1e154 on, and below 1e-154 they lose digits.
  if (sums.nonfinite == 0.0 && !(sums.square >= 0x1p-900 && std::isfinite(sums.square))) {
    exponent = sums.square < 1 ? 600 : -600;
    sums = sum_gradients(settings, steps, exponent, exchange);
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

Applied apply(const Settings& settings, const std::vector<ArrayStep>& given,
              const GradientScale& scale, bool zero_grads, const Exchange& exchange) {
  const double* const factors = scale.is_beyond ? scale.beyond : nullptr;
  const Factors of_rows(given);
  const std::vector<ArrayStep>& steps = of_rows.empty() ? given : of_rows.steps();
  const BlockShares shares(steps, false);
  const Combined combined = reduce_and_combine(settings, steps, shares, of_rows, factors, exchange);
  Applied result{combined.is_step};
  if (!combined.of.empty()) {
    std::copy_n(combined.of[0].value, most_coefficients, result.combined);
  }
  if (!result.is_step) {
    if (zero_grads) zero_gradients(settings, steps);
    return result;
  }
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts, [&](size_t i, index_t begin, index_t end) {
      const ArrayStep& step = steps[i];
      const double* const coefficients =
          step.rule->reduce == nullptr ? step.coefficients : combined.of[i].value;
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
  return result;
}

void zero_gradients(const Settings& settings, const std::vector<ArrayStep>& steps) {
  const BlockShares shares(steps, true);
  parallel_for(settings, shares.bytes(), [&](int part, int parts) {
    shares.visit(steps, part, parts,
                 [&](size_t i, index_t begin, index_t end) { set_to_zero(steps[i], begin, end); });
  });
}

}  // namespace fastopt
