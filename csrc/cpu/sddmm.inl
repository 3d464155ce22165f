// Weight gradient on the pattern (sampled dense-dense matrix product). A row of the gradient stays
// in R registers while the columns of its run stream from the L1 cache. Runs are short, so the dot
// products of several runs wait in a buffer until N of them can be summed across lanes at once.
namespace sparsekern {
namespace {

constexpr int kSddmmVectors = 8;

struct PendingDots {
  Vec dot[Vec::N];
  float* out[Vec::N];
  int64_t count = 0;
};

template <bool kFirst>
SK_INLINE void flush(PendingDots& p) {
  for (int64_t l = p.count; l < Vec::N; ++l) p.dot[l] = Vec::set(0.f);
  float sum[Vec::N];
  sum_each(p.dot).store(sum);
  for (int64_t l = 0; l < p.count; ++l) *p.out[l] = kFirst ? sum[l] : *p.out[l] + sum[l];
  p.count = 0;
}

template <bool kFirst>
SK_INLINE void sddmm_run(const Run& run, const uint16_t* offsets, const float* grad_row,
                         const float* panel, float* out, PendingDots& pending) {
  constexpr int R = kSddmmVectors;
  constexpr int64_t P = R * Vec::N;
  Vec g[R];
  for (int j = 0; j < R; ++j) g[j] = Vec::load(grad_row + j * Vec::N);
  for (int32_t i = 0; i < run.count; ++i) {
    const float* x = panel + offsets[i] * P;
    asm("" : "+r"(x));
    Vec s0 = g[0] * Vec::load(x), s1 = g[1] * Vec::load(x + Vec::N);
    for (int j = 2; j < R; j += 2) {
      s0 = fma(g[j], Vec::load(x + j * Vec::N), s0);
      s1 = fma(g[j + 1], Vec::load(x + (j + 1) * Vec::N), s1);
    }
    pending.dot[pending.count] = s0 + s1;
    pending.out[pending.count] = out + run.start + i;
    if (++pending.count == Vec::N) flush<kFirst>(pending);
  }
}

template <bool kFirst>
void sddmm_panel(const Run* begin, const Run* end, const SddmmArgs& a, const float* grad,
                 const float* panel) {
  PendingDots pending;
  const uint16_t* offsets = a.plan.offsets + a.plan.value_start[a.group];
  for (const Run* r = begin; r < end; ++r) {
    const float* next = grad + r[1].row * kSddmmVectors * Vec::N;
    for (int j = 0; j < kSddmmVectors; ++j) __builtin_prefetch(next + j * Vec::N);
    sddmm_run<kFirst>(*r, offsets, grad + r->row * kSddmmVectors * Vec::N, panel, a.out, pending);
    offsets += r->count;
  }
  flush<kFirst>(pending);
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
    (t == 0 ? sddmm_panel<true> : sddmm_panel<false>)(begin, end, a, grad, a.scratch);
  }
}

}  // namespace
}  // namespace sparsekern
