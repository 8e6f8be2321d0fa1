"""Machine code of the CUDA kernels: registers, spills, access widths and special functions against their budgets.

The reader itself is tested on a kernel written down here, so that it is tested where no CUDA part was built too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sass
import sass_code

sys.path.pop(0)

# A loop over tiles of one vector of two elements: background in straight-line code from 0x60, with a whole store at
# 0xd0 and a partial one at 0xf0; other rows element by element from 0x120.
NAME = "_ZN13retinanet_ext18focal_index_kernelINS_8BFloat16ELNS_9FocalTaskE1ELNS_5GammaE0ELb0EEEvNS_4ArgsIfEE"
CODE = f"""
	code for sm_90
		Function : {NAME}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   ISETP.GE.AND P0, PT, R0, UR4, PT ;         /* 0x0000000400007c0c */
                                                                              /* 0x000fc8000bf06270 */
        /*0020*/               @P0 EXIT ;
        /*0030*/              @!P1 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0040*/                   BSSY B0, 0x1c0 ;
        /*0050*/               @P2 BRA 0x120 ;
        /*0060*/                   MUFU.EX2 R8, R4 ;
        /*0070*/                   MUFU.EX2 R9, R5 ;
        /*0080*/                   FADD R10, R8, 1 ;
        /*0090*/                   FADD R11, R9.reuse, 1 ;
        /*00a0*/                   FMUL R12, R10, R11 ;
        /*00b0*/                   MUFU.RCP R12, R12 ;
        /*00c0*/              @!P3 BRA 0xf0 ;
        /*00d0*/                   STG.E.EF.128 desc[UR6][R2.64], R8 ;
        /*00e0*/                   BRA 0x1b0 ;
        /*00f0*/               @P4 STG.E desc[UR6][R2.64], R8 ;
        /*0100*/               @P5 STG.E.U16 desc[UR6][R2.64+0x4], R9 ;
        /*0110*/                   BRA 0x1b0 ;
        /*0120*/                   LDG.E.64 R14, desc[UR6][R12.64] ;
        /*0130*/                   MUFU.EX2 R8, R4 ;
        /*0140*/                   MUFU.RCP R9, R8 ;
        /*0150*/                   MUFU.LG2 R10, R9 ;
        /*0160*/                   STG.E desc[UR6][R2.64], R10 ;
        /*0170*/                   ISETP.NE.AND P6, PT, R16, RZ, PT ;
        /*0180*/               @P6 BRA P0, 0x120 ;
        /*0190*/                   BRA.DIV UR8, 0x1e0 ;
        /*01a0*/                   IMAD.MOV.U32 R3, RZ, RZ, R2 ;
        /*01b0*/                   BSYNC B0 ;
        /*01c0*/                   ISETP.LT.AND P0, PT, R0, UR5, PT ;
        /*01d0*/               @P0 BRA 0x30 ;
        /*01e0*/                   EXIT ;
        /*01f0*/                   BRA 0x1f0;
        /*0200*/                   NOP;
