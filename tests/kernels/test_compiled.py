"""What a GPU would compile for tests, `sanitize` and tuning compiles; and its faults are found."""

import json

import pytest
from processes import ROOT, python

from benchmarks import compiled, ptx, resources

COMMITTED = ROOT / "benchmarks" / "results" / "compiled_sm90.json"


@pytest.mark.slow
def test_all_kinds_of_launches_compile(tmp_path):
    """One of each kernel, configuration and types; the committed file has them all."""
    out = tmp_path / "compiled.json"
    ran = python("-m", "benchmarks.compiled", "--quick", "--arch", 90, "--jobs", 2, "--out", out)
    assert out.exists(), ran.stderr
    found, committed = json.loads(out.read_text()), json.loads(COMMITTED.read_text())
    assert found["problems"] == []
    assert ran.returncode == 0
    kinds = ("tests", "sanitize", "tune")  # what is drawn at random may be other examples
    assert {kind: found["counts"][kind] for kind in kinds} == {
        kind: committed["counts"][kind] for kind in kinds
    }, f"other launches than when it was made: run {compiled.__doc__.splitlines()[3]}"
    assert committed["problems"] == []
    assert committed["compiled"] == sum(committed["counts"]["all"].values())


KEYS = """
import torch, triton
from triton.backends.compiler import GPUTarget
from benchmarks import compiled, launches
from pointrend_triton.kernels import launch
from pointrend_triton.workloads import WORKLOADS

class Driver:
    get_current_device = get_current_stream = lambda self, device=None: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

recorder = launches.Recorder(90)
with recorder.collecting("tests", ""), launch.recording() as made:
    WORKLOADS["rows"](torch.device("meta"), torch.bfloat16)
for one in made:
    recorder.add(one, "tests", "")
for one in recorder.found.values():
    compiled.compile_one(one, 90, launcher=False)
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
triton.runtime.driver.set_active(Driver())
for one in made:
    config = one.kernel.configs(one.constants)[0]
    keywords = one.constants | config.all_kwargs() | one.kernel.options
    one.kernel.function.warmup(*one.arguments, grid=(1,), **keywords)
print(hits)
"""


@pytest.mark.slow
def test_a_launch_finds_it_in_the_cache():
    """By the way that Triton itself goes, with a driver that only says which GPU there is."""
    ran = python("-c", KEYS)
    assert ran.stdout.splitlines()[-1:] == ["[True, True]"], ran.stdout + ran.stderr


UNSEEN = """
import torch
from benchmarks import compiled, launches, ptx
from pointrend_triton.kernels import decode, point_head, uncertainty

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

recorder = launches.Recorder(90)
with recorder.collecting("tests", ""):
    maps = empty(1, 32, 8, 8), empty(1, 19, 4, 4), empty(1, 64, 2)
    # small: with more hidden layers, barriers of the dots stand in for some that are missing
    weights, biases = [empty(32, 51), empty(3, 32)], [empty(32), empty(3)]
    packed = point_head.pack(
        weights, biases, fine_channels=32, classes=19, coarse_each_layer=False, dtype=torch.bfloat16
    )
    point_head.forward(*maps, packed, save=False)
    logits, saved = point_head.forward(*maps, packed, save=True)
    point_head.mlp_backward(logits, saved, packed)
    decode.decode(maps[1], (7, 7))
    uncertainty.sampled(maps[1], maps[2], kind="top2_margin")
    uncertainty.upsample(maps[1], 2, kind="top2_margin", return_logits=True, return_labels=True)
names = []
for one in recorder.found.values():
    if one.kernel in ptx.READ_BACK or one.kernel in ptx.KEEPS_NAN:
        names.append(one.kernel)
        if problem := compiled.compile_one(one, 90, launcher=False)["problem"]:
            print(one.kernel, problem)
print(*sorted(names))
"""


@pytest.mark.slow
def test_what_the_interpreter_cannot_see():
    """Barriers and NaN, in the kernels that depend on them: one of each kind, soon."""
    ran = python("-c", UNSEEN)
    assert ran.stdout.splitlines() == [
        "decode.resample point_head.dgrad point_head.forward point_head.forward "
        "uncertainty.double uncertainty.sampled"
    ], ran.stdout + ran.stderr


