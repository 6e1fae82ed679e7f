// The machine's own ceilings, so that a benchmark can say how far from the hardware it is: rate of
// float fused multiply-adds, rate of bf16 dot products (vdpbf16ps, or AMX's tiles), bandwidth of
// reading and of copying a buffer of a given size. Every thread works through small pieces on data
// of its own and counts those it ends in each millisecond; the best millisecond of all threads
// together is the ceiling, because whatever disturbs a thread only makes it slower, and on a
// machine shared with others a whole parallel region is seldom undisturbed. An FMA has a latency of
// 4 to 5 cycles and two may start per cycle, so ten independent sums are needed; twelve fit AVX2's
// 16 registers.
#include "params/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/amx.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace ft::FT_ISA {
namespace {

constexpr int kSums = 12;
constexpr int64_t kSteps = 2000;            // FMA steps in a piece: some 10 µs
constexpr int64_t kPieceBytes = 256 << 10;  // bytes in a piece, likewise
constexpr double kWindow = 1e-3;            // pieces are counted by the window that they end in

// Best rate over any window of piece(thread, number) on every thread, `work` units per piece.
template <class F>
double best_rate(double work, double seconds, const F& piece) {
  using clock = std::chrono::steady_clock;
  const int threads = num_threads();
  const size_t windows = static_cast<size_t>(seconds / kWindow) + 2;
  // (threads, windows). Scratch, not a std::vector: its members compiled for this instruction set
  // could become the whole library's.
  const size_t bytes = sizeof(int64_t) * static_cast<size_t>(threads) * windows;
  int64_t* ended = static_cast<int64_t*>(thread_scratch(Scratch::shared, bytes));
  std::memset(ended, 0, bytes);
  const auto start = clock::now();
  parallel_for(threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t number = 0;; ++number) {
        piece(thread, number);
        const std::chrono::duration<double> now = clock::now() - start;
        const size_t window = static_cast<size_t>(now.count() / kWindow);
        if (window >= windows) break;
        ++ended[static_cast<size_t>(thread) * windows + window];
      }
    }
  });
  int64_t best = 0;
  for (size_t window = 0; window < windows; ++window) {
    int64_t pieces = 0;
    for (int thread = 0; thread < threads; ++thread) pieces += ended[thread * windows + window];
    if (pieces > best) best = pieces;
  }
  return static_cast<double>(best) * work / kWindow;
}

// Hides where a value comes from, so that the loop around it is really run.
template <class V>
FT_INLINE void opaque(V& value) {
  __asm__ volatile("" : "+m"(value));
}

double fma_rate(double seconds) {
  return best_rate(2.0 * W * kSums * kSteps, seconds, [](int64_t, int64_t) {
    vf sums[kSums] = {}, a = splat(1.0f), b = splat(1e-9f);
    opaque(a);
    opaque(b);
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int k = 0; k < kSums; ++k) sums[k] = fma(sums[k], a, b);
    }
    for (vf& sum : sums) opaque(sum);
  });
}

#if defined(__AMX_BF16__)
// Four sums, since a product of tiles takes 16 cycles and its latency is 52.
double tile_rate(double seconds) {
  constexpr double kProduct = 2.0 * kTileRows * W * 2 * kTileUnits;
  return best_rate(4 * kProduct * kSteps, seconds, [](int64_t, int64_t) {
    const TileRegisters registers;
    _tile_zero(4);
    _tile_zero(6);
    for (int64_t i = 0; i < kSteps; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 6);
    }
  });
}
#endif

double dot_rate(double seconds) {
#if defined(__AMX_BF16__)
  if (has_amx()) return tile_rate(seconds);
#endif
#if defined(__AVX512BF16__)
  return best_rate(4.0 * W * kSums * kSteps, seconds, [](int64_t, int64_t) {
    __m512 sums[kSums];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3080);  // 1 and 2^-30
    opaque(a);
    opaque(b);
    for (int64_t i = 0; i < kSteps; ++i) {
#  pragma GCC unroll 12
      for (int k = 0; k < kSums; ++k) {
        sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)a, (__m512bh)b);
      }
    }
    for (__m512& sum : sums) opaque(sum);
  });
