// Values of a bfloat16 matrix as words of two columns, in the order in which spmm reads them. The
// values of a run lie side by side, with no place for those that are not stored: they are spread
// over the words by one expansion, so that a pair needs two bits and no index.
namespace sparsekern {
namespace {

constexpr int64_t kPairVectors = 6;  // see bench/NOTES.md, Low precision

// 32 bits from bit `first` on (even); up to 8 bytes are read.
SK_INLINE uint32_t bits_at(const uint8_t* p, int64_t first) {
  uint64_t word;
  __builtin_memcpy(&word, p + first / 8, sizeof(word));
  return static_cast<uint32_t>(word >> (first % 8));
}

void pack_pairs(const PairView& pairs, const uint16_t* values, float* out, int64_t group_begin,
                int64_t group_end) {
  const PlanView& plan = pairs.plan;
  int64_t at = plan.value_start[group_begin];
  const Run* end = plan.runs + plan.run_start[group_end];
  for (const Run* run = plan.runs + plan.run_start[group_begin]; run < end; ++run) {
    __builtin_prefetch(values + run[kPackAhead].start);
    const uint16_t* v = values + run->start;
    for (int32_t i = 0; i < run->count; i += Vec::N) {
      const int32_t left = run->count - i;
      const uint32_t n = left < Vec::N ? left : Vec::N;
      const uint32_t stored = _bzhi_u32(bits_at(pairs.stored, 2 * at), 2 * n);
      const uint32_t used = static_cast<uint32_t>(__builtin_popcount(stored));
      const __m512i packed = _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, used), v);
      _mm512_mask_storeu_epi32(out + at, static_cast<__mmask16>((1u << n) - 1),
                               _mm512_maskz_expand_epi16(stored, packed));
      v += used;
      at += n;
    }
  }
}

}  // namespace
}  // namespace sparsekern