"""
FAST_PATH = {"vectors": 1, "width": 2, "loads": {"128": 1}, "stores": {"128": 1}, "mufu": {"EX2": 1, "RCP": 0.5}}
LIMITS = {"kernel": "focal_index_kernel<BFloat16, *>", "registers": 64, "fast_path": FAST_PATH}


def kernel_of(text=CODE, **changes):
    ((_, instructions),) = sass_code.read_sass(text).items()
    kernel = sass_code.Kernel(sass_code.readable_name(NAME), "sm_90", "13.0", 64, 0, 0, 0, instructions)
    return replace(kernel, **changes)


def failures_of(kernel, limits=LIMITS):
    return sass.resource_failures(kernel, limits) + sass.fast_path_failures(kernel, limits)


def test_reads_instructions():
    code = kernel_of().instructions
    assert [one.address for one in code] == list(range(0, 0x210, 0x10))
    assert (code[0].predicate, code[0].opcode, code[0].operands) == ("", "LDC", "R1, c[0x0][0x28]")
    assert (code[3].predicate, code[3].opcode, code[3].base, code[3].bits) == ("!P1", "LDG.E.128", "LDG", 128)
    assert [one.target for one in code if one.base == "BRA"] == [0x120, 0xF0, 0x1B0, 0x1B0, 0x120, 0x1E0, 0x30, 0x1F0]
    assert sass_code.loads(code) == {"128": 1, "64": 1}
    assert sass_code.stores(code) == {"128": 1, "32": 2, "16": 1}
    assert sass_code.special_functions(code) == {"EX2": 3, "RCP": 2, "LG2": 1}
    assert (sass_code.float_operations(code), sass_code.spills(code)) == (3, 0)


def test_readable_names():
    assert sass_code.readable_name(NAME) == "focal_index_kernel<BFloat16, kSum, kTwo, false>"
    assert (
        sass_code.readable_name("_ZN13retinanet_ext20count_ignored_kernelIlEEvPKT_llPy") == "count_ignored_kernel<long>"
    )
    assert sass_code.readable_name("_ZN13retinanet_ext12_GLOBAL__N_15stageEPf") == "stage"


def test_control_flow():
    blocks, successors = sass_code.basic_blocks(kernel_of().instructions)
    number = {block[0].address: index for index, block in enumerate(blocks)}
    flow = {start: [blocks[to][0].address for to in successors[index]] for start, index in number.items()}
    assert flow == {
        0x00: [0x30],  # a predicated EXIT goes on
        0x30: [0x120, 0x60],
        0x60: [0xF0, 0xD0],
        0xD0: [0x1B0],
        0xF0: [0x1B0],
        0x120: [0x120, 0x190],
        0x190: [0x1E0, 0x1A0],  # BRA.DIV is taken by warps that have diverged
        0x1A0: [0x1B0],
        0x1B0: [0x1C0],
        0x1C0: [0x30, 0x1E0],
        0x1E0: [],
        0x1F0: [0x1F0],
        0x200: [],
    }
    order, back = sass_code.forward_order(successors)
    assert {(blocks[last][0].address, blocks[first][0].address) for last, first in back} == {
        (0x1C0, 0x30),
        (0x120, 0x120),
    }
    assert sorted(blocks[block][0].address for block in order) == [start for start in number if start < 0x1F0]


def test_fast_path_is_the_background_with_whole_stores():
    paths = sass_code.fast_paths(
        kernel_of().instructions, vectors=1, width=2, special="EX2", count=1, wide_loads=1, wide_stores=1
    )
    addresses = [*range(0x30, 0xF0, 0x10), 0x1B0, 0x1C0, 0x1D0]
    assert [[one.address for one in path] for path in (*paths.loops, paths.around)] == [addresses, addresses]
    assert sass.record(kernel_of(), LIMITS) == {
        "instructions": 32,
        "mufu": 6,
        "loads": {"128": 1, "64": 1},
        "stores": {"128": 1, "32": 2, "16": 1},
        "issue": [7.5],
        "float": [1.5],
        "tile": 7.5,
    }


def test_fast_path_without_a_loop():
    code = kernel_of(CODE.replace("@P0 BRA 0x30 ", "NOP ").replace("@P6 BRA P0, 0x120", "NOP")).instructions
    (path,) = sass_code.fast_paths(code, vectors=1, width=2, special="EX2", count=1, wide_loads=1, wide_stores=1).loops
    assert [one.address for one in path] == [*range(0, 0xF0, 0x10), 0x1B0, 0x1C0, 0x1D0, 0x1E0]


def test_fast_path_by_another_special_function():
    """Here the slow path's: the only block with an LG2."""
    code = kernel_of().instructions
    paths = sass_code.fast_paths(code, vectors=1, width=1, special="LG2", count=1, wide_loads=0, wide_stores=0)
    assert [[one.address for one in path] for path in paths.loops] == [list(range(0x120, 0x190, 0x10))]


def test_fast_path_by_its_wide_accesses():
    """To the number: no way around the loop has two."""
    code = kernel_of().instructions
    known = dict(vectors=1, width=2, special=None, count=0)
    paths = sass_code.fast_paths(code, **known, wide_loads=1, wide_stores=1)
    addresses = [*range(0x30, 0xF0, 0x10), 0x1B0, 0x1C0, 0x1D0]
    assert [[one.address for one in path] for path in paths.loops] == [addresses]
    assert sass_code.fast_paths(code, **known, wide_loads=2, wide_stores=1).loops == []


