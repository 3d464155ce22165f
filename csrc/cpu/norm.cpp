// CPU registrations of batch normalisation in training mode, for contiguous images. The schemas,
// fakes and gradients are in sparsekern/ops/norm.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "driver.h"

namespace sparsekern {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Norm {
  int64_t images, channels, pixels;
  Activation activation;
  std::vector<int64_t> shape;
};

Norm check_norm(const std::string& op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                const std::string& activation) {
  check_dim(op, "x", x, 4);
  for (auto [name, t] :
       {std::pair{"x", &x}, std::pair{"weight", &weight}, std::pair{"bias", &bias}}) {
    check_cpu(op, name, *t);
    check_dtype(op, name, *t, {ScalarType::Float, ScalarType::Double});
    check_operand(op, name, *t, x);
  }
  for (auto [name, t] : {std::pair{"weight", &weight}, std::pair{"bias", &bias}}) {
    check_dim(op, name, *t, 1);
    check_size(op, std::string(name) + ".size(0) = channels", t->size(0), x.size(1));
  }
  const Norm n{x.size(0),
               x.size(1),
               times(x.size(2), x.size(3)),
               parse_activation(op, activation),
               {x.size(0), x.size(1), x.size(2), x.size(3)}};
  if (n.activation != kNone && n.activation != kRelu && n.activation != kRelu6)
    fail(op, "activation to be none, relu or relu6", "'" + activation + "'");
  if (times(n.images, n.pixels) < 2)
    fail(op, "more than one value per channel", "x of shape " + shape_of(x));
  return n;
}

// Calls f(channel, offset of the channel in image 0) for all channels, on all threads.
template <class F>
void each_channel(const Norm& n, F f) {
  const int64_t work = std::max<int64_t>(1, n.images * n.pixels);
  torch::stable::parallel_for(0, n.channels, std::max<int64_t>(1, 32768 / work),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t c = begin; c < end; ++c) f(c, c * n.pixels);
                              });
}

NormArgs channel_args(const Norm& n, const float* x, const float* grad, float* out) {
  return {x, grad, out, n.images, n.pixels, n.channels * n.pixels, 0, 0, 0, n.activation};
}

// What the kernels do, in float64.
struct DoubleNorm {
  const Norm& n;
  const double* x;
  int64_t first;  // of the channel in image 0
  double mean, scale, shift;

  template <class F>
  void each(F f) const {
    for (int64_t i = 0; i < n.images; ++i)
      for (int64_t p = 0; p < n.pixels; ++p) f(first + i * n.channels * n.pixels + p);
  }
  double count() const { return static_cast<double>(n.images * n.pixels); }
  double linear(int64_t i) const { return (x[i] - mean) * scale + shift; }
  double gated(int64_t i, double grad) const {
    const double y = linear(i);
    const bool shut = y <= 0 || (n.activation == kRelu6 && y >= 6);  // not by NaN, as in torch
    return n.activation != kNone && shut ? 0 : grad;
  }
};

void moments_double(const DoubleNorm& d, double* out) {
  double mean = 0, square = 0;
  d.each([&](int64_t i) { mean += d.x[i]; });
  mean /= d.count();
  d.each([&](int64_t i) { square += (d.x[i] - mean) * (d.x[i] - mean); });
  out[0] = mean, out[1] = square / d.count();
}

void apply_double(const DoubleNorm& d, double* out) {
  d.each([&](int64_t i) {
    double y = d.linear(i);
    if (d.n.activation != kNone) y = y < 0 ? 0 : y;
    out[i] = d.n.activation == kRelu6 && y > 6 ? 6 : y;
  });
}

void grad_double(const DoubleNorm& d, const double* grad, double rstd, double* out, double* sums) {
  sums[0] = sums[1] = 0;
  d.each([&](int64_t i) {
    const double g = d.gated(i, grad[i]);
    sums[0] += g, sums[1] += g * (d.x[i] - d.mean);
  });
  d.each([&](int64_t i) {
    const double along = (d.x[i] - d.mean) * rstd * rstd * sums[1];
    out[i] = d.scale * (d.gated(i, grad[i]) - (sums[0] + along) / d.count());
  });
}

// The operands of one channel in either type.
template <class T>
struct Channels {
  const T *x, *weight, *bias;
  T *out, *mean, *var;
};

void forward_channel(const Norm& n, const Channels<float>& t, double eps, int64_t c, int64_t at) {
  NormArgs a = channel_args(n, t.x + at, nullptr, t.out + at);
  double moments[2];
  kernels().norm_moments(a, moments);
  t.mean[c] = static_cast<float>(moments[0]), t.var[c] = static_cast<float>(moments[1]);
  a.mean = t.mean[c], a.shift = t.bias[c];
  a.scale = static_cast<float>(t.weight[c] / std::sqrt(static_cast<double>(t.var[c]) + eps));
  kernels().norm_apply(a);
}

