// Rules along the gradient, its sign or an average of it. Included by rules.h.

// The exponentially weighted average p of what g brings: it goes its share of the way to g, from
// the end that is nearer, so that a p that is there stays, and a share of 1 is g itself. An
// infinity stays, too: the way from one to itself is NaN.
template <class T>
struct Ema {
  static constexpr Names names{"ema", "", "share rest"};
  T share, rest;

  void operator()(T g, T& p) const {
    const bool near = share < rest;
    const T from = near ? p : g, to = near ? g : p, part = near ? share : rest;
    p = p * T(0) == g * T(0) ? from + (part * to - part * from) : p + g;
  }
};

// Polyak (1964); Nesterov as in Sutskever et al. (2013): the step uses the velocity after this
// gradient. The first gradient enters with one_minus_dampening = 1.
template <class T, bool with_momentum, bool nesterov>
struct Sgd {
  static constexpr Names names{!with_momentum ? "sgd"
                               : nesterov     ? "sgd_nesterov"
                                              : "sgd_momentum",
                               with_momentum ? "momentum_buffer" : "",
                               "grad_scale weight_decay lr momentum one_minus_dampening"};
  T grad_scale, weight_decay, lr, momentum, one_minus_dampening;

  template <class... Velocity>
  void operator()(T g, T& p, Velocity&... v) const {
    g = decayed(grad_scale * g, weight_decay, p);
    ((v = momentum * v + one_minus_dampening * g, g = nesterov ? g + momentum * v : v), ...);
    p -= lr * g;
  }
};

// You, Gitman, Ginsburg (2017): SGD with gradients as long as a share of the weights.
template <class T, bool with_momentum, bool nesterov>
struct Lars : Sgd<T, with_momentum, nesterov> {
  using Exact = Lars<double, with_momentum, nesterov>;
  static constexpr Names names{
      !with_momentum ? "lars"
      : nesterov     ? "lars_nesterov"
                     : "lars_momentum",
      with_momentum ? "momentum_buffer" : "",
      "grad_scale weight_decay lr momentum one_minus_dampening trust_coeff eps adapts most_trust",
      "weight gradient"};
  T trust_coeff, eps, adapts, most_trust;

  template <class... Velocity>
  void sum(double& weight, double& gradient, T g, T& p, Velocity&...) const {
    const double scaled = double(this->grad_scale * g);
    weight += double(p) * double(p);
    gradient += scaled * scaled;
  }
  void combine(const double* sums, double) {
    if (adapts == 0 || !(sums[0] > 0 && sums[1] > 0)) return;
    const double w = sqrt(sums[0]), length = sqrt(sums[1]) + w * this->weight_decay + eps;
    const double ratio = minimum(trust_coeff * w / length, most_trust);
    this->grad_scale *= ratio;
    this->weight_decay *= ratio;
  }
};

// Riedmiller, Braun (1993), as torch has it: after a change of sign, no step and none to compare.
template <class T>
struct Rprop {
  static constexpr Names names{"rprop", "prev! step_size!",
                               "grad_scale eta1 eta2 step_size1 step_size2"};
  T grad_scale, eta1, eta2, step_size1, step_size2;

  void operator()(T g, T& p, T& previous, T& step_size) const {
    g = grad_scale * g;
    const T agreement = g * previous;
    const T grown = agreement > 0 ? eta2 : T(1);
    const T factor = agreement < 0 ? eta1 : grown;
    const T used = agreement < 0 ? T(0) : g;
    const T size = clamp(step_size * factor, step_size1, step_size2);
    p -= sign(used) * size;
    previous = used;
    step_size = size;
  }
};

// Chen et al. (2023): the step's average is not the one that is kept.
template <class T>
struct Lion {
  static constexpr Names names{"lion", "exp_avg",
                               "grad_scale decay lr beta1 one_minus_beta1 beta2 one_minus_beta2"};
  T grad_scale, decay, lr, beta1, one_minus_beta1, beta2, one_minus_beta2;

  void operator()(T g, T& p, T& m) const {
    g = grad_scale * g;
    move(g, sign(ahead(g, m)), p, m);
  }
  T ahead(T g, T m) const { return beta1 * m + one_minus_beta1 * g; }
  void move(T g, T u, T& p, T& m) const {
    p = decay * p - lr * u;
    m = beta2 * m + one_minus_beta2 * g;
  }
};

