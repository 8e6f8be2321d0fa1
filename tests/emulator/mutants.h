// Every mutant of the kernels in one build, of which the environment chooses one (RETINANET_EXT_MUTANT, its number).
//
// Notes which of them the program passes. tests/mutant_switches.py writes these names into the kernels, as in
//
//   i < mutants::at(7, 8) < n          i < n, or as mutant 7: i <= n, or as mutant 8: i < -1 + n
//   mutants::shift(9, 10) + first      first, or 1 + first, or -1 + first
//   mutants::is(11) ? (void)0 : (void)__syncthreads()
#pragma once

#include <cstdlib>

// By number (RETINANET_EXT_MUTANTS of them): whether the mutant's place has been reached, chosen or not.
extern "C" {
__attribute__((visibility("default"))) unsigned char rnx_reached_mutants[RETINANET_EXT_MUTANTS + 1] = {};
}

namespace mutants {

inline const int chosen = [] {
  const char* number = std::getenv("RETINANET_EXT_MUTANT");
  return number == nullptr ? 0 : std::atoi(number);
}();

// -1: no mutant.
inline void reach(int number) {
  if (number > 0) rnx_reached_mutants[number] = 1;
}

inline bool is(int number) {
  reach(number);
  return chosen == number;
}

inline int shift(int up, int down) {
  return is(up) - is(down);
}

// Stands between the operands of a comparison, with the numbers of its two mutants.
struct At {
  int first;
  int second;
};

inline At at(int first, int second) {
  return {first, second};
}

template <typename Left>
struct Compared {
  Left left;
  At at;
};

#define RNX_MUTANT_COMPARISON(sign, first_sign, first_shift, second_sign, second_shift) \
  template <typename Left>                                                              \
  Compared<Left> operator sign(Left left, At at) {                                      \
    return {left, at};                                                                  \
  }                                                                                     \
  template <typename Left, typename Right>                                              \
  bool operator sign(Compared<Left> compared, Right right) {                            \
    if (is(compared.at.first)) return compared.left first_sign first_shift right;       \
    if (is(compared.at.second)) return compared.left second_sign second_shift right;    \
    return compared.left sign right;                                                    \
  }

// The two changes of kernel_mutants.SHIFTS.
RNX_MUTANT_COMPARISON(<, <=, , <, -1 +)
RNX_MUTANT_COMPARISON(<=, <, , <=, 1 +)
RNX_MUTANT_COMPARISON(>, >=, , >, 1 +)
RNX_MUTANT_COMPARISON(>=, >, , >=, -1 +)
RNX_MUTANT_COMPARISON(==, ==, 1 +, ==, -1 +)
RNX_MUTANT_COMPARISON(!=, !=, 1 +, !=, -1 +)

#undef RNX_MUTANT_COMPARISON

}  // namespace mutants
