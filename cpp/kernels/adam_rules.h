// Rules that divide by what the gradients were like. Included by rules.h.

// Duchi, Hazan, Singer (2011). mean_factor is 1, or 1/t for the root of the mean square.
template <class T>
struct Adagrad {
  static constexpr Names names{"adagrad", "sum+", "grad_scale weight_decay lr mean_factor eps"};
  T grad_scale, weight_decay, lr, mean_factor, eps;

  void operator()(T g, T& p, T& sum) const {
    g = decayed(grad_scale * g, weight_decay, p);
    sum += g * g;
    p -= lr * g / (sqrt(sum * mean_factor) + eps);
  }
};

// Tieleman, Hinton (2012); centered: Graves (2013). States: square_avg, grad_avg if centered,
// momentum_buffer if momentum. Rounding can make the variance negative: then it is zero.
template <class T, bool centered, bool with_momentum>
struct Rmsprop {
  static constexpr Names names{
      centered ? (with_momentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
               : (with_momentum ? "rmsprop_momentum" : "rmsprop"),
      centered ? (with_momentum ? "square_avg+ grad_avg momentum_buffer" : "square_avg+ grad_avg")
               : (with_momentum ? "square_avg+ momentum_buffer" : "square_avg+"),
      "grad_scale weight_decay lr alpha one_minus_alpha eps momentum"};
  T grad_scale, weight_decay, lr, alpha, one_minus_alpha, eps, momentum;

  template <class... More>
  void operator()(T g, T& p, T& v, More&... more) const {
    T* const state[] = {&v, &more...};
    g = decayed(grad_scale * g, weight_decay, p);
    v = alpha * v + one_minus_alpha * g * g;
    T variance = v;
    if constexpr (centered) {
      T& mean = *state[1];
      mean = alpha * mean + one_minus_alpha * g;
      variance = maximum(v - mean * mean, T(0));
    }
    T step = g / (sqrt(variance) + eps);
    if constexpr (with_momentum) {
      T& buffer = *state[centered ? 2 : 1];
      step = buffer = momentum * buffer + step;
    }
    p -= lr * step;
  }
};

// Zeiler (2012).
template <class T>
struct Adadelta {
  static constexpr Names names{"adadelta", "square_avg+ acc_delta+",
                               "grad_scale weight_decay lr rho one_minus_rho eps"};
  T grad_scale, weight_decay, lr, rho, one_minus_rho, eps;

  void operator()(T g, T& p, T& v, T& u) const {
    g = decayed(grad_scale * g, weight_decay, p);
    v = rho * v + one_minus_rho * g * g;
    const T delta = sqrt(u + eps) / sqrt(v + eps) * g;
    u = rho * u + one_minus_rho * delta * delta;
    p -= lr * delta;
  }
};

// Kingma, Ba (2015); decoupled weight decay: Loshchilov, Hutter (2019), decay = 1 - lr *
// weight_decay; amsgrad: Reddi, Kale, Kumar (2018). The bias corrections sit in step_size and
// root_correction.
template <class T, bool amsgrad>
struct Adam {
  static constexpr Names names{
      amsgrad ? "adam_amsgrad" : "adam",
      amsgrad ? "exp_avg exp_avg_sq+ max_exp_avg_sq+" : "exp_avg exp_avg_sq+",
      "grad_scale weight_decay decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
      "step_size root_correction eps"};
  T grad_scale, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, root_correction, eps;

  template <class... Maximum>
  void operator()(T g, T& p, T& m, T& v, Maximum&... v_max) const {
    average(decayed(grad_scale * g, weight_decay, p), m, v, v_max...);
    move(p, m, v, v_max...);
  }