#else
  (void)seconds;
  return 0;
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Threads × floats, each thread's part touched first by the thread that will use it.
class Buffer {
 public:
  Buffer(int threads, int64_t floats) : floats_(floats) {
    const size_t bytes = static_cast<size_t>(threads) * floats * sizeof(float);
    data_.reset(static_cast<float*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    if (!data_) throw std::bad_alloc();
    parallel_for(threads, 1, [&](int64_t first, int64_t last) {
      std::fill(data_.get() + first * floats, data_.get() + last * floats, 1.f);
    });
  }
  float* of(int64_t thread) const { return data_.get() + thread * floats_; }

 private:
  std::unique_ptr<float, Free> data_;
  int64_t floats_;
};

constexpr int kVectors = 8;  // independent loads in flight
constexpr int64_t kStep = kVectors * W;

// How a thread walks its buffer: in pieces of `floats`, `passes` times over a piece that is the
// whole buffer (a small one), else once over each of `pieces` in turn.
struct Walk {
  Walk(int64_t bytes, int64_t piece_bytes) {
    const int64_t step = kStep * static_cast<int64_t>(sizeof(float));
    floats = std::max<int64_t>(std::min(bytes, piece_bytes) / step, 1) * kStep;
    passes = std::max<int64_t>(piece_bytes / (floats * 4), 1);
    pieces = std::max<int64_t>(bytes / (floats * 4), 1);
  }
  int64_t total() const { return floats * pieces; }
  int64_t offset(int64_t number) const { return number % pieces * floats; }

  int64_t floats, passes, pieces;
};

double read_rate(int64_t bytes, double seconds) {
  const int threads = num_threads();
  const Walk walk(bytes / threads, kPieceBytes);
  const Buffer buffer(threads, walk.total());
  return best_rate(4.0 * walk.floats * walk.passes, seconds, [&](int64_t thread, int64_t number) {
    const float* p = buffer.of(thread) + walk.offset(number);
    vf sums[kVectors] = {};
    for (int64_t pass = 0; pass < walk.passes; ++pass) {
      for (int64_t i = 0; i < walk.floats; i += kStep) {
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) sums[k] += load(p + i + k * W);
      }
    }
    for (vf& sum : sums) opaque(sum);
  });
}

double copy_rate(int64_t bytes, double seconds) {
  const int threads = num_threads();
  const Walk walk(bytes / 2 / threads, kPieceBytes / 2);
  const Buffer from(threads, walk.total()), to(threads, walk.total());
  const auto rate = [&](auto write) {
    const double work = 8.0 * walk.floats * walk.passes;
    return best_rate(work, seconds / 2, [&](int64_t thread, int64_t number) {
      const float* p = from.of(thread) + walk.offset(number);
      float* q = to.of(thread) + walk.offset(number);
      for (int64_t pass = 0; pass < walk.passes; ++pass) {
        for (int64_t i = 0; i < walk.floats; i += kStep) {
#pragma GCC unroll 8
          for (int k = 0; k < kVectors; ++k) write(q + i + k * W, load(p + i + k * W));
        }
        __asm__ volatile("" ::: "memory");  // each pass counts
      }
      end_past();
    });
  };
  // Around the caches is the faster way for buffers that don't fit them, through them for others.
  return std::max(rate([](float* q, vf x) { store(q, x); }),
                  rate([](float* q, vf x) { store_past(q, x); }));
}

}  // namespace

void ceilings(const CeilingParams& p) {
  switch (p.what) {
    case Ceiling::fma: *p.rate = fma_rate(p.seconds); break;
    case Ceiling::dot: *p.rate = dot_rate(p.seconds); break;
    case Ceiling::read: *p.rate = read_rate(p.bytes, p.seconds); break;
    case Ceiling::copy: *p.rate = copy_rate(p.bytes, p.seconds); break;
  }
}

}  // namespace ft::FT_ISA
