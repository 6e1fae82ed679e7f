// Dropout of rows: along a walk whose random words are at hand, and of a run of elements by itself.
#pragma once
#include "cpu/columns.h"
#include "cpu/philox.h"
#include "params/common.h"

namespace ft::FT_ISA {

// `dropped` of the values of a step of a walk.
template <class P>
FT_INLINE vf dropped(vf x, const uint32_t* words, P, const Dropout& d) {
  return dropped(x, words, d.threshold, d.scale);
}
FT_INLINE vf2 dropped(vf2 x, const uint32_t* words, Pair, const Dropout& d) {
  uint32_t lane[2 * W];
  for (int i = 0; i < W; ++i) {
    lane[i] = words[2 * i];
    lane[W + i] = words[2 * i + 1];
  }
  return {dropped(x.even, lane, d.threshold, d.scale),
          dropped(x.odd, lane + W, d.threshold, d.scale)};
}

// Elements whose random words are made at a time; they and the elements stay in L1.
constexpr int64_t kDropoutRun = 512;

// out = dropout(x) of n ≤ kDropoutRun elements, the first at `position`; in place, too.
template <class T>
void drop(const T* x, int64_t n, uint64_t position, const Dropout& d, T* out) {
  uint32_t buffer[random_words_room(kDropoutRun)];
  const uint32_t* words = random_words(d.seed, position, n, buffer);
  over_columns<2, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    store(out + j, dropped(load(x + j, part), words + j, part, d), part);
  });
}

}  // namespace ft::FT_ISA