  template <class... Maximum>
  void average(T g, T& m, T& v, Maximum&... v_max) const {
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    ((v_max = maximum(v, v_max)), ...);
  }
  template <class... Maximum>
  void move(T& p, T m, T v, Maximum... v_max) const {
    ((v = v_max), ...);
    p = decay * p - step_size * m / (sqrt(v) * root_correction + eps);
  }
};

template <class T, bool amsgrad>
struct CautiousAdam : Adam<T, amsgrad> {
  using Exact = CautiousAdam<double, amsgrad>;
  static constexpr Names names{amsgrad ? "adam_amsgrad_cautious" : "adam_cautious",
                               Adam<T, amsgrad>::names.state, Adam<T, amsgrad>::names.coefficients,
                               "aligned"};

  template <class... Maximum>
  void sum(double& aligned, T g, T&, T& m, T& v, Maximum&... v_max) const {
    this->average(this->grad_scale * g, m, v, v_max...);
    aligned += double(m * (this->grad_scale * g) > 0 ? T(1) : T(0));
  }
  void combine(const double* sums, double n) { this->step_size /= caution(sums[0], n); }
  template <class... Maximum>
  void operator()(T g, T& p, T m, T v, Maximum&... v_max) const {
    this->move(p, m * (this->grad_scale * g) > 0 ? m : T(0), v, v_max...);
  }
};

// Wortsman et al., StableAdamW (2023): the betas come without bias, and the step is shorter where
// the gradients are large beside their averages.
template <class T>
struct StableAdam {
  using Exact = StableAdam<double>;
  static constexpr Names names{"stable_adamw", "exp_avg exp_avg_sq+",
                               "grad_scale lr weight_decay decay beta1 one_minus_beta1 beta2 "
                               "one_minus_beta2 eps",
                               "ratio"};
  T grad_scale, lr, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;

  void sum(double& ratio, T g, T&, T& m, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    ratio += double(g * g / maximum(v, eps * eps));
  }
  void combine(const double* sums, double n) {
    lr /= maximum(sqrt(sums[0] / n), 1.0);
    decay = 1 - lr * weight_decay;
  }
  void operator()(T, T& p, T m, T v) const { p = decay * p - lr * m / (sqrt(v) + eps); }
};

// Shazeer, Stern (2018), as torch has it: a step is as long as a share of the weights, and shorter
// where the gradients are large beside their averages. A negative eps1 is the dtype's.
template <class T>
struct Adafactor {
  using Exact = Adafactor<double>;
  static constexpr Names names{"adafactor_vector", "variance+",
                               "grad_scale lr decay share eps1 eps2 d", "weight step"};
  T grad_scale, lr, decay, share, eps1, eps2, d;

  T direction(T g, T root) const { return grad_scale * g / maximum(root, least()); }
  T least() const { return eps1 < 0 ? T(sizeof(T) == sizeof(float) ? 0x1p-23 : 0x1p-52) : eps1; }
  void sum(double& weight, double& step, T g, T& p, T& v) const {
    const T scaled = grad_scale * g;
    v += share * (scaled * scaled - v);
    add(weight, step, p, direction(g, sqrt(v)));
  }
  void add(double& weight, double& step, T p, T u) const {
    weight += double(p) * double(p);
    step += double(u) * double(u);
  }
  void combine(const double* sums, double n) {
    lr *= maximum(sqrt(sums[0] / n), eps2) / maximum(sqrt(sums[1] / n) / d, 1.0);
  }
  void operator()(T g, T& p, T v) const { p = decay * p - lr * direction(g, sqrt(v)); }
};

// The second moment of a matrix is the product of a column and a row, of which it has the roots.
template <class T>
struct FactoredAdafactor : Adafactor<T> {
  using Exact = FactoredAdafactor<double>;
  static constexpr Names names{
      "adafactor", "row_var! col_var!", Adafactor<T>::names.coefficients, "weight step", "", true};

