// The experts of one layer for a batch of tokens, on a CPU with AVX-512: y = sum of weight * expert.
//
// A matrix lies in blocks of 16 rows, each block [k][16] in lanes of 4 bytes: one float, or two
// neighbouring bfloat16 of a row. Activations are copied into tiles of 16 tokens by 16 lanes. One
// tile is what AMX multiplies at once, and one row of a block is one AVX-512 register, so the same
// loops carry both.
//
// Sizes: T tokens, K experts a token takes, D hidden size, F expert width, S slots.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kTileBytes = 1024;  // 16 rows of 16 lanes of 4 bytes
constexpr int64_t kLineBytes = 64;
constexpr int64_t kProductsToShare = 1 << 20;  // fewer take less time than waking threads
constexpr int64_t kRowsBytes = 768 * 1024;  // tokens computed in one pass over weights: they stay in L2

struct Float32 {
  static constexpr int64_t kPerLane = 1;
  using Element = float;

  static __m512 dot(__m512 sum, const char* a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*reinterpret_cast<const float*>(a)),
                           _mm512_castsi512_ps(b), sum);
  }
  static void store(Element* out, __m512 values) { _mm512_storeu_ps(out, values); }
};

#ifdef __AVX512BF16__
struct Bfloat16 {
  static constexpr int64_t kPerLane = 2;
  using Element = uint16_t;

  static __m512 dot(__m512 sum, const char* a, __m512i b) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a));
    return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)b);
  }
  static void store(Element* out, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
  }
};
#endif

// Two blocks of 16 rows of weights, which are multiplied together.
struct Panel {
  const char* left;
  const char* right;
  int64_t steps;  // tiles along k
  int64_t next;   // bytes from a block to the one that takes its place in the next panel
};

// One group of tokens' products with a panel: [row][0..16) from the left block, [16..32) the right.
using Sums = float[32][32];

// While one of several groups of tokens is multiplied, fetch its share of the next panel.
inline void fetch_ahead(const Panel& panel, int64_t step, int64_t group, int64_t groups) {
  if (groups == 1) return;  // memory is busy with this panel
  const int64_t offset = panel.next + step * kTileBytes;
  for (int64_t line = 16 * group / groups; line < 16 * (group + 1) / groups; ++line) {
    _mm_prefetch(panel.left + offset + line * kLineBytes, _MM_HINT_T1);
    _mm_prefetch(panel.right + offset + line * kLineBytes, _MM_HINT_T1);
  }
}

template <class Type, int kRows>
void multiply_rows(const char* a, const Panel& panel, int64_t group, int64_t groups, Sums& sums) {
  __m512 left[kRows], right[kRows];
  for (int row = 0; row < kRows; ++row) left[row] = right[row] = _mm512_setzero_ps();
  for (int64_t step = 0; step < panel.steps; ++step) {
    fetch_ahead(panel, step, group, groups);
#pragma GCC unroll 4
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int64_t offset = step * kTileBytes + lane * kLineBytes;
      const __m512i b_left = _mm512_loadu_si512(panel.left + offset);
      const __m512i b_right = _mm512_loadu_si512(panel.right + offset);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const char* a_lane = a + step * kTileBytes + row * kLineBytes + lane * 4;
        left[row] = Type::dot(left[row], a_lane, b_left);
        right[row] = Type::dot(right[row], a_lane, b_right);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    _mm512_store_ps(&sums[row][0], left[row]);
    _mm512_store_ps(&sums[row][16], right[row]);
  }
}

template <class Type>
struct Vectors {
  using Number = Type;
  static constexpr int64_t kRowsAtOnce = 8;

  static void begin() {}
  static void end() {}

  static void multiply(const char* a, int64_t rows, const Panel& panel, int64_t group,
                       int64_t groups, Sums& sums) {
    switch (rows) {
      case 1: return multiply_rows<Type, 1>(a, panel, group, groups, sums);
      case 2: return multiply_rows<Type, 2>(a, panel, group, groups, sums);
      case 3: return multiply_rows<Type, 3>(a, panel, group, groups, sums);
      case 4: return multiply_rows<Type, 4>(a, panel, group, groups, sums);
      case 5: return multiply_rows<Type, 5>(a, panel, group, groups, sums);
      case 6: return multiply_rows<Type, 6>(a, panel, group, groups, sums);
      case 7: return multiply_rows<Type, 7>(a, panel, group, groups, sums);
      default: return multiply_rows<Type, 8>(a, panel, group, groups, sums);
    }
  }
};

