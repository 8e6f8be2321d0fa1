"""The mutants that the proof finds in a kernel: which, how each changes the text, and what it leaves out.

No kernel here; the proof itself is `python tests/mutate_kernels.py` (docs/testing.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import mutate_kernels as mutate
import pytest
from kernel_mutants import find_mutants
from mutant_switches import write_switches

ROOT = Path(__file__).resolve().parents[1]

KERNEL = """\
#include "cuda/vec.cuh"  // a < b
#define BLOCKS(n) ((n) < 1 ? 1 : (n))
constexpr int kSmall = sizeof(T) < 4 ? 1 : 2;
static_assert(kSmall <= 2);
/* __syncthreads(); i < n */
struct Args {
  T gamma;
  int rows;
  bool is_last(int row) const {
    return row + 1 == rows;
  }
};
template <typename T, int kWidth = kVectorWidth<T>>
__device__ T total(const Args<T>& args, const T* values, int n) {
  RNX_SHARED(double, shared, kWarps);
  T sum = T(0);
  for (int i = threadIdx.x; i < n; ++i) {
    const T value = values[i];
    if (value < T(0) || args.gamma > 0.5f || n > args.rows) sum += value;
  }
  const int vectors = (n + kWidth<T> - 1) / kWidth<T>;
  const int rest = n < kWidth ? n : kWidth;
  static_assert(kWidth >= 1);
  if constexpr (kWidth > 4) sum += values[vectors];
  if (kTask == Task::kSum || values != nullptr || (n & 1) != 0) sum += static_cast<T>(rest);
  __syncthreads();  // every sum is there
  const bool any = __syncthreads_or(sum != T(0)) != 0;
  const int blocks = std::min(rest, 8);
  return any ? sum - T(1) : "a < b"[blocks];
}
inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
"""

FILE = "csrc/sample/sample_kernel.cuh"


@pytest.fixture(scope="module")
def found():
    return find_mutants(FILE, KERNEL, called_names=set())


def test_every_barrier_and_bound_is_found(found):
    changes = [(m.kind, m.function, m.line, m.becomes) for m in found[0]]
    loop = "for (int i = threadIdx.x; i < n; ++i) {"
    predicate = "if (value < T(0) || args.gamma > 0.5f || n > args.rows) sum += value;"
    vectors = "const int vectors = (n + kWidth<T> - 1) / kWidth<T>;"
    rest = "const int rest = n < kWidth ? n : kWidth;"
    vote = "const bool any = __syncthreads_or(sum != T(0)) != 0;"
    size = "RNX_SHARED(double, shared, kWarps);"
    blocks = "const int blocks = std::min(rest, 8);"
    assert changes == [
        ("size", "total", size, size.replace("kWarps", "-1 + kWarps")),
        ("start", "total", loop, loop.replace("= threadIdx.x", "= 1 + threadIdx.x")),
        ("start", "total", loop, loop.replace("= threadIdx.x", "= -1 + threadIdx.x")),
        ("comparison", "total", loop, loop.replace("i < n", "i <= n")),
        ("comparison", "total", loop, loop.replace("i < n", "i < -1 + n")),
        ("comparison", "total", predicate, predicate.replace("n > args", "n >= args")),
        ("comparison", "total", predicate, predicate.replace("n > args", "n > 1 + args")),
        ("literal", "total", vectors, vectors.replace("- 1", "- 2")),
        ("literal", "total", vectors, vectors.replace("- 1", "- 0")),
        ("comparison", "total", rest, rest.replace("n < kWidth", "n < -1 + kWidth")),
        ("barrier", "total", "__syncthreads();", ";"),
        ("barrier", "total", vote, "const bool any = int((sum != T(0)) != 0) != 0;"),
        ("minmax", "total", blocks, "const int blocks = (1 + std::min(rest, 8));"),
        ("minmax", "total", blocks, "const int blocks = (-1 + std::min(rest, 8));"),
    ]


def test_what_is_left_out_is_listed_with_its_reason(found):
    assert [(e.line_number, e.sign, e.reason.split(":")[0]) for e in found[1]] == [
        (3, "<", "not in a function"),
        (4, "<=", "not in a function"),
        (10, "==", "is_last is host code that no kernel and no emulator module calls"),
        (19, "<", "floating point"),
        (19, ">", "floating point"),
        (22, "<", "minimum or maximum"),
        (23, ">=", "decided at compile time"),
        (24, ">", "decided at compile time"),
        (25, "==", "an enumerator"),
        (25, "!=", "asks whether, not how far"),
        (25, "!=", "asks whether, not how far"),
        (27, "!=", "floating point"),
        (27, "!=", "asks whether, not how far"),
        (32, "==", "is_aligned is host code that no kernel and no emulator module calls"),
    ]


def test_host_code_that_is_called_is_mutated():
    mutants, _ = find_mutants(FILE, KERNEL, called_names={"is_last"})
    assert [m.becomes for m in mutants if m.function == "is_last"] == [
        "return row + 1 == 1 + rows;",
        "return row + 1 == -1 + rows;",
    ]


def test_a_mutant_changes_its_own_place_alone(found):
    for mutant in found[0]:
        before, after = KERNEL.splitlines(), mutant.apply(KERNEL).splitlines()
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert changed == [mutant.line_number - 1]
        assert " ".join(after[changed[0]].split("//")[0].split()) == mutant.becomes


def test_a_mutants_name_survives_other_changes_of_the_file(found):
    moved = KERNEL.replace("  T sum", "  const int extra = 0;\n  T sum").replace("// every sum is there", "// all")
    assert [m.key for m in find_mutants(FILE, moved, set())[0]] == [m.key for m in found[0]]
    assert len({m.key for m in found[0]}) == len(found[0])
    twice = KERNEL.replace("  __syncthreads();  // every sum is there\n", "  __syncthreads();\n" * 2)
    barriers = [m for m in find_mutants(FILE, twice, set())[0] if m.line == "__syncthreads();"]
    assert [m.occurrence for m in barriers] == [1, 2]


@pytest.mark.parametrize("layout", ["i<n", "i <n", "i< n", "i\n < n"])
def test_a_comparison_in_another_layout_is_not_mistaken_for_a_template(layout):
    source = f"__device__ int f(int i, int n) {{ return g<int, 4>(i) && {layout} && h<S<int>>(n); }}"
    assert len(find_mutants(FILE, source)[0]) == 2


def test_a_product_is_not_mistaken_for_a_pointer_to_a_floating_type():
    source = "__device__ bool f(int half, int lanes, int i) { g(half * lanes); return i < lanes; }"
    assert len(find_mutants(FILE, source)[0]) == 2


def test_unbalanced_text_is_refused():
    with pytest.raises(ValueError, match=r"sample_kernel.cuh:2: '\)' closes nothing"):
        find_mutants(FILE, "void f() {\n)\n}")


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests")
def test_every_kernel_of_the_project_is_read():
    modules = mutate.find_modules(ROOT)
    mutants, _ = mutate.find_all(ROOT, modules)
    for path in ROOT.glob("csrc/*/*_kernel.cuh"):
        file = path.relative_to(ROOT).as_posix()
        assert any(m.file == file for m in mutants)
        assert mutate.modules_of(file, modules), f"no emulator module includes {file}"
    assert all(module.tests for module in modules)
    barriers = sum(
        path.read_text().count(name)
        for path in {ROOT / m.file for m in mutants}
        for name in ("__syncthreads();", "__syncwarp(", "__syncthreads_or(")
    )
    assert sum(m.kind == "barrier" for m in mutants) == barriers
    assert len({m.key for m in mutants}) == len(mutants)


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests")
def test_every_exception_names_a_mutant_and_its_reason():
    mutants, _ = mutate.find_all(ROOT, mutate.find_modules(ROOT))
    exceptions = mutate.read_exceptions()
    assert set(exceptions) <= {m.key for m in mutants}
    assert all(len(reason) > 20 for reason in exceptions.values())


SWITCHED = r"""#include <algorithm>
#include <cstdio>
#include <cstdlib>
#define __syncthreads() std::printf("barrier ")
#define __syncthreads_or(vote) (std::printf("vote %d ", int(vote)), 1)
#define RNX_SHARED(type, name, count) const int name = count
void f(int n, unsigned m, long k) {
  RNX_SHARED(double, shared, n);
  for (int i = 1; i < n && i <= 3; ++i) std::printf("%d,", i);
  for (unsigned i = m; i > 2u; --i) std::printf("%u,", i);
  __syncthreads();
  const int vote = __syncthreads_or(n >= k) != 0;
  std::printf("%d %d %d %ld %d %u\n", shared, vote, n == 4, (k + 3u) / 2 - 1, k != n, m > 4 ? m : 4);
}
void g(long n) {
  std::printf("%ld %ld\n", std::min(n, 8L) + 1, n < 8 ? n : 8);
}
int main() {
  f(4, 4, 4);
  f(3, 5, 5);
  f(5, 2, 4);
  f(2, 3, 3);
  g(7);
  g(8);
  g(9);
}
"""


def test_a_chosen_mutant_does_what_it_does_alone(tmp_path):
    """Compiled by itself and among all the others: what the program prints is the same, and another for each."""
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        pytest.skip("a C++ compiler builds the mutants and was not found")

    def build(name, text, *flags):
        (tmp_path / f"{name}.cpp").write_text(text)
        command = [cxx, "-std=c++17", "-w", *flags, str(tmp_path / f"{name}.cpp"), "-o", str(tmp_path / name)]
        subprocess.run(command, check=True)
        return lambda number: subprocess.check_output(
            [tmp_path / name], env={**os.environ, "RETINANET_EXT_MUTANT": str(number)}, text=True
        )

    mutants = find_mutants("f.cuh", SWITCHED)[0]
    assert {m.kind for m in mutants} == {"barrier", "comparison", "minmax", "start", "literal", "size"}
    text = write_switches(SWITCHED, {m: i for i, m in enumerate(mutants, 1)})
    assert text.count("\n") == SWITCHED.count("\n")
    header = ["-include", str(ROOT / "tests/emulator/mutants.h"), f"-DRETINANET_EXT_MUTANTS={len(mutants)}"]
    among_all = build("all", text, *header)
    unchanged = build("unchanged", SWITCHED)(0)
    assert among_all(0) == unchanged
    for number, mutant in enumerate(mutants, 1):
        alone = build("alone", mutant.apply(SWITCHED))(0)
        assert among_all(number) == alone, mutant
        assert alone != unchanged, mutant
