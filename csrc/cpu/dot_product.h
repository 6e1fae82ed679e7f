// Whether vdpbf16ps beats widening to float on this CPU: on AMD Zen 4 and 5 it doubles the rate, on
// Intel Sapphire Rapids it runs at half of the float rate. Measured once per process.
#pragma once

namespace ft::FT_ISA {

#if defined(__AVX512BF16__)
bool bf16_dot_is_fast();
#endif

}  // namespace ft::FT_ISA
