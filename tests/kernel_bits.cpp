// Prints hashes of what the kernels make of the same numbers: update rules, norms, losses. Built
// for two processors and run on both, it must print the same: `make test-aarch64` does that where
// Python itself cannot run.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string_view>
#include <vector>

#include "core/dispatch.h"
#include "core/losses.h"
#include "core/norm.h"
#include "core/step.h"

namespace {

using namespace fastopt;

const Settings settings{built_tables().front(), 1, false};

// From -2 to 2, exact in both dtypes.
template <class T>
std::vector<T> numbers(index_t n, unsigned seed) {
  std::vector<T> values;
  unsigned state = 2654435761u * (seed + 1);
  for (index_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    values.push_back(T(int(state >> 9) - (1 << 22)) / T(1 << 21));
  }
  return values;
}

template <class T>
std::vector<T> positive(index_t n, unsigned seed) {
  std::vector<T> values = numbers<T>(n, seed);
  for (T& value : values) value = value * value + T(0.25);
  return values;
}

class Hash {
 public:
  Hash(const char* what, Dtype dtype) {
    constexpr const char* names[dtype_count] = {"float32", "float64", "bfloat16",
                                                "float16", "signed",  "unsigned"};
    std::printf("%s %s", what, names[size_t(dtype)]);
  }
  ~Hash() { std::printf(" %016llx\n", value_); }

  template <class T>
  void operator()(const std::vector<T>& values) {
    for (const T& value : values) {
      unsigned char bytes[sizeof(T)];
      std::memcpy(bytes, &value, sizeof(T));
      for (const unsigned char byte : bytes) value_ = (value_ ^ byte) * 1099511628211ull;
    }
  }

 private:
  unsigned long long value_ = 14695981039346656037ull;
};

int count_words(std::string_view text) {
  int words = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    words += text[i] != ' ' && (i + 1 == text.size() || text[i + 1] == ' ');
  }
  return words;
}

// Of a matrix, with the means of its rows and columns as the last two streams.
Layout matrix_layout(index_t rows, index_t columns, index_t item) {
  const Layout::Stream whole{{columns * item, item}, true, false};
  return {{rows, columns}, {whole, whole, {{item, 0}, false, true}, {{0, item}, false, true}}};
}

template <class T>
void rules(Dtype dtype) {
  for (int row = 0; row < settings.table->rule_count; ++row) {
    const Rule& rule = settings.table->rules[row];
    if (rule.dtype != dtype) continue;
    Hash hash(rule.name, dtype);
    double coefficients[most_coefficients] = {};
    for (int i = 0; i < count_words(rule.coefficients); ++i) coefficients[i] = 0.9 - 0.09 * i;
    for (const index_t n : {1, 7, 33, 130, 1025, 5000}) {
      std::vector<std::vector<T>> streams{numbers<T>(n, 1), numbers<T>(n, 2)};
      const int prepared = rule.prepare != nullptr ? 1 : 0;
      for (int i = 0; i < count_words(rule.state) + prepared; ++i) {
        streams.push_back(positive<T>(n, 3));
      }
      const index_t columns = n % 5 == 0 ? 5 : n;
      const Layout layout = matrix_layout(n / columns, columns, index_t(sizeof(T)));
      ArrayStep step{};
      step.rule = &rule;
      step.coefficients = coefficients;
      step.layout = rule.factor == nullptr ? nullptr : &layout;
      step.size = n;
      step.stream_count = int(streams.size());
      std::transform(streams.begin(), streams.end(), step.streams,
                     [](auto& s) { return s.data(); });
      for (int t = 0; t < 3; ++t) {
        if (prepared) prepare(settings, {step}, {});
        apply(settings, {step}, {}, false);
      }
      for (const auto& stream : streams) hash(stream);
      const GradientNorm measured = measure(settings, {step});
      hash(std::vector<double>{scale_of(settings, {step}, measured, 1, std::nullopt).norm});
    }
  }
}

// Numbers of all magnitudes and kinds, positive where the codes have no sign.
void codecs() {
  for (const Dtype dtype :
       {Dtype::bfloat16, Dtype::float16, Dtype::signed_8bit, Dtype::unsigned_8bit}) {
    const Codec& codec = settings.table->codec[size_t(dtype)];
    Hash hash("codec", dtype);
    for (const index_t n : {1, 7, 33, 130, 256, 700, 1024}) {
      std::vector<float> x = numbers<float>(n, 8);
      for (size_t i = 0; i < x.size(); ++i) x[i] = std::ldexp(x[i], int(i * 37 % 280) - 150);
      if (dtype == Dtype::unsigned_8bit) {
        for (float& value : x) value = std::fabs(value);
      }
      if (n > 500) x[3] = INFINITY, x[4] = -0.0f, x[5] = NAN;
      std::vector<unsigned char> codes(x.size() * 2);
      std::vector<float> scales(4), y(x.size());
      codec.store(x.data(), n, codes.data(), scales.data());
      codec.load(codes.data(), scales.data(), n, y.data());
      hash(codes);
      hash(scales);
      hash(y);
      if (codec.store_at_random == nullptr) continue;
      codec.store_at_random(x.data(), 6, n, {{12345, 67890}}, codes.data());
      hash(codes);
    }
  }
}

