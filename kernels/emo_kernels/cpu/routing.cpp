// Routing inside pools on a CPU with AVX-512: gate logits -> each token's weights and slots.
//
// The rule is that of emo_kernels.reference.route. Follows moe_mlp.cpp in one translation unit.

#include <limits>
#include <vector>

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kTokensAtOnce = 64;  // that one thread takes at a time

struct Rule {
  int64_t num_experts, top_k, num_shared, num_always;
  const int32_t* always;
  bool renormalize;
};

struct Tables {
  const uint8_t* members;  // [P, E]
  const float* temperatures;
  const int32_t* slot_of_expert;
};

// Sixteen logits, those of `lanes`.
__m512 widened(const float* in, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, in); }
__m512 widened(const uint16_t* bfloat16, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, bfloat16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Routes one token after the other in scratch of its own. Experts come in lines of 16.
class TokenRouter {
 public:
  explicit TokenRouter(const Rule& rule)
      : rule_(rule),
        num_lines_((rule.num_experts + 15) / 16),
        standard_(lanes_of(0, rule.num_experts - (rule.num_always ? 0 : rule.num_shared))),
        shared_(lanes_of(rule.num_experts - rule.num_shared, rule.num_experts)),
        always_(num_lines_),
        pool_(num_lines_),
        left_(num_lines_),
        keys_(16 * num_lines_),
        terms_(16 * num_lines_) {
    for (int64_t i = 0; i < rule.num_always; ++i)
      always_[rule.always[i] / 16] |= 1 << rule.always[i] % 16;
  }

  template <class Element>
  void route(const Element* logits, const uint8_t* members, float temperature,
             const int32_t* slot_of_expert, float* weights, int32_t* slots) {
    for (int64_t line = 0; line < num_lines_; ++line) {
      const __mmask16 lanes = standard_[line] | shared_[line];
      const __m128i named = _mm_maskz_loadu_epi8(lanes, members + 16 * line);
      pool_[line] = _mm_test_epi8_mask(named, named) | shared_[line] | always_[line];
      left_[line] = pool_[line] & standard_[line] & ~always_[line];
      const __m512 logit = widened(logits + 16 * line, lanes);
      const __mmask16 is_nan = _mm512_cmp_ps_mask(logit, logit, _CMP_UNORD_Q);
      const __m512 infinity = _mm512_set1_ps(kInfinity);
      _mm512_storeu_ps(&keys_[16 * line], _mm512_mask_mov_ps(logit, is_nan, infinity));
      _mm512_storeu_ps(&terms_[16 * line], _mm512_div_ps(logit, _mm512_set1_ps(temperature)));
    }
    softmax(standard_);
    if (!rule_.num_always) softmax(shared_);

    int64_t place = 0;
    float sum = 0;
    const auto take = [&](int64_t expert) {
      weights[place] = expert < 0 ? 0.0f : terms_[expert];
      slots[place] = expert < 0 ? -1 : slot_of_expert[expert];
      sum += weights[place++];
    };
    const int64_t num_last = rule_.num_always ? 0 : rule_.num_shared;
    for (int64_t i = 0; i < rule_.num_always; ++i) take(rule_.always[i]);
    while (place < rule_.top_k - num_last) take(next_best());
    for (int64_t i = num_last; i > 0; --i) take(rule_.num_experts - i);
    for (place = 0; place < rule_.top_k; ++place) {
      if (weights[place] == 0 || slots[place] < 0) {
        weights[place] = 0;
        slots[place] = -1;
      } else if (rule_.renormalize) {
        weights[place] /= std::max(sum, 1e-20f);
      }
    }
  }

 private:
  std::vector<__mmask16> lanes_of(int64_t begin, int64_t end) const {
    std::vector<__mmask16> lines(num_lines_);
    for (int64_t expert = begin; expert < end; ++expert) lines[expert / 16] |= 1 << expert % 16;
    return lines;
  }

  // Take the greatest logit that is left, nan before all others, of equal ones the first; or -1.
  int64_t next_best() {
    const __m512 least = _mm512_set1_ps(-kInfinity);
    __m512 best = least;
    for (int64_t line = 0; line < num_lines_; ++line)
      best = _mm512_mask_max_ps(best, left_[line], best, _mm512_loadu_ps(&keys_[16 * line]));
    const __m512 greatest = _mm512_set1_ps(_mm512_reduce_max_ps(best));
    for (int64_t line = 0; line < num_lines_; ++line) {
      const uint32_t found = _mm512_mask_cmp_ps_mask(left_[line], greatest,
                                                     _mm512_loadu_ps(&keys_[16 * line]), _CMP_EQ_OQ);
      if (!found) continue;
      left_[line] &= ~(found & -found);
      return 16 * line + __builtin_ctz(found);
    }
    return -1;
  }

  // Replace the scaled logits of the pool's experts in these lanes by their softmax.
  void softmax(const std::vector<__mmask16>& lanes) {
    __m512 tops = _mm512_set1_ps(-kInfinity);
    for (int64_t line = 0; line < num_lines_; ++line)  // a nan stays out of the maximum
      tops = _mm512_mask_max_ps(tops, pool_[line] & lanes[line],
                                _mm512_loadu_ps(&terms_[16 * line]), tops);
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(tops));
    const __m512 least = _mm512_set1_ps(-104.0f);  // e^-104 is 0 in fp32
    __m512 sums = _mm512_setzero_ps();
    for (int64_t line = 0; line < num_lines_; ++line) {
      const __m512 scaled = _mm512_sub_ps(_mm512_loadu_ps(&terms_[16 * line]), top);
      const __m512 terms = exp512(_mm512_max_ps(least, scaled));  // nan stays: it comes second
      sums = _mm512_mask_add_ps(sums, pool_[line] & lanes[line], sums, terms);
      _mm512_mask_storeu_ps(&terms_[16 * line], lanes[line], terms);
    }
    const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(sums));
    for (int64_t line = 0; line < num_lines_; ++line) {
      const __m512 terms = _mm512_loadu_ps(&terms_[16 * line]);
      _mm512_mask_storeu_ps(&terms_[16 * line], lanes[line], _mm512_div_ps(terms, total));
    }
  }

  const Rule rule_;
  const int64_t num_lines_;
  const std::vector<__mmask16> standard_, shared_;  // which share a softmax
  std::vector<__mmask16> always_;
  std::vector<__mmask16> pool_;  // the token's
  std::vector<__mmask16> left_;  // of which no place holds one yet
  std::vector<float> keys_;      // logits, nan as infinity
  std::vector<float> terms_;     // scaled logits, then the softmax
};

