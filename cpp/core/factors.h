// The squared gradients of matrices, added up along their rows and along their columns.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "element.h"
#include "memory.h"
#include "step.h"

namespace fastopt {

// Elements of one row or one column, so many from one to the next.
struct Line {
  const ArrayStep& step;
  index_t element, apart, n;
  double& along;   // their sum
  double* across;  // of each, to add to
};

// Of the rules whose states are the means of rows and of columns. Matrices are cut into tiles, and
// the sums of these are added up in their order: who does what changes nothing.
class Factors {
 public:
  // Asks for all memory.
  explicit Factors(const std::vector<ArrayStep>& steps);

  bool empty() const { return arrays_.empty(); }

  // The steps with the roots of the means in the place of these.
  const std::vector<ArrayStep>& steps() const { return steps_; }

  index_t bytes() const { return tiles_.bytes(); }
  void each_line(int part, int parts, const std::function<void(const Line&)>& add) const;

  // After all lines were added: moves the means, and takes their roots.
  index_t bytes_of_sums() const { return matrices_.bytes(); }
  void finish(int part, int parts) const;

 private:
  // The matrices of an array, of lines whose elements lie closer together than those across.
  struct Matrices {
    ArrayStep step;
    std::vector<index_t> apart;  // of the layout's axes, in elements
    size_t line_axis, across_axis;
    bool lines_are_rows = true;
    index_t count = 1, lines, length;
    index_t bands, pieces;  // of lines; of each line
    double *along, *across;
    char* roots[2];  // of the rows, of the columns

    explicit Matrices(const ArrayStep& step);
    // The index of the first element, or where the means begin, in bytes.
    index_t place(index_t matrix, const std::vector<index_t>& strides) const;
    void add(index_t tile, const std::function<void(const Line&)>& add) const;
    void finish(index_t matrix) const;
  };

  std::vector<ArrayStep> steps_;
  std::vector<Matrices> arrays_;
  Shares tiles_, matrices_;
  std::optional<Scratch> memory_;
};

}  // namespace fastopt