template <class T>
struct CautiousLion : Lion<T> {
  using Exact = CautiousLion<double>;
  static constexpr Names names{"lion_cautious", "exp_avg", Lion<T>::names.coefficients, "aligned"};

  void sum(double& aligned, T g, T&, T m) const {
    g = this->grad_scale * g;
    aligned += double(this->ahead(g, m) * g > 0 ? T(1) : T(0));
  }
  void combine(const double* sums, double n) { this->lr /= caution(sums[0], n); }
  void operator()(T g, T& p, T& m) const {
    g = this->grad_scale * g;
    const T u = this->ahead(g, m);
    this->move(g, u * g > 0 ? sign(u) : T(0), p, m);
  }
};

// Bernstein et al. (2018): signSGD, and Signum with momentum.
template <class T>
struct SignSgd {
  static constexpr Names names{"sign_sgd", "", "grad_scale decay lr"};
  T grad_scale, decay, lr;

  void operator()(T g, T& p) const { p = decay * p - lr * sign(grad_scale * g); }
};

template <class T>
struct SignSgdMomentum {
  static constexpr Names names{"sign_sgd_momentum", "momentum_buffer",
                               "grad_scale decay lr momentum one_minus_momentum"};
  T grad_scale, decay, lr, momentum, one_minus_momentum;

  void operator()(T g, T& p, T& m) const {
    m = momentum * m + one_minus_momentum * (grad_scale * g);
    p = decay * p - lr * sign(m);
  }
};

// Jordan et al. (2024): Python makes the direction orthogonal, which needs all of the matrix.
template <class T>
struct Muon {
  static constexpr Names names{"muon", "momentum_buffer",
                               "grad_scale decay lr momentum one_minus_momentum nesterov", "",
                               "direction"};
  T grad_scale, decay, lr, momentum, one_minus_momentum, nesterov;

  T average(T m, T g) const { return momentum * m + one_minus_momentum * (grad_scale * g); }
  void prepare(T g, T, T m, T& direction) const {
    m = average(m, g);
    direction = nesterov == 0 ? m : average(m, g);
  }
  void operator()(T g, T& p, T& m, T direction) const {
    m = average(m, g);
    p = decay * p - lr * direction;
  }
};

// Polyak, Juditsky (1992): the average of the iterates, from t0 on.
template <class T>
struct Asgd {
  static constexpr Names names{"asgd", "ax!", "grad_scale weight_decay decay lr share rest"};
  T grad_scale, weight_decay, decay, lr, share, rest;

  void operator()(T g, T& p, T& ax) const {
    g = decayed(grad_scale * g, weight_decay, p);
    p = decay * p - lr * g;
    Ema<T>{share, rest}(p, ax);
  }
};

// Defazio et al. (2024): p is y, between the sequence z of the steps and its average. Where there
// is no z yet, it is p.
template <class T>
struct ScheduleFreeSgd {
  static constexpr Names names{"schedule_free_sgd", "z!",
                               "grad_scale weight_decay lr y_step share rest fresh"};
  T grad_scale, weight_decay, lr, y_step, share, rest, fresh;

  void operator()(T g, T& p, T& z) const { move(decayed(grad_scale * g, weight_decay, p), p, z); }
  void move(T u, T& p, T& z) const {
    const T from = fresh != 0 ? p : z;
    Ema<T>{share, rest}(from, p);
    p += y_step * u;
    z = from - lr * u;
  }
};

template <class T>
struct ScheduleFreeAdamW : ScheduleFreeSgd<T> {
  static constexpr Names names{"schedule_free_adamw", "exp_avg_sq+ z!",
                               "grad_scale weight_decay lr y_step share rest fresh beta2 "
                               "one_minus_beta2 root_correction eps"};
  T beta2, one_minus_beta2, root_correction, eps;

  void operator()(T g, T& p, T& v, T& z) const {
    g = this->grad_scale * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    this->move(decayed(g / (sqrt(v) * root_correction + eps), this->weight_decay, p), p, z);
  }
};
