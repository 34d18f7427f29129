"""Every launch of tests/kernels/launches_*.py compiles for the GPUs it is meant for, without spills, within shared memory
and with the instructions it needs. All of them in one process, since this one interprets."""

import pytest
from compiling import LAUNCHES, assert_sound, compile_all, needs_tools

from stgen.testing.compiled import Launch, Report, count_opcodes, dry_launch, faults, load_launches, spill_bytes
from stgen.testing.interpreter import interpreting

QUICK = [p for p in LAUNCHES if load_launches(p.values[0])[p.values[1]].quick]

FAULTY = """
import torch, triton
import triton.language as tl
from stgen.testing.compiled import Launch

@triton.jit
def narrow(X, Y, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i * stride))

@triton.jit
def grows(X, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    for _ in range(tl.program_id(0)):
        x = tl.join(x, x)
    tl.store(X + tl.arange(0, BLOCK), x)

X = torch.empty(256, dtype=torch.float16, device="meta")
LAUNCHES = {
    "narrow": Launch(lambda: narrow[(1,)](X, X, 3, 256), True, ("LDG.128",)),
    "grows": Launch(lambda: grows[(1,)](X, 256), True),
    "fine": Launch(lambda: narrow[(1,)](X, X, 1, 256), True, ("LDG.32",), ("sm_90",)),
}
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    path = tmp_path_factory.mktemp("faulty") / "launches_faulty.py"
    path.write_text(FAULTY)
    return str(path)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, faulty):
    return compile_all(tmp_path_factory.mktemp("quick"), faulty, "--quick")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def quick_on_blackwell(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("blackwell"), "--quick", "--target", "sm_100")


@needs_tools
@pytest.mark.parametrize(("file", "name", "target"), QUICK)
def test_quick(quick, file, name, target):
    assert_sound(quick[file, name, target])


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(("file", "name", "target"), [p for p in LAUNCHES if p not in QUICK])
def test_all(every, file, name, target):
    assert_sound(every[file, name, target])


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), sorted({p.values[:2] for p in QUICK}))
def test_quick_on_blackwell(quick_on_blackwell, file, name):
    assert_sound(quick_on_blackwell[file, name, "sm_100"])


# ------------------------------------------------------------------------------------------------ the harness


@needs_tools
@pytest.mark.parametrize(
    ("name", "target", "fault"),
    [("narrow", t, "narrow loads at most 32 bit at a time") for t in ("sm_80", "sm_90")]
    + [("grows", t, "does not compile: CompilationError") for t in ("sm_80", "sm_90")],
)
def test_faulty_launches_are_told(quick, faulty, name, target, fault):
    (told,) = quick[faulty, name, target]["faults"]
    assert told.startswith(fault)


@needs_tools
def test_reports_have_the_numbers(quick, faulty):
    (report,) = quick[faulty, "fine", "sm_90"]["reports"]
    assert report["name"] == "narrow" and report["grid"] == [1] and report["num_warps"] == 4
    assert 8 <= report["registers"] <= 40 and report["spill_bytes"] == 0
    assert report["opcodes"]["LDG"] == report["opcodes"]["LDG.32"] == 1


def report(**changes) -> Report:
    usual = {"name": "k", "target": "sm_80", "grid": (9,), "num_warps": 4, "num_stages": 2, "registers": 99}
    return Report(**usual | {"spill_bytes": 0, "shared_bytes": 1024, "opcodes": {}} | changes)


@pytest.mark.parametrize(
    ("changes", "needs", "target", "fault"),
    [
        ({}, (), "sm_80", None),
        ({"spill_bytes": 4}, (), "sm_80", "k spills 4 B per thread"),
        ({"shared_bytes": 164 * 1024}, (), "sm_80", "k has 167936 B of shared memory, sm_80 166912"),
        ({"shared_bytes": 164 * 1024}, (), "sm_90", None),
        ({"grid": (99999, 9)}, (), "sm_80", None),
        ({"grid": (9, 99999)}, (), "sm_80", "k has grid (9, 99999); axes 1 and 2 take 65535"),
        ({}, ("HMMA",), "sm_80", "no HMMA"),
        ({"opcodes": {"HMMA": 1}}, ("HGMMA",), "sm_80", None),
        ({"opcodes": {"HMMA": 1}}, ("HGMMA",), "sm_90", "no HGMMA"),
        ({"opcodes": {"HGMMA": 1}}, ("HGMMA", "HMMA"), "sm_90", None),
        ({"opcodes": {"UTCHMMA": 1}}, ("HGMMA", "HMMA"), "sm_100", None),
        ({}, ("UTMALDG",), "sm_80", None),
        ({}, ("UTMALDG",), "sm_90", "no UTMALDG"),
        ({"opcodes": {"TF32": 1}}, ("no TF32",), "sm_90", "TF32 is used"),
        ({"opcodes": {"LDG.32": 1, "LDGSTS.128": 1}}, ("LDG.128",), "sm_80", None),
        ({"opcodes": {"UTMALDG": 1}}, ("LDG.128",), "sm_90", None),
        ({"opcodes": {"LDG.64": 1}}, ("LDG.128",), "sm_80", "no kernel loads 128 bit"),
        ({"opcodes": {"LDG.32": 1}}, ("LDG.64",), "sm_80", "k loads at most 32 bit"),
    ],
)
def test_rules(changes, needs, target, fault):
    told = faults(Launch(lambda: None, needs=needs), target, [report(**changes)])
    assert told == [] if fault is None else [t for t in told if t.startswith(fault)] == told != []


def test_a_launch_that_launches_nothing_is_faulty():
    assert faults(Launch(lambda: None), "sm_80", []) == ["nothing was launched"]


def test_opcodes_are_counted_with_widths():
    code = """
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR6][R4.64] ;
        /*0030*/                   LDG.E.U16 R4, [R2.64] ;
        /*0040*/             @!UP1 STL [R1], R2 ;
        /*1050*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24 ;
    """
    counts = {"LDG": 2, "LDG.128": 1, "LDG.16": 1, "LDGSTS": 1, "LDGSTS.128": 1, "STL": 1, "STL.32": 1, "HGMMA": 1}
    assert count_opcodes(code) == counts | {"TF32": 1}
    assert spill_bytes(counts) == 4
    assert spill_bytes({"STL": 5, "STL.128": 2, "STL.64": 2, "STL.16": 1, "LDL.32": 9}) == 32 + 16 + 2


@pytest.mark.skipif(not interpreting(), reason="kernels run compiled here")
def test_an_interpreting_process_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET should not be set"), dry_launch("sm_80"):
        pass