  T moved(T mean, double square) const {
    return T(double(mean) + double(this->share) * (square - double(mean)));
  }
  void sum(double& weight, double& step, T g, T& p, T row, T column) const {
    this->add(weight, step, p, this->direction(g, row * column));
  }
  void operator()(T g, T& p, T row, T column) const {
    p = this->decay * p - this->lr * this->direction(g, row * column);
  }
};

// You et al. (2020). `adapts` says whether there is a trust ratio, `most_trust` how large it may
// be.
template <class T>
struct Lamb {
  using Exact = Lamb<double>;
  static constexpr Names names{"lamb", "exp_avg exp_avg_sq+",
                               "grad_scale lr weight_decay beta1 one_minus_beta1 beta2 "
                               "one_minus_beta2 correction root_correction eps adapts most_trust",
                               "weight step"};
  T grad_scale, lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T correction, root_correction, eps, adapts, most_trust;

  void average(T g, T& m, T& v) const {
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
  }
  T adam(T m, T v) const { return correction * m / (sqrt(v) * root_correction + eps); }
  T direction(T p, T m, T v) const { return decayed(adam(m, v), weight_decay, p); }
  void sum(double& weight, double& step, T g, T& p, T& m, T& v) const {
    average(grad_scale * g, m, v);
    const double u = double(direction(p, m, v));
    weight += double(p) * double(p);
    step += u * u;
  }
  void combine(const double* sums, double) { trust(sums[0], sums[1]); }
  void trust(double weight, double step) {
    if (adapts != 0 && weight > 0 && step > 0) {
      lr *= minimum(sqrt(weight) / sqrt(step), most_trust);
    }
  }
  void operator()(T, T& p, T m, T v) const { p -= lr * direction(p, m, v); }
};

// The mask comes before the decay and the trust ratio; how large it makes the step follows from the
// sums over what it leaves, u, and p.
template <class T>
struct CautiousLamb : Lamb<T> {
  using Exact = CautiousLamb<double>;
  static constexpr Names names{"lamb_cautious", "exp_avg exp_avg_sq+", Lamb<T>::names.coefficients,
                               "aligned weight uu up"};

  void sum(double& aligned, double& weight, double& uu, double& up, T g, T& p, T& m, T& v) const {
    g = this->grad_scale * g;
    this->average(g, m, v);
    const T mask = m * g > 0 ? T(1) : T(0), masked = m * g > 0 ? this->adam(m, v) : T(0);
    const double u = double(masked), w = double(p);
    aligned += double(mask);
    weight += w * w;
    uu += u * u;
    up += u * w;
  }
  void combine(const double* sums, double n) {
    const double factor = 1 / caution(sums[0], n), decay = this->weight_decay;
    this->correction *= factor;
    const double square = factor * factor * sums[2] + 2 * factor * decay * sums[3];
    this->trust(sums[1], square + decay * decay * sums[1]);
  }
  void operator()(T g, T& p, T m, T v) const {
    p -= this->lr * this->direction(p, m * (this->grad_scale * g) > 0 ? m : T(0), v);
  }
};

// Dozat (2016) as Choi et al. (2019) write it: the step is along the average after this gradient
// has come in once more.
template <class T>
struct Nadamw {
  static constexpr Names names{"nadamw", "exp_avg exp_avg_sq+",
                               "grad_scale decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
                               "step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = grad_scale * g;
    average(g, m, v);
    move(p, ahead(g, m), v);
  }
  void average(T g, T& m, T& v) const {
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
  }
  T ahead(T g, T m) const { return beta1 * m + one_minus_beta1 * g; }
  void move(T& p, T u, T v) const {
    p = decay * p - step_size * u / (sqrt(v) * root_correction + eps);
  }
};

template <class T>
struct CautiousNadamw : Nadamw<T> {
  using Exact = CautiousNadamw<double>;
  static constexpr Names names{"nadamw_cautious", "exp_avg exp_avg_sq+",
                               Nadamw<T>::names.coefficients, "aligned"};

