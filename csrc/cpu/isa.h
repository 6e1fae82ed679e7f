// Which instruction set the CPU kernels of this process use. Every file of csrc/cpu that holds
// kernels is compiled once per set, into namespace ft::<set>; ft::name() picks by the CPU's own
// features. The environment variable FASTTRANSFORMER_CPU_ISA hides every set above the one it
// names. `amx` has no files of its own: the kernels for avx512_bf16 that multiply matrices ask for
// it (cpu/amx.h).
#pragma once

namespace ft {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

Isa isa();
const char* isa_name(Isa);
Isa best_isa();                  // the highest set that this CPU has and that isn't hidden
bool set_isa(const char* name);  // false: unknown, hidden, or this CPU lacks it

}  // namespace ft

#if defined(__x86_64__)
#  define FT_DECLARE_CPU_KERNEL(name, Params)               \
    namespace ft {                                          \
    namespace portable { void name(const Params&); }        \
    namespace avx2 { void name(const Params&); }            \
    namespace avx512 { void name(const Params&); }          \
    namespace avx512_bf16 { void name(const Params&); }     \
    inline void name(const Params& p) {                     \
      switch (isa()) {                                      \
        case Isa::amx:                                      \
        case Isa::avx512_bf16: return avx512_bf16::name(p); \
        case Isa::avx512: return avx512::name(p);           \
        case Isa::avx2: return avx2::name(p);               \
        default: return portable::name(p);                  \
      }                                                     \
    }                                                       \
    }
#else
#  define FT_DECLARE_CPU_KERNEL(name, Params)                \
    namespace ft {                                           \
    namespace portable { void name(const Params&); }         \
    inline void name(const Params& p) { portable::name(p); } \
    }
#endif
