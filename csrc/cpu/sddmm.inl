// Weight gradient on the pattern (sampled dense-dense matrix product). A row of the gradient stays
// in R registers while the columns of its run stream from the L1 cache; N dot products are summed
// across lanes at once.
namespace sparsekern {
namespace {

constexpr int kSddmmVectors = 8;

template <bool kFirst>
SK_INLINE void sddmm_run(const Run& run, const int32_t* col, const float* grad_row,
                         const float* panel, float* out) {
  constexpr int R = kSddmmVectors;
  constexpr int64_t P = R * Vec::N;
  Vec g[R];
  for (int j = 0; j < R; ++j) g[j] = Vec::load(grad_row + j * Vec::N);
  for (int32_t i = 0; i < run.count; i += Vec::N) {
    const int64_t n = run.count - i < Vec::N ? run.count - i : Vec::N;
    Vec dot[Vec::N];
    for (int64_t l = 0; l < n; ++l) {
      const float* x = panel + col[run.start + i + l] * P;
      Vec s0 = g[0] * Vec::load(x), s1 = g[1] * Vec::load(x + Vec::N);
      for (int j = 2; j < R; j += 2) {
        s0 = fma(g[j], Vec::load(x + j * Vec::N), s0);
        s1 = fma(g[j + 1], Vec::load(x + (j + 1) * Vec::N), s1);
      }
      dot[l] = s0 + s1;
    }
    for (int64_t l = n; l < Vec::N; ++l) dot[l] = Vec::set(0.f);
    Vec sum = sum_each(dot);
    float* p = out + run.start + i;
    if (!kFirst) sum = sum + Vec::load(p, n);
    sum.store(p, n);
  }
}

void sddmm(const SddmmArgs& a) {
  constexpr int64_t P = kSddmmVectors * Vec::N;
  const PlanView& plan = a.plan;
  const int64_t c0 = a.group % plan.n_col_blocks * plan.col_block;
  const int64_t c1 = c0 + plan.col_block < plan.cols ? c0 + plan.col_block : plan.cols;
  const Run* begin = plan.runs + plan.run_start[a.group];
  const Run* end = plan.runs + plan.run_start[a.group + 1];
  for (int64_t t = 0, p = 0; t < a.tokens; t += P, ++p) {
    fill_panel(a.source, a.scratch, kSddmmVectors, t, t + P < a.tokens ? t + P : a.tokens, c0, c1);
    const float* grad = a.grad_panels + p * a.grad_panel_stride;
    const float* panel = a.scratch - c0 * P;
    for (const Run* r = begin; r < end; ++r) {
      if (t == 0) sddmm_run<true>(*r, a.col, grad + r->row * P, panel, a.out);
      else sddmm_run<false>(*r, a.col, grad + r->row * P, panel, a.out);
    }
  }
}

}  // namespace
}  // namespace sparsekern