  void sum(double& aligned, T g, T&, T& m, T& v) const {
    g = this->grad_scale * g;
    this->average(g, m, v);
    aligned += double(this->ahead(g, m) * g > 0 ? T(1) : T(0));
  }
  void combine(const double* sums, double n) { this->step_size /= caution(sums[0], n); }
  void operator()(T g, T& p, T m, T v) const {
    g = this->grad_scale * g;
    const T u = this->ahead(g, m);
    this->move(p, u * g > 0 ? u : T(0), v);
  }
};

// Liu et al. (2020): rectified is 0 as long as the second moment is of too few gradients to divide
// by. The rectification and the bias corrections sit in step_size.
template <class T>
struct Radam {
  static constexpr Names names{"radam", "exp_avg exp_avg_sq+",
                               "grad_scale weight_decay decay beta1 one_minus_beta1 beta2 "
                               "one_minus_beta2 step_size rectified eps"};
  T grad_scale, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, rectified, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = decayed(grad_scale * g, weight_decay, p);
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    const T root = sqrt(v) + eps;
    p = decay * p - step_size * m / (rectified == 0 ? 1 : root);
  }
};

// Zhuang et al. (2020): the second moment is that of the gradient's difference from its average.
template <class T>
struct AdaBelief {
  static constexpr Names names{"adabelief", "exp_avg exp_avg_var+",
                               "grad_scale decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
                               "step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    const T surprise = g - m;
    v = beta2 * v + one_minus_beta2 * surprise * surprise + eps;
    p = decay * p - step_size * m / (sqrt(v) * root_correction + eps);
  }
};

// Zaheer et al. (2018): the second moment moves by a share of the square, not of the difference.
template <class T>
struct Yogi {
  static constexpr Names names{"yogi", "exp_avg exp_avg_sq+",
                               "grad_scale decay beta1 one_minus_beta1 one_minus_beta2 "
                               "step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, one_minus_beta2;
  T step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    const T square = g * g;
    v -= one_minus_beta2 * sign(v - square) * square;
    p = decay * p - step_size * m / (sqrt(v) * root_correction + eps);
  }
};

// The largest gradient takes the place of the second moment: Kingma, Ba (2015), section 7.1.
template <class T>
struct Adamax {
  static constexpr Names names{"adamax", "exp_avg exp_inf+",
                               "grad_scale weight_decay beta1 one_minus_beta1 beta2 step_size eps"};
  T grad_scale, weight_decay, beta1, one_minus_beta1, beta2, step_size, eps;

  void operator()(T g, T& p, T& m, T& largest) const {
    g = decayed(grad_scale * g, weight_decay, p);
    m = beta1 * m + one_minus_beta1 * g;
    largest = maximum(beta2 * largest, absolute(g) + eps);
    p -= step_size * m / largest;
  }
};

// Pagliardini, Ablin, Grangier (2024): a second average of the gradients, slow and not corrected.
template <class T>
struct AdEMAMix {
  static constexpr Names names{
      "ademamix", "exp_avg exp_avg_slow exp_avg_sq+",
      "grad_scale decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
      "beta3 one_minus_beta3 step_size slow_step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
  T step_size, slow_step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& slow, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    slow = beta3 * slow + one_minus_beta3 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    const T direction = step_size * m + slow_step_size * slow;
    p = decay * p - direction / (sqrt(v) * root_correction + eps);
  }
};

// Taniguchi et al. (2024): the second moment of before this gradient, and the quotient is averaged.
// The first gradient makes the second moment alone: it is not weighted, and clip and lr are 0.
template <class T>
struct Adopt {
  static constexpr Names names{"adopt", "exp_avg exp_avg_sq+",
                               "grad_scale weight_decay decay lr beta1 one_minus_beta1 beta2 "
                               "one_minus_beta2 clip eps"};
  T grad_scale, weight_decay, decay, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, clip, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = decayed(grad_scale * g, weight_decay, p);
    const T quotient = clamp(g / maximum(sqrt(v), eps), -clip, clip);
    m = beta1 * m + one_minus_beta1 * quotient;
    p = decay * p - lr * m;
    v = beta2 * v + one_minus_beta2 * g * g;
  }
};