// `forward(x, y)` and `backward(dy, dx)` for inputs of n elements; x stays where it was.
template <class T, class Forward, class Backward>
void passes(Hash& hash, index_t n, Forward forward, Backward backward) {
  const std::vector<T> x = numbers<T>(n, 4), dy = numbers<T>(n, 5);
  std::vector<T> y(x.size()), dx(x.size());
  forward(x.data(), y.data());
  backward(dy.data(), dx.data());
  hash(y);
  hash(dx);
}

template <class T, class N>
N described(Dtype dtype, const std::vector<T>& gamma, const std::vector<T>& beta,
            std::vector<double>& statistics) {
  N n{};
  n.dtype = dtype;
  n.gamma = gamma.data();
  n.beta = beta.data();
  const size_t count = statistics.size() / 3;
  n.statistics = {&statistics[0], &statistics[count], &statistics[2 * count], 1e-5};
  return n;
}

template <class T>
void norms(Dtype dtype) {
  struct Shape {
    index_t outer, channels, inner;
  };
  for (const Shape s : {Shape{40, 70, 1}, {5000, 301, 1}, {9, 6, 5}, {8, 6, 49}, {2, 3, 70000}}) {
    const index_t n = s.outer * s.channels * s.inner;
    const std::vector<T> gamma = positive<T>(s.channels, 6), beta = numbers<T>(s.channels, 7);
    std::vector<T> dgamma(gamma.size()), dbeta(gamma.size());
    {
      Hash hash("batch_norm", dtype);
      std::vector<double> statistics(size_t(3 * s.channels), 1.0);
      auto norm = described<T, BatchNorm>(dtype, gamma, beta, statistics);
      norm.outer = s.outer;
      norm.channels = s.channels;
      norm.inner = s.inner;
      norm.training = norm.relu = true;
      passes<T>(
          hash, n,
          [&](const T* x, T* y) {
            norm.x = x;
            batch_norm(settings, norm, {nullptr, nullptr, 0.1, true}, nullptr, y);
          },
          [&](const T* dy, T* dx) {
            batch_norm_backward(settings, norm, dy, nullptr, {dx, dgamma.data(), dbeta.data()},
                                nullptr);
          });
      hash(statistics);
      hash(dgamma);
      hash(dbeta);
    }
    {
      Hash hash("group_norm", dtype);
      const index_t groups = s.channels % 2 == 0 ? 2 : 1;
      std::vector<double> statistics(size_t(3 * s.outer * groups), 1.0);
      auto norm = described<T, GroupNorm>(dtype, gamma, beta, statistics);
      norm.samples = s.outer;
      norm.groups = groups;
      norm.channels = s.channels / groups;
      norm.inner = s.inner;
      passes<T>(
          hash, n,
          [&](const T* x, T* y) {
            norm.x = x;
            group_norm(settings, norm, y);
          },
          [&](const T* dy, T* dx) {
            group_norm_backward(settings, norm, dy, {dx, dgamma.data(), dbeta.data()});
          });
      hash(statistics);
      hash(dgamma);
      hash(dbeta);
    }
  }
}

template <class T>
void losses(Dtype dtype) {
  for (const index_t columns : {3, 100, 300}) {
    const index_t rows = 37, n = rows * columns;
    const std::vector<T> x = numbers<T>(n, 8), weight(size_t(columns), T(1));
    std::vector<T> y(x.size());
    Hash hash("losses", dtype);
    for (const bool logarithm : {false, true}) {
      softmax(settings, dtype, logarithm, x.data(), y.data(), rows, columns);
      hash(y);
      elementwise(settings, dtype, logarithm, positive<T>(n, 9).data(), y.data(), n);
      hash(y);
    }
    std::vector<long long> labels;
    for (index_t row = 0; row < rows; ++row) labels.push_back(row % columns);
    const CrossEntropy task{dtype,   rows,    columns,       x.data(), labels.data(),
                            -1,      nullptr, weight.data(), 0.0,      Reduction::mean,
                            nullptr, y.data()};
    hash(std::vector<double>{cross_entropy(settings, task)});
    hash(y);
    const Residual residual{dtype, x.data(), nullptr, y.data(), n};
    hash(std::vector<double>{squared_error(settings, residual, Reduction::mean, nullptr)});
    hash(y);
  }
}

}  // namespace

int main() {
  codecs();
  rules<float>(Dtype::float32);
  rules<double>(Dtype::float64);
  norms<float>(Dtype::float32);
  norms<double>(Dtype::float64);
  losses<float>(Dtype::float32);
  losses<double>(Dtype::float64);
}