def test_a_loop_within_a_loop():
    """The inner loop has the fast path; the way around the outer one has the tile's overhead as well."""
    text = CODE.replace("@P0 EXIT", "NOP").replace("ISETP.LT.AND P0, PT, R0, UR5, PT", "@P1 BRA 0x30")
    code = kernel_of(text.replace("@P0 BRA 0x30 ", "@P0 BRA 0x10 ")).instructions
    paths = sass_code.fast_paths(code, vectors=1, width=2, special="EX2", count=1, wide_loads=1, wide_stores=1)
    inner = [*range(0x30, 0xF0, 0x10), 0x1B0, 0x1C0]
    assert [[one.address for one in path] for path in paths.loops] == [inner]
    assert [one.address for one in paths.around] == [0x10, 0x20, *inner, 0x1D0]


def test_kernel_within_its_budget():
    assert failures_of(kernel_of()) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("LDG.E.128 R4", "LDG.E.64 R4", "loop at 0x30: loads by bits {'64': 1}, budget {'128': 1}"),
        ("STG.E.EF.128", "STG.E.64", "loop at 0x30: stores by bits {'64': 1}, budget {'128': 1}"),
        ("FMUL R12, R10, R11", "MUFU.RCP R13, R11", "1 MUFU.RCP an element, budget 0.5"),
        ("FADD R10, R8, 1", "MUFU.EX2 R10, R4", "1.5 MUFU.EX2 an element, budget 1"),
        ("FADD R10, R8, 1", "MUFU.LG2 R10, R8", "0.5 MUFU.LG2 an element, budget 0"),
        ("FADD R10, R8, 1", "CALL.REL.NOINC 0x1e0", "loop at 0x30: CALL.REL.NOINC, budget none"),
        ("FADD R10, R8, 1", "LDG.E.U16 R10, desc[UR6][R2.64]", "loads by bits {'128': 1, '16': 1}, budget {'128': 1}"),
        ("MUFU.EX2 R9, R5", "@P3 BRA 0x1b0", "0 loops evaluate 1 vectors of 2 in straight-line code"),
        ("LDC R1, c[0x0][0x28]", "STL [R1], R4", "1 accesses to local memory (LDL, STL), budget 0"),
    ],
)
def test_regressions_are_found(before, after, message):
    assert CODE.count(before) == 1
    (failure,) = failures_of(kernel_of(CODE.replace(before, after)))
    assert message in failure


def test_resources_over_budget_are_found():
    assert "65 registers, budget 64" in failures_of(kernel_of(registers=65))[0]
    assert "8 bytes of stack, 0 of local memory, budget 0" in failures_of(kernel_of(stack=8))[0]
    assert failures_of(kernel_of(stack=8), {**LIMITS, "stack": 8}) == []


@pytest.mark.parametrize("change", [0.9, 1.1])
@pytest.mark.parametrize("name", ["instructions", "mufu", "loads", "stores", "issue", "float", "tile"])
def test_recorded_numbers_are_compared_both_ways(name, change):
    recorded = sass.record(kernel_of(), LIMITS)
    assert sass.record_failures(kernel_of(), LIMITS, recorded) == []
    other = recorded[name]
    if isinstance(other, dict):
        other = {bits: count * change for bits, count in other.items()}
    else:
        other = [number * change for number in other] if isinstance(other, list) else other * change
    (failure,) = sass.record_failures(kernel_of(), LIMITS, {**recorded, name: other})
    assert f"{name} {recorded[name]}, recorded {other}" in failure


def test_missing_and_other_records_are_found():
    recorded = sass.record(kernel_of(), LIMITS)
    assert sass.record_failures(kernel_of(), LIMITS, None) != []
    assert sass.record_failures(kernel_of(), {"registers": 64}, recorded) != []
    assert sass.record_failures(kernel_of(), LIMITS, {**recorded, "issue": [7.5, 7.5]}) != []
    assert sass.record_failures(kernel_of(), LIMITS, {**recorded, "loads": {"128": 1}}) != []


def write_budgets(root, *entries, recorded=()):
    path = root / "csrc" / "focal_loss" / "focal_loss_sass.json"
    path.parent.mkdir(parents=True)
    kernels = {name: {} for name in recorded}
    path.write_text(json.dumps({"limits": entries, "recorded": {"compiler": "13.0", "kernels": kernels}}))
    return sass.read_budgets(root)


