// The kernel table: what the per-ISA objects offer to the rest of the library.
// Plain data and no includes: nothing here may become code that two ISAs share.
#pragma once

namespace fastopt {

using index_t = __PTRDIFF_TYPE__;

// What an element is stored as. Rules, norms and losses compute in the first two; the others are
// float32 numbers in fewer bytes.
enum class Dtype : unsigned char {
  float32,
  float64,
  bfloat16,
  float16,
  signed_8bit,
  unsigned_8bit
};
constexpr int dtype_count = 6;

// A step, and a sum along a row, is cut into blocks of this many elements, counted from the first
// one: threads and tiles take whole blocks, so results do not depend on who does what.
constexpr index_t block = 1024;

// Elements of an 8-bit array have a scale for each so many.
constexpr index_t scale_block = 256;

// Norms work on rows of so few columns with a vector across the rows instead of one along them.
constexpr index_t few_columns = 32;

// Sums over the elements of one array, of one block after the other.
using Reduce = void (*)(const double* coefficients, void* const* streams, index_t element,
                        index_t n, double* sums);

// The rows or the columns of a matrix: of each the sum of its squares, which are so many, the mean
// of them that is kept, and a root that follows from it; these lie so many bytes apart.
struct Factor {
  index_t count;
  const double* sums;
  index_t squares;
  void *mean, *root;
  index_t apart;
};

// What happens to the elements of one array. The streams are gradient, parameter, state..., from
// the element of this index on. A rule may first add up numbers over the array, and change its
// state on the way; what follows from them for the coefficients is combined before the update. Or
// it first prepares one more stream, which somebody else changes as a whole before the update. Or
// its states are means over the rows and over the columns of matrices: it adds up their squares,
// run by run, moves these means, and has roots of them for streams.
struct Rule {
  const char* name;
  const char* state;         // names, separated by blanks, with the marks of rules.h
  const char* coefficients;  // names, separated by blanks: the order of the numbers
  Dtype dtype;
  int sum_count;  // of a block
  Reduce reduce;
  bool over_all;  // the sums are those of all arrays
  // False where they make no step.
  bool (*combine)(double* coefficients, const double* sums, index_t size);
  void (*prepare)(const double* coefficients, void* const* streams, index_t element, index_t n);
  void (*update)(const double* coefficients, void* const* streams, index_t element, index_t n);
  // Adds each square of a run to those across it, and returns the sum along it.
  double (*add_squares)(const double* coefficients, const void* gradient, index_t n,
                        double* across);
  void (*factor)(const double* coefficients, const Factor& rows, const Factor& columns);
};

// Random bits for the elements of one array, for one rounding.
struct Key {
  unsigned word[2];
};

// How float32 numbers are stored in fewer bytes, codecs.h says which; of 8 bits from the begin of a
// block on, with the scales from that block on.
struct Codec {
  void (*load)(const void* from, const float* scales, index_t n, float* to);
  void (*store)(const float* from, index_t n, void* to, float* scales);
  // The elements from this index on, rounded at random; or nullptr.
  void (*store_at_random)(const float* from, index_t element, index_t n, Key key, void* to);
};

// Rows of `columns` numbers that lie one after the other, each with its target: q = class_weight at
// the label plus base, or class_weight * probabilities + base. A row's loss is
// sum_c q_c (log(sum(exp(logits))) - logits_c), and its gradient is multiplied by `scale`.
struct CrossEntropyRows {
  index_t columns;
  const void* logits;
  const long long* labels;    // 0 to columns - 1, or `ignored`
  const void* probabilities;  // nullptr for labels
  const void* class_weight;   // of every column
  const void* base;           // of every column; nullptr for labels if it is zero
  double base_sum;
  long long ignored;
  double scale;
  void* losses;    // of every row
  void* gradient;  // may be the logits
};

struct Softmax {
  void (*exp)(const void* x, void* y, index_t n);
  void (*log)(const void* x, void* y, index_t n);
  void (*softmax)(const void* x, void* y, index_t rows, index_t columns);
  void (*log_softmax)(const void* x, void* y, index_t rows, index_t columns);
  void (*cross_entropy)(const CrossEntropyRows& task, index_t begin_row, index_t end_row);
  // The first row that is no distribution: negative somewhere, or the sum off 1 by more than 1e-3.
  index_t (*bad_row)(const void* x, index_t rows, index_t columns);
  // y = factor * (x - target), where no target is zero; with the sums of (x - target)^2 by block.
  void (*residual)(double factor, const void* x, const void* target, void* y, index_t n,
                   double* sums);
};

// Where the elements of one statistic lie: `count` runs of `inner` neighbours, `stride` apart.
struct Runs {
  index_t count, stride, inner;
};

// Rows of `columns` neighbours, `stride` apart.
struct Rows {
  index_t count, stride, columns;
};

// Means and biased variances of x times its statistic's unit, a power of two. It is 1, unless
// sqrt(variance + eps) is so large or so small that its inverse has no room in x's dtype: then all
// that is done with x, to the coefficients and back to dx, is done in this unit.
struct Statistics {
  double *mean, *variance, *unit;
  double eps;  // of x itself
};

// Means and sums of squared deviations, before they are statistics.
struct Moments {
  double *mean, *m2;
};

// Sums of dy and of dy (x - center).
struct GradientSums {
  double *dy, *product;
};

// Of every statistic, channel or column, in arrays of x's dtype.
struct ForwardCoefficients {
  void *center, *scale, *shift;
};
struct BackwardCoefficients {
  void *on_dy, *on_x, *constant;
};

// y = (x - center) scale + shift.
struct Forward {
  const void* x;
  void* y;
  ForwardCoefficients by;
  bool stream;  // stores pass by the caches
};

// What follows in the same pass: + residual, rectified.
struct Activation {
  const void* residual;  // or nullptr
  bool relu;
};

// dx = on_dy dy + on_x (x - center) + constant.
struct Backward {
  const void *dy, *x, *center;
  void* dx;
  BackwardCoefficients by;
  bool stream;
};

// What dy comes through before: where relu, it passes where y > 0, which without y is
// (x - center) scale + shift; then it is the gradient of the residual, too.
struct ActivationGradient {
  bool relu;
  const void *y, *scale, *shift;
  void* dresidual;  // or nullptr
};

// Of every element of a row; those of the next row are `apart` from those of this one.
struct RowParameters {
  const void *gamma, *beta;  // or nullptr
  index_t apart;
};
struct RowGradients {
  void *dgamma, *dbeta;  // sums in x's dtype, to which a row's part is added
};

// Normalization in one dtype; rows.h, columns.h, moments.h and coefficients.h say what each one
// does.
struct Norm {
  void (*moments)(const void* x, Runs runs, index_t statistics, index_t apart, bool centered,
                  Moments to);
  void (*row_moments)(const void* x, index_t rows, index_t n, bool centered, Moments to);
  void (*column_moments)(const void* x, Rows rows, Moments to, void* scratch);
  void (*merge)(double count_a, Moments a, double count_b, Moments b, index_t n);
  void (*choose_units)(const void* x, Runs runs, index_t statistics, index_t apart, bool centered,
                       const Statistics& s);