def compile_of(kernel, **changes):
    parts = {"config": "X=1", "signature": {}, "constants": {}, "attributes": {}, "options": {}}
    return compiled.Compile(**(parts | {"kernel": kernel, "places": {"tests": "here"}} | changes))


def test_faults_are_reported(monkeypatch, tmp_path, capsys):
    rows = [compile_of(name) for name in ("sound", "spills", "dies")]
    good = {"problem": "", "cached": True, "cpu_seconds": 2.0}
    results = [good, {**good, "problem": "spills 8 bytes", "cached": False}, "ValueError: no"]

    def in_processes(function, tasks, jobs, limit):
        return ((task, result) for task, result in zip(tasks or [()], results, strict=False))

    monkeypatch.setattr(compiled, "recorded", lambda arch: rows)
    monkeypatch.setattr(resources, "in_processes", in_processes)
    out = tmp_path / "folder" / "compiled.json"
    assert compiled.main(["--arch", "80", "--out", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "spills, X=1 (here): spills 8 bytes",
        "dies, X=1 (here): ValueError: no",
        "sm_80: 3 of 3 compiled, 1 of them in the cache, 4 CPU seconds, 2 with a problem",
    ]
    content = json.loads(out.read_text())
    assert (content["arch"], content["compiled"], content["from_cache"]) == (80, 3, 1)
    assert [row["kernel"] for row in content["problems"]] == ["spills", "dies"]
    assert content["counts"]["tests"] == {"dies": 1, "sound": 1, "spills": 1}


@pytest.mark.parametrize("here, expected", [(90, [False, True, True]), (None, [False] * 3)])
def test_what_calls_kernels_is_made_once_and_on_a_gpu(monkeypatch, here, expected):
    signatures = [{"x": "*fp32", "n": "i32"}, {"x": "*bf16", "n": "i32"}, {"x": "*fp32"}]
    made = []
    monkeypatch.setattr(compiled, "architecture", lambda: here)
    monkeypatch.setattr(resources, "in_processes", lambda _, tasks, *how: made.extend(tasks) or [])
    compiled.report([compile_of("a", signature=one) for one in signatures], 90, 1, 60)
    assert [launcher for _, _, launcher in made] == expected


def test_few():
    pointers = [{"x": kind, "n": "i32"} for kind in ("*fp32", "*fp32", "*bf16")]
    rows = [compile_of("a", signature=signature) for signature in pointers]
    rows += [compile_of("a", config="X=2", signature=pointers[0]), rows[0]]
    assert compiled.few(rows) == [rows[0], rows[2], rows[3]]


def test_parameters():
    """What is compiled in is none; a tuple is as many as it has parts."""
    signature = {
        "x": "*fp32",
        "n": "constexpr",
        "ws": ("*fp32", "*fp32"),
        "s": ("constexpr", "i32"),
    }
    one = compile_of("a", signature=signature, constants={(1,): 1, (3, 0): 16})
    assert one.parameters == ["x", "ws", "ws", "s"]
    assert one.known["n"] == 1


def kernel(body):
    """PTX that makes %rd4 an address in `scratch`, %rd5 one in `weights`."""
    return f"""
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .u64 .ptr .global .align 1 _kernel_param_1,
	.param .u64 _kernel_param_2,
	.param .u64 .ptr .global .align 1 _kernel_param_3
)
.reqntid 128
{{
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b64 	%rd2, [_kernel_param_1];
	ld.param.b64 	%rd3, [_kernel_param_2];
	mad.wide.s32 	%rd4, %r9, 4, %rd1; // rows
	add.s64 	%rd6, %rd2, %rd3;
	mov.b64 	%rd5, %rd6;
{body}
	ret;
}}
	.section	.debug_info
"""


READ = "@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd4 + 0 ];"
COPY = "cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 16 ], 0x10;"
WRITE = "@%p1 st.global.b32 [ %rd4 + 0 ], { %r1 };"
WEIGHTS = "ld.global.nc.b32 %r3, [%rd5];"
MEET = "bar.sync 	0;"
RAW = "reads scratch with no barrier after a write"
WAR = "writes scratch with no barrier after a read"


@pytest.mark.parametrize(
    "body, expected",
    [
        ([WRITE, MEET, READ, WEIGHTS], []),
        ([WRITE, WEIGHTS, READ], [RAW]),
        ([WRITE, COPY], [RAW]),
        ([READ, WRITE], [WAR]),
        ([READ, MEET, WRITE], []),
        ([WRITE, "bar.warp.sync -1;", READ], [RAW]),
        ([WRITE, "bar.sync 1, 64;", READ], [RAW]),
        ([WRITE, "barrier.cta.sync.aligned 0;", READ], []),
        # around a loop
        (["$L1:", READ, MEET, WRITE, "@%p2 bra $L1;"], [RAW]),
        (["$L1:", READ, MEET, WRITE, MEET, "@%p2 bra $L1;"], []),
        (["$L1:", MEET, READ, "@%p2 bra $L1;", MEET, WRITE, "bra.uni $L1;"], []),
        (["$L1:", READ, "@%p2 bra $L2;", MEET, "$L2:", WRITE, MEET, "@%p3 bra $L1;"], [WAR]),
        # past a barrier, and where no way leads
        ([WRITE, "@%p2 bra $L1;", MEET, "$L1:", READ], [RAW]),
        ([READ, MEET, WRITE, "bra.uni $L1;", READ, "$L1:"], []),
        ([WRITE, MEET, READ.replace("global", "global.nc")], ["ld.global.nc.v2.b32 of scratch"]),
        ([WRITE, MEET, COPY.replace("async.cg", "async.bulk")], ["cp.async.bulk.shared.global of"]),
        ([WRITE], ["cannot be followed"]),
        # what was loaded is no address of `scratch`; one that went through shared memory may be
        ([WRITE, MEET, READ, "ld.global.b32 %r9, [%rd5];"], []),
        ([WRITE, MEET, READ, "atom.global.exch.b32 %r9, [%rd5], %r2;"], []),
        ([WRITE, MEET, READ, "ld.shared.b64 %rd7, [%r8];", "ld.global.b32 %r1, [%rd7];"], ["cann"]),
    ],
)  # fmt: skip
def test_order_in_memory(body, expected):
    for name in ("point_head.forward", "another"):
        text, parameters = kernel("\n".join(body)), ["scratch", "weights", "step"]
        found = ptx.problems(name, text, parameters, {"LAYERS": 1})
        if name == "another":  # writes after reads are its own affair, what cannot be followed too
            expected = [line for line in expected if line != WAR and "cann" not in line]
        assert len(found) == len(expected)
        assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_without_hidden_layers_nothing_is_read_back():
    assert ptx.problems("point_head.dgrad", kernel(WRITE), ["gradients"] * 2, {"LAYERS": 0}) == []


@pytest.mark.parametrize(
    "name, constants, wants",
    [
        ("uncertainty.sampled", {}, True),
        ("uncertainty.sampled", {"C": 16}, False),  # in two tiles
        ("uncertainty.double", {"LABELS": False}, True),
        ("uncertainty.double", {"LABELS": False, "MARGIN": False}, False),
        ("decode.resample", {"SCORES": False}, True),
        ("decode.resample", {"SCORES": False, "LABELS": False}, False),
        ("augment.augment", {}, False),
    ],
)
def test_nan_is_kept(name, constants, wants):
    constants = {"C": 19, "CLASSES": 8, "LABELS": True, "MARGIN": True, "SCORES": True} | constants
    drops, keeps = (kernel(f"{opcode}.f32 %r1, %r2, %r3;") for opcode in ("max", "max.NaN"))
    assert ptx.problems(name, drops, [], constants) == ["drops NaN: there is no max.NaN"] * wants
    assert ptx.problems(name, keeps, [], constants) == []