void forward_channel(const Norm& n, const Channels<double>& t, double eps, int64_t c, int64_t at) {
  double moments[2];
  moments_double({n, t.x, at, 0, 0, 0}, moments);
  t.mean[c] = moments[0], t.var[c] = moments[1];
  apply_double({n, t.x, at, moments[0], t.weight[c] / std::sqrt(moments[1] + eps), t.bias[c]},
               t.out);
}

void backward_channel(const Norm& n, const Channels<float>& t, const float* grad, double rstd,
                      int64_t c, int64_t at, double* sums) {
  NormArgs a = channel_args(n, t.x + at, grad + at, t.out + at);
  a.mean = t.mean[c], a.scale = static_cast<float>(t.weight[c] * rstd), a.shift = t.bias[c];
  kernels().norm_grad(a, rstd, sums);
}

void backward_channel(const Norm& n, const Channels<double>& t, const double* grad, double rstd,
                      int64_t c, int64_t at, double* sums) {
  grad_double({n, t.x, at, t.mean[c], t.weight[c] * rstd, t.bias[c]}, grad, rstd, t.out, sums);
}

template <class T>
Three forward(const Norm& n, const Tensor& x, const Tensor& weight, const Tensor& bias,
              double eps) {
  const ScalarType type = x.scalar_type();
  const Tensor xc = as_contiguous(x, type), w = as_contiguous(weight, type);
  const Tensor b = as_contiguous(bias, type);
  const Tensor y = empty_tensor(n.shape, type), mean = empty_tensor({n.channels}, type);
  const Tensor var = empty_tensor({n.channels}, type);
  const Channels<T> t{xc.template const_data_ptr<T>(),     w.template const_data_ptr<T>(),
                      b.template const_data_ptr<T>(),      y.template mutable_data_ptr<T>(),
                      mean.template mutable_data_ptr<T>(), var.template mutable_data_ptr<T>()};
  each_channel(n, [&](int64_t c, int64_t at) { forward_channel(n, t, eps, c, at); });
  return {y, mean, var};
}

template <class T>
Three backward(const Norm& n, const Tensor& grad, const Tensor& x, const Tensor& mean,
               const Tensor& var, const Tensor& weight, const Tensor& bias, double eps) {
  const ScalarType type = x.scalar_type();
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor w = as_contiguous(weight, type), b = as_contiguous(bias, type);
  const Tensor m = as_contiguous(mean, type), v = as_contiguous(var, type);
  const Tensor out = empty_tensor(n.shape, type), grad_w = empty_tensor({n.channels}, type);
  const Tensor grad_b = empty_tensor({n.channels}, type);
  const Channels<T> t{xc.template const_data_ptr<T>(),
                      w.template const_data_ptr<T>(),
                      b.template const_data_ptr<T>(),
                      out.template mutable_data_ptr<T>(),
                      const_cast<T*>(m.template const_data_ptr<T>()),
                      const_cast<T*>(v.template const_data_ptr<T>())};
  const T* g = gc.template const_data_ptr<T>();
  T *gw = grad_w.template mutable_data_ptr<T>(), *gb = grad_b.template mutable_data_ptr<T>();
  each_channel(n, [&](int64_t c, int64_t at) {
    const double rstd = 1 / std::sqrt(static_cast<double>(t.var[c]) + eps);
    double sums[2];
    backward_channel(n, t, g, rstd, c, at, sums);
    gb[c] = static_cast<T>(sums[0]), gw[c] = static_cast<T>(sums[1] * rstd);
  });
  return {out, grad_w, grad_b};
}

Three batch_norm_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                     const std::string& activation) {
  const Norm n = check_norm("batch_norm", x, weight, bias, activation);
  return x.scalar_type() == ScalarType::Double ? forward<double>(n, x, weight, bias, eps)
                                               : forward<float>(n, x, weight, bias, eps);
}

Three batch_norm_grad_cpu(const Tensor& grad, const Tensor& x, const Tensor& mean,
                          const Tensor& var, const Tensor& weight, const Tensor& bias, double eps,
                          const std::string& activation) {
  const std::string op = "batch_norm_grad";
  const Norm n = check_norm(op, x, weight, bias, activation);
  check_operand(op, "grad", grad, x);
  check_dim(op, "grad", grad, 4);
  for (int64_t i = 0; i < 4; ++i)
    check_size(op, "grad.size(" + std::to_string(i) + ") = x.size(" + std::to_string(i) + ")",
               grad.size(i), x.size(i));
  for (auto [name, t] : {std::pair{"mean", &mean}, std::pair{"var", &var}}) {
    check_operand(op, name, *t, x);
    check_dim(op, name, *t, 1);
    check_size(op, std::string(name) + ".size(0) = channels", t->size(0), n.channels);
  }
  return x.scalar_type() == ScalarType::Double
             ? backward<double>(n, grad, x, mean, var, weight, bias, eps)
             : backward<float>(n, grad, x, mean, var, weight, bias, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "batch_norm", batch_norm_cpu);
  SPARSEKERN_IMPL(m, "batch_norm_grad", batch_norm_grad_cpu);
}

}  // namespace sparsekern