#ifdef __AMX_BF16__
struct Tiles {
  using Number = Bfloat16;
  static constexpr int64_t kRowsAtOnce = 32;

  static void begin() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // Fetches nothing ahead, whatever the groups.
  static void multiply(const char* a, int64_t rows, const Panel& panel, int64_t, int64_t,
                       Sums& sums) {
    _tile_zero(0);
    _tile_zero(1);
    if (rows <= 16) {
      for (int64_t step = 0; step < panel.steps; ++step) {
        _tile_loadd(4, a + step * kTileBytes, 64);
        _tile_loadd(6, panel.left + step * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel.right + step * kTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
    } else {
      const char* lower = a + panel.steps * kTileBytes;
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < panel.steps; ++step) {
        _tile_loadd(4, a + step * kTileBytes, 64);
        _tile_loadd(6, panel.left + step * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel.right + step * kTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + step * kTileBytes, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(2, &sums[16][0], sizeof sums[0]);
      _tile_stored(3, &sums[16][16], sizeof sums[0]);
    }
    _tile_stored(0, &sums[0][0], sizeof sums[0]);
    _tile_stored(1, &sums[0][16], sizeof sums[0]);
  }
};
#endif

// e^x by 2^n * p(f): x = (n + f) ln 2, p the Taylor series of degree 6 over |f| <= 1/2.
__m512 exp512(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 whole =
      _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f),
                      _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), x));
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(sum, whole);
}

__m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

struct Batch {
  char* y;
  const char* x;
  const char* w13;
  const char* w2;
  const float* weights;
  const int32_t* slots;
  int64_t tokens, top_k, hidden, width, num_slots;
};

int64_t most_tiles(int64_t places, int64_t num_slots) {
  return places / 16 + std::min(places, num_slots) + 1;
}

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Kernel>
class Layer {
  using Type = typename Kernel::Number;
  using Element = typename Type::Element;
  static constexpr int64_t kPerTile = 16 * Type::kPerLane;  // elements of k in a tile
  static constexpr int64_t kRowsAtOnce = Kernel::kRowsAtOnce;

 public:
  Layer(const Batch& batch, char* scratch)
      : b_(batch),
        hidden_block_(b_.hidden / kPerTile * kTileBytes),
        width_block_(b_.width / kPerTile * kTileBytes) {
    const auto take = [&scratch](int64_t bytes) {
      char* begin = scratch;
      scratch += padded(bytes);
      return begin;
    };
    const int64_t places = b_.tokens * b_.top_k;
    first_tile_ = reinterpret_cast<int32_t*>(take(4 * (b_.num_slots + 1)));
    count_ = reinterpret_cast<int32_t*>(take(4 * b_.num_slots));
    hit_ = reinterpret_cast<int32_t*>(take(4 * b_.num_slots));
    place_ = reinterpret_cast<int32_t*>(take(64 * most_tiles(places, b_.num_slots)));
    sort_rows();
    packed_x_ = take(tiles() * hidden_block_);
    packed_h_ = take(tiles() * width_block_);
    sums_y_ = reinterpret_cast<float*>(take(4 * b_.tokens * b_.hidden));
  }

  void run() {
    const int64_t products = b_.tokens * b_.top_k * 3 * b_.hidden * b_.width;
    const int threads = products < kProductsToShare ? 1 : omp_get_max_threads();
    const int64_t up_chunk = chunk(b_.width / 16, threads);
    const int64_t down_chunk = chunk(b_.hidden / 32, threads);
#pragma omp parallel num_threads(threads)
    {
      Kernel::begin();
      pack_tokens();
      gate_up(up_chunk);
      down(down_chunk);
      Kernel::end();
    }
  }

 private:
  int64_t tiles() const { return first_tile_[b_.num_slots]; }

  // Panels a thread takes at once: four turns a thread at least, and no more than 8 panels a turn.
  static int64_t chunk(int64_t panels, int64_t threads) {
    return std::clamp<int64_t>(panels / (4 * threads), 1, 8);
  }