// Xie et al. (2022): averages of the gradient and of its difference from the one before, and the
// square of the gradient ahead. The proximal decay sits in decay and in the sizes; has_previous is
// 0 in the first step and 1 in all others.
template <class T>
struct Adan {
  static constexpr Names names{"adan", "exp_avg exp_avg_sq+ exp_avg_diff pre_grad",
                               "grad_scale decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
                               "beta3 one_minus_beta3 has_previous step_size diff_step_size "
                               "root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
  T has_previous, step_size, diff_step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v, T& average_difference, T& previous) const {
    g = grad_scale * g;
    const T difference = has_previous * (g - previous);
    previous = g;
    m = beta1 * m + one_minus_beta1 * g;
    average_difference = beta2 * average_difference + one_minus_beta2 * difference;
    const T ahead = g + beta2 * difference;
    v = beta3 * v + one_minus_beta3 * ahead * ahead;
    const T direction = step_size * m + diff_step_size * average_difference;
    p = decay * p - direction / (sqrt(v) * root_correction + eps);
  }
};

// Dozat (2016): Adam's step with the momentum of the next step for the average, and that of this
// one for the gradient.
template <class T>
struct Nadam {
  static constexpr Names names{"nadam", "exp_avg exp_avg_sq+",
                               "grad_scale weight_decay decay beta1 one_minus_beta1 beta2 "
                               "one_minus_beta2 root_correction eps grad_step average_step"};
  T grad_scale, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T root_correction, eps, grad_step, average_step;

  void operator()(T g, T& p, T& m, T& v) const {
    g = decayed(grad_scale * g, weight_decay, p);
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    p = decay * p - (grad_step * g + average_step * m) / (sqrt(v) * root_correction + eps);
  }
};

// Mishchenko, Defazio (2024): Adam whose rate is multiplied by d, an estimate of how far the
// minimum is. It grows with how far the gradients, over all arrays, agree with the way from p0,
// which is zero as long as `fresh` is 1. An array whose rate is 0 has no part in that, and counts
// 0. No condition is in the sum: a store under one would keep the next load waiting.
template <class T>
struct Prodigy {
  using Exact = Prodigy<double>;
  static constexpr Names names{
      "prodigy",
      "p0! s! exp_avg exp_avg_sq+",
      "grad_scale step_size decay weight beta1 m_share beta2 v_share beta3 "
      "s_decay s_share counts eps fresh d d_max d_numerator d0 d_coef growth_rate",
      "numerator denominator",
      "",
      false,
      true};
  T grad_scale, step_size, decay, weight, beta1, m_share, beta2, v_share, beta3;
  T s_decay, s_share, counts, eps, fresh, d, d_max, d_numerator, d0, d_coef, growth_rate;

  void sum(double& numerator, double& denominator, T g, T& p, T& p0, T& s, T& m, T& v) const {
    g = grad_scale * g;
    p0 += fresh * (p - p0);
    m = beta1 * m + m_share * g;
    v = beta2 * v + v_share * g * g;
    s = s_decay * s + s_share * g;
    numerator += double(weight) * (double(g) * (double(p0) - double(p)));
    denominator += double(counts * absolute(s));
  }
  bool combine(const double* sums) {
    if (sums[1] == 0) return step_size == 0;
    d_numerator = beta3 * d_numerator + sums[0];
    const double estimate = d_coef * d_numerator / sums[1];
    if (d == d0 && estimate > d) d = estimate;
    if (estimate > d_max) d_max = estimate;
    const double grown = d * growth_rate;
    d = grown < d_max ? grown : d_max;
    return true;
  }
  void operator()(T, T& p, T, T, T m, T v) const {
    p = decay * p - step_size * m / (sqrt(v) + d * eps);
  }
};
