// Activations of a vector, applied before a result is stored.
namespace sparsekern {
namespace {

SK_INLINE Vec gelu(Vec x) {
  // erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
  const Vec z = abs(x) * Vec::set(0.70710678f);
  const Vec t = Vec::set(1.f) / fma(z, Vec::set(0.3275911f), Vec::set(1.f));
  Vec p = Vec::set(1.061405429f);
  p = fma(p, t, Vec::set(-1.453152027f));
  p = fma(p, t, Vec::set(1.421413741f));
  p = fma(p, t, Vec::set(-0.284496736f));
  p = fma(p, t, Vec::set(0.254829592f));
  const Vec erf_z = Vec::set(1.f) - p * t * exp_negative(Vec::set(0.f) - z * z);
  return Vec::set(0.5f) * x * (Vec::set(1.f) + copy_sign(erf_z, x));
}

SK_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = Vec::set(0.79788456f) * x * fma(Vec::set(0.044715f) * x, x, Vec::set(1.f));
  const Vec e = exp_negative(Vec::set(-2.f) * abs(u));
  const Vec tanh_u = (Vec::set(1.f) - e) / (Vec::set(1.f) + e);
  return Vec::set(0.5f) * x * (Vec::set(1.f) + copy_sign(tanh_u, u));
}

SK_INLINE Vec activate(Vec x, Activation a) {
  switch (a) {
    case kRelu: return max(Vec::set(0.f), x);
    case kRelu6: return min(Vec::set(6.f), max(Vec::set(0.f), x));
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    default: return x;
  }
}

}  // namespace
}  // namespace sparsekern