  void (*apply)(const Forward& f, Activation after, Runs runs, index_t coefficient_stride);
  void (*column_apply)(const Forward& f, Activation after, Rows rows);
  void (*row_apply)(const Forward& f, RowParameters parameters, index_t rows, index_t n);

  void (*gradient_sums)(const Backward& b, const ActivationGradient& before, Runs runs,
                        index_t statistics, index_t apart, GradientSums sums);
  void (*column_gradient_sums)(const Backward& b, const ActivationGradient& before, Rows rows,
                               GradientSums sums, void* scratch);
  void (*row_gradient_sums)(const Backward& b, RowParameters parameters, index_t rows, index_t n,
                            GradientSums sums);
  void (*gradient_apply)(const Backward& b, const ActivationGradient& before, Runs runs,
                         index_t coefficient_stride);
  void (*column_gradient_apply)(const Backward& b, const ActivationGradient& before, Rows rows);
  void (*row_gradient_apply)(const Backward& b, const ForwardCoefficients& xhat,
                             RowParameters parameters, Rows rows, RowGradients gradients);

  void (*flush_sums)(void* values, index_t n, double* sums);
  void (*add_sums)(index_t n, const double* from, double* to);
  void (*round_sums)(index_t n, const double* from, void* to);
  void (*move_average)(index_t n, double momentum, double factor, const double* value,
                       void* running);
  void (*forward_coefficients)(index_t n, const Statistics& s, const void* gamma, const void* beta,
                               const ForwardCoefficients& to);
  void (*backward_coefficients)(index_t n, const Statistics& s, double count, const void* gamma,
                                GradientSums sums, const void* center,
                                const BackwardCoefficients& to);
  void (*group_coefficients)(index_t groups, index_t n, const Statistics& s, double count,
                             const void* gamma, GradientSums sums, const void* center,
                             const BackwardCoefficients& to);
};

struct Table {
  const char* isa;
  index_t vector_bytes;  // as the compiler was told
  const Rule* rules;
  int rule_count;
  // By Dtype: of the coefficient 2^exponent, the sums of the squares of the gradients times that,
  // and of zeros, NaN where an element is infinite or NaN.
  Reduce gradient_norm[2];
  Codec codec[dtype_count];  // by Dtype; none for what is computed in
  Softmax softmax[2];        // by Dtype
  Norm norm[2];              // by Dtype
};

}  // namespace fastopt
