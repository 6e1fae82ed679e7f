#pragma once
#include "params/common.h"

namespace ft {

// What this machine can do at best with this instruction set and torch's current number of
// threads: the best rate seen within `seconds`. Not an operation: benchmarks measure against it.
enum class Ceiling : int32_t { fma, dot, read, copy };

struct CeilingParams {
  Ceiling what = Ceiling::fma;
  int64_t bytes = 0;       // read: size of the buffer; copy: source and destination together
  double seconds = 0.1;    // how long to look for the best
  double* rate = nullptr;  // out: flop/s or byte/s (copy counts what is read and written); 0: none
};

}  // namespace ft

FT_DECLARE_KERNEL(ceilings, CeilingParams)