def test_every_kernel_and_every_entry_is_used(tmp_path):
    other = kernel_of(name="box_loss_kernel<float>")
    budgets = write_budgets(tmp_path, LIMITS, {"kernel": "nms_*", "registers": 32}, recorded=["old_kernel<int>"])
    assert sass.coverage_failures([kernel_of(), other], budgets) == [
        "box_loss_kernel<float>: no entry of csrc/*/*_sass.json limits its registers",
        "focal_loss_sass.json: no kernel matches nms_*",
        "focal_loss_sass.json: records old_kernel<int>, which is no kernel of the library",
    ]


def test_written_records_are_read_back(tmp_path):
    budgets = write_budgets(tmp_path, LIMITS, recorded=["old_kernel<int>"])
    sass.write_budget(budgets[0], [kernel_of()], budgets)
    (budget,) = sass.read_budgets(tmp_path)
    assert budget.limits == [LIMITS]
    assert budget.recorded == {"compiler": "13.0", "kernels": {kernel_of().name: sass.record(kernel_of(), LIMITS)}}


@pytest.mark.parametrize("entry", [{**LIMITS, "register": 64}, {**LIMITS, "fast_path": {**FAST_PATH, "load": {}}}])
def test_unknown_keys_are_an_error(tmp_path, entry):
    with pytest.raises(ValueError, match=r"focal_loss_sass\.json: keys of"):
        write_budgets(tmp_path, entry)


def test_fast_path_that_nothing_tells_is_an_error(tmp_path):
    unknown = {**FAST_PATH, "mufu": {"RCP": 0.5}, "loads": {"64": 2}, "stores": {}}
    with pytest.raises(ValueError, match="a fast path is found by its MUFU or 128-bit accesses"):
        write_budgets(tmp_path, {**LIMITS, "fast_path": unknown})


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(sass_code.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sass_code.ToolMissing, match="cuobjdump was not found: pip install nvidia-cuda-cuobjdump"):
        sass_code.find_tools.__wrapped__()


# The library.


@pytest.fixture(scope="module")
def kernels():
    library = sass.default_library()
    if library is None:
        pytest.skip("retinanet_ext was built without CUDA")
    try:
        found = sass_code.read_library(library)
    except sass_code.ToolMissing as missing:
        pytest.skip(str(missing))
    assert found, f"cuobjdump found no kernel in {library}"
    return found


@pytest.fixture(scope="module")
def budgets():
    return sass.read_budgets()


@pytest.fixture(scope="module")
def measured_kernels(kernels, budgets):
    """Of the nvcc release that the budgets were measured with: another allocates other registers."""
    compilers = {kernel.compiler for kernel in kernels}
    measured = {budget.recorded["compiler"] for budget in budgets if budget.recorded}
    if compilers != measured:
        pytest.skip(f"budgets were measured with nvcc {', '.join(measured)}; the library is of {', '.join(compilers)}")
    return kernels


@pytest.fixture(scope="module")
def hopper_kernels(measured_kernels):
    found = [kernel for kernel in measured_kernels if kernel.architecture == sass_code.ARCHITECTURE]
    if not found:
        architectures = ", ".join(sorted({kernel.architecture for kernel in measured_kernels}))
        pytest.skip(f"the budgets are for {sass_code.ARCHITECTURE}, and the library was built for {architectures}")
    return found


def report(failures):
    if failures := list(failures):
        pytest.fail("\n".join(failures), pytrace=False)


def test_every_kernel_has_a_budget(kernels, budgets):
    report(sass.coverage_failures(kernels, budgets))


def test_registers_and_spills(hopper_kernels, budgets):
    report(one for kernel in hopper_kernels for one in sass.resource_failures(kernel, sass.limits_of(kernel, budgets)))


def test_fast_paths(hopper_kernels, budgets):
    report(one for kernel in hopper_kernels for one in sass.fast_path_failures(kernel, sass.limits_of(kernel, budgets)))


def test_recorded_counts(hopper_kernels, budgets):
    report(f"{one.path.name} has no record: python tests/sass.py --write-budget" for one in budgets if not one.recorded)
    report(
        f"{one}; `python tests/sass.py --write-budget` records what is meant"
        for budget in budgets
        for kernel in hopper_kernels
        if budget.covers(kernel)
        for one in sass.record_failures(
            kernel, sass.limits_of(kernel, budgets), budget.recorded["kernels"].get(kernel.name)
        )
    )