  // Sort places by slot: a slot's rows begin a tile of their own, in the order of tokens.
  void sort_rows() {
    const int64_t places = b_.tokens * b_.top_k;
    std::fill(count_, count_ + b_.num_slots, 0);
    for (int64_t i = 0; i < places; ++i)
      if (b_.weights[i] != 0) ++count_[b_.slots[i]];
    first_tile_[0] = 0;
    num_hit_ = 0;
    for (int64_t slot = 0; slot < b_.num_slots; ++slot) {
      first_tile_[slot + 1] = first_tile_[slot] + (count_[slot] + 15) / 16;
      if (count_[slot] > 0) hit_[num_hit_++] = slot;
    }
    std::fill(place_, place_ + 16 * tiles(), -1);
    std::fill(count_, count_ + b_.num_slots, 0);
    for (int64_t i = 0; i < places; ++i) {
      if (b_.weights[i] == 0) continue;
      const int32_t slot = b_.slots[i];
      place_[16 * first_tile_[slot] + count_[slot]++] = i;
    }
  }

  void pack_tokens() {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      char* out = packed_x_ + tile * hidden_block_;
      for (int64_t row = 0; row < 16; ++row) {
        const int32_t place = place_[16 * tile + row];
        const char* in = place < 0 ? nullptr
                                   : b_.x + place / b_.top_k * b_.hidden * sizeof(Element);
        for (int64_t at = 0; at < hidden_block_ / kTileBytes; ++at) {
          const __m512i line =
              in ? _mm512_loadu_si512(in + at * kLineBytes) : _mm512_setzero_si512();
          _mm512_store_si512(out + at * kTileBytes + row * kLineBytes, line);
        }
      }
    }
  }

  // Multiply a slot's rows by the panels [first, last); `panel_of` tells where each lies, `use`
  // takes the sums of one row.
  template <class PanelOf, class Use>
  void multiply(int64_t slot, const char* packed, int64_t block, int64_t first, int64_t last,
                PanelOf panel_of, Use use) {
    alignas(64) Sums sums;
    const int64_t pass = std::max<int64_t>(32, kRowsBytes / block * 16 / 32 * 32);
    for (int64_t from = 0; from < count_[slot]; from += pass) {
      const int64_t until = std::min<int64_t>(count_[slot], from + pass);
      const int64_t groups = (until - from + kRowsAtOnce - 1) / kRowsAtOnce;
      for (int64_t index = first; index < last; ++index) {
        const Panel panel = panel_of(index);
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t row = from + group * kRowsAtOnce;
          const char* a = packed + (first_tile_[slot] + row / 16) * block + row % 16 * kLineBytes;
          const int64_t rows = std::min(kRowsAtOnce, until - row);
          Kernel::multiply(a, rows, panel, group, groups, sums);
          for (int64_t i = 0; i < rows; ++i) use(index, row + i, sums[i]);
        }
      }
    }
  }

  // h = silu(gate) * up, a block of gate rows beside the same block of up rows.
  void gate_up(int64_t chunk) {
    const int64_t blocks = b_.width / 16, chunks = (blocks + chunk - 1) / chunk;
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t hit = 0; hit < num_hit_; ++hit)
      for (int64_t part = 0; part < chunks; ++part) {
        const int64_t slot = hit_[hit];
        const char* w = b_.w13 + slot * 2 * blocks * hidden_block_;
        const auto panel_of = [&](int64_t block) {
          return Panel{w + block * hidden_block_, w + (blocks + block) * hidden_block_,
                       hidden_block_ / kTileBytes, hidden_block_};
        };
        const auto use = [&](int64_t block, int64_t row, const float* sums) {
          const int64_t column = 16 * block;
          char* line = packed_h_ + (first_tile_[slot] + row / 16) * width_block_ +
                       column / kPerTile * kTileBytes + row % 16 * kLineBytes;
          Type::store(reinterpret_cast<Element*>(line) + column % kPerTile,
                      _mm512_mul_ps(silu(_mm512_load_ps(sums)), _mm512_load_ps(sums + 16)));
        };
        multiply(slot, packed_x_, hidden_block_, part * chunk,
                 std::min(blocks, (part + 1) * chunk), panel_of, use);
      }
  }

  // y = sum of weight * (h @ w2.T). A thread owns columns of y, for the experts of all slots.
  void down(int64_t chunk) {
    const int64_t panels = b_.hidden / 32, chunks = (panels + chunk - 1) / chunk;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < chunks; ++part) {
      const int64_t first = part * chunk, last = std::min(panels, first + chunk);
      for (int64_t token = 0; token < b_.tokens; ++token)
        std::memset(sums_y_ + token * b_.hidden + 32 * first, 0, 128 * (last - first));
      for (int64_t hit = 0; hit < num_hit_; ++hit) {
        const int64_t slot = hit_[hit];
        const char* w = b_.w2 + slot * 2 * panels * width_block_;
        const auto panel_of = [&](int64_t pair) {
          const char* left = w + 2 * pair * width_block_;
          return Panel{left, left + width_block_, width_block_ / kTileBytes, 2 * width_block_};
        };
        const auto use = [&](int64_t pair, int64_t row, const float* sums) {
          const int32_t place = place_[16 * first_tile_[slot] + row];
          const __m512 weight = _mm512_set1_ps(b_.weights[place]);
          float* y = sums_y_ + place / b_.top_k * b_.hidden + 32 * pair;
          for (int64_t half = 0; half < 32; half += 16)
            _mm512_storeu_ps(y + half, _mm512_fmadd_ps(weight, _mm512_load_ps(sums + half),
                                                       _mm512_loadu_ps(y + half)));
        };
        multiply(slot, packed_h_, width_block_, first, last, panel_of, use);
      }
      for (int64_t token = 0; token < b_.tokens; ++token)
        for (int64_t column = 32 * first; column < 32 * last; column += 16) {
          const int64_t at = token * b_.hidden + column;
          Type::store(reinterpret_cast<Element*>(b_.y) + at, _mm512_loadu_ps(sums_y_ + at));
        }
    }
  }

  const Batch b_;
  const int64_t hidden_block_, width_block_;  // bytes of 16 rows, of D and of F elements
  int32_t* first_tile_;                       // [S + 1]
  int32_t* count_;                            // [S]
  int32_t* hit_;                              // [num_hit_]: slots with rows
  int64_t num_hit_;
  int32_t* place_;                            // [16 * tiles]: token * K + k, or -1
  char* packed_x_;                            // [tiles, D]
  char* packed_h_;                            // [tiles, F]
  float* sums_y_;                             // [T, D]
};

}  // namespace