template <class Element>
void route(const Rule& rule, const Tables& tables, const Element* logits, int64_t stride,
           const int64_t* pool_rows, int64_t tokens, float* weights, int32_t* slots) {
  const auto route_from = [&](int64_t token, int64_t end) {
    TokenRouter router(rule);
    for (; token < end; ++token) {
      float* token_weights = weights + token * rule.top_k;
      int32_t* token_slots = slots + token * rule.top_k;
      const int64_t row = pool_rows[token];
      if (row < 0) {  // padding takes nothing
        std::fill(token_weights, token_weights + rule.top_k, 0.0f);
        std::fill(token_slots, token_slots + rule.top_k, -1);
        continue;
      }
      router.route(logits + token * stride, tables.members + row * rule.num_experts,
                   tables.temperatures[row], tables.slot_of_expert, token_weights, token_slots);
    }
  };
  if (tokens <= kTokensAtOnce) return route_from(0, tokens);
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < tokens; first += kTokensAtOnce)
    route_from(first, std::min(tokens, first + kTokensAtOnce));
}

}  // namespace

extern "C" {

// Route tokens; logits are float if `is_float32`, else bfloat16, their rows `stride` apart.
void emo_route(float* weights, int32_t* slots, const void* logits, const int64_t* pool_rows,
               const uint8_t* members, const float* temperatures, const int32_t* slot_of_expert,
               const int32_t* always, int64_t tokens, int64_t stride, int64_t num_experts,
               int64_t top_k, int64_t num_shared, int64_t num_always, int32_t renormalize,
               int32_t is_float32) {
  const Rule rule{num_experts, top_k, num_shared, num_always, always, renormalize != 0};
  const Tables tables{members, temperatures, slot_of_expert};
  if (is_float32)
    route(rule, tables, static_cast<const float*>(logits), stride, pool_rows, tokens, weights,
          slots);
  else
    route(rule, tables, static_cast<const uint16_t*>(logits), stride, pool_rows, tokens, weights,
          slots);
}
}