extern "C" {

// Which kernels this build has: bit 0 vectors for float32, 1 vectors for bfloat16, 2 tiles.
int32_t emo_moe_kernels() {
  int32_t kernels = 1;
#ifdef __AVX512BF16__
  kernels |= 2;
#endif
#ifdef __AMX_BF16__
  kernels |= 4;
#endif
  return kernels;
}

// Bytes of scratch that `emo_moe` needs, aligned to 64.
int64_t emo_moe_scratch(int64_t tokens, int64_t top_k, int64_t hidden, int64_t width,
                        int64_t num_slots, int64_t element_bytes) {
  const int64_t tiles = most_tiles(tokens * top_k, num_slots);
  return padded(4 * (num_slots + 1)) + 2 * padded(4 * num_slots) + padded(64 * tiles) +
         padded(16 * tiles * hidden * element_bytes) + padded(16 * tiles * width * element_bytes) +
         padded(4 * tokens * hidden);
}

// Compute a batch with the kernel of this bit; places of weight 0 are skipped.
void emo_moe(int32_t kernel, char* y, const char* x, const char* w13, const char* w2,
             const float* weights, const int32_t* slots, int64_t tokens, int64_t top_k,
             int64_t hidden, int64_t width, int64_t num_slots, char* scratch) {
  const Batch batch{y, x, w13, w2, weights, slots, tokens, top_k, hidden, width, num_slots};
  if (kernel == 0) Layer<Vectors<Float32>>(batch, scratch).run();
#ifdef __AVX512BF16__
  if (kernel == 1) Layer<Vectors<Bfloat16>>(batch, scratch).run();
#endif
#ifdef __AMX_BF16__
  if (kernel == 2) Layer<Tiles>(batch, scratch).run();
#endif
}

// Write rows of `lanes` lanes of 4 bytes in blocks of 16 rows.
void emo_moe_pack(int32_t* out, const int32_t* in, int64_t rows, int64_t lanes) {
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t from = 0; from < lanes; from += 16)
      for (int64_t i = 0; i < 16; ++i)
        for (int64_t lane = from; lane < from + 16; ++lane)
          out[row * lanes + lane * 16 + i] = in[(row + i) * lanes + lane];
}
}
