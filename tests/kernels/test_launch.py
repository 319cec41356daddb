"""Which configuration runs, without a GPU: CUDA and the clock are played by `fake_gpu`."""

import json
import warnings

import pytest
import torch
import triton
from fake_gpu import FakeGpu, on_gpu, run
from triton.runtime.errors import OutOfResources

from pointrend_triton.kernels import launch, store


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return FakeGpu(monkeypatch, tmp_path)


def test_fastest_wins(gpu):
    run(gpu.kernel())
    assert gpu.benched == 3
    programs, keywords = gpu.function.launches[-1]
    assert keywords == {
        "SCALE": 2, "BLOCK": 128, "num_warps": 4, "num_stages": 3, "num_ctas": 1
    }  # fmt: skip
    assert programs == (8,)


def test_an_interpreter_that_fails_says_why(gpu, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "INTERPRETER_FAULT", "NumPy is too new")
    run(gpu.kernel(), 0)  # nothing to run
    with pytest.raises(RuntimeError, match="NumPy is too new"):
        run(gpu.kernel())


def test_tuned_once(gpu):
    kernel = gpu.kernel()
    for _ in range(3):
        run(kernel)
    assert gpu.benched == 3
    assert gpu.function.blocks[-3:] == [128] * 3


@pytest.mark.parametrize(
    "other",
    [
        {"n": 5000},  # another bucket
        {"scale": 3},
        {"values": on_gpu(1000, dtype=torch.float16)},
        {"values": None, "n": 1000, "size": (1000, 7)},
    ],
)
def test_other_keys_are_tuned_too(gpu, other):
    kernel = gpu.kernel()
    run(kernel)
    run(kernel, **other)
    assert gpu.benched == 6


@pytest.mark.parametrize("n", [257, 700, 1024])
def test_a_changing_number_of_points_is_not_tuned_again(gpu, n):
    kernel = gpu.kernel()
    run(kernel)
    run(kernel, n)
    assert gpu.benched == 3


@pytest.mark.parametrize(
    "size, expected",
    [(0, 1), (1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 64), (8196, 16384), (16384, 16384)],
)
def test_bucket(size, expected):
    assert launch.bucket(size) == expected


def test_constants_are_told_apart_by_name(gpu):
    """The same values under other names are another key; in another order they are the same."""

    def made(**constants):
        return launch.Launch(None, (on_gpu(1),), constants, (3,)).key

    assert made(A=1, B=2) == made(B=2, A=1) == "float32 A=1 B=2 size=4"
    assert made(A=2, B=1) != made(A=1, B=2)
    kernel = gpu.kernel()
    for benched, constants in ((3, {"A": 1, "B": 2}), (6, {"B": 1, "A": 2}), (6, {"B": 2, "A": 1})):
        kernel(lambda c: (1,), on_gpu(4), on_gpu(4), 3, size=(3,), **constants)
        assert gpu.benched == benched


def test_the_next_process_finds_it(gpu):
    kernel = gpu.kernel()
    run(kernel)
    gpu.forget()
    gpu.times = {64: 0.1, 128: 1.0, 256: 2.0}
    run(kernel)
    assert gpu.benched == 3
    assert gpu.function.blocks[-1] == 128


def test_a_second_equal_gpu_needs_no_tuning(gpu):
    kernel = gpu.kernel()
    run(kernel)
    run(kernel, counts=on_gpu(4, index=1))
    assert gpu.benched == 3
    assert gpu.entered == [1]  # the current device is entered by nobody


def test_another_gpu_is_tuned(gpu):
    kernel = gpu.kernel()
    run(kernel)
    gpu.forget()
    gpu.name = "Another GPU"
    run(kernel)
    assert gpu.benched == 6


def test_inside_a_capture_the_first_that_fits_runs(gpu):
    kernel = gpu.kernel(shared=lambda constants, config: 600 * config.kwargs["BLOCK"])
    gpu.shared, gpu.capturing = 200 * 600, True
    run(kernel)
    assert gpu.benched == 0
    assert gpu.function.blocks == [64]
    gpu.capturing = False
    run(kernel)  # it was not remembered
    assert gpu.function.blocks[-1] == 128


@pytest.mark.parametrize("is_retuned", [False, True])
def test_inside_a_capture_what_is_stored_runs(gpu, is_retuned):
    kernel = gpu.kernel()
    run(kernel)
    gpu.forget()
    gpu.capturing = True
    if is_retuned:
        with launch.retuning():
            run(kernel)
    else:
        run(kernel)
    assert gpu.benched == 3
    assert gpu.function.blocks[-1] == 128


def test_switched_off(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("POINTREND_AUTOTUNE", "0")
    run(gpu.kernel())
    assert gpu.benched == 0
    assert gpu.function.blocks == [64]
    assert not (tmp_path / "cache").exists()


def test_switched_off_still_uses_what_is_stored(gpu, monkeypatch):
    kernel = gpu.kernel()
    run(kernel)
    gpu.forget()
    monkeypatch.setenv("POINTREND_AUTOTUNE", "0")
    run(kernel)
    assert gpu.function.blocks[-1] == 128


def test_a_single_configuration_is_neither_timed_nor_stored(gpu, tmp_path):
    run(gpu.kernel(blocks=(64,)))
    assert gpu.benched == 0
    assert not (tmp_path / "cache").exists()


def test_no_programs_no_choice(gpu):
    kernel = gpu.kernel()
    run(kernel, 0, size=(1000,))
    assert gpu.benched == 0
    assert gpu.function.launches == []
    run(kernel)
    assert gpu.benched == 3


def test_a_configuration_that_is_gone_is_ignored(gpu):
    run(gpu.kernel())
    gpu.forget()
    run(gpu.kernel(blocks=(64, 256)))
    assert gpu.benched == 5
    assert gpu.function.blocks[-1] == 256


def test_what_a_kernel_changes_is_put_back(gpu):
    counts = on_gpu(4)
    counts += 5
    run(gpu.kernel(changes=["counts"]), counts=counts)
    assert len(gpu.function.launches) == 7
    assert counts.tolist() == [6] * 4  # the launch itself, not the six of the tuning


def test_what_a_kernel_changes_is_put_back_where_tuning_is_interrupted(gpu, monkeypatch):
    def interrupt(run, **how):
        run()
        raise KeyboardInterrupt

    counts = on_gpu(4)
    monkeypatch.setattr(triton.testing, "do_bench", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(gpu.kernel(changes=["counts"]), counts=counts)
    assert counts.tolist() == [0] * 4


def test_tensors_in_tuples_are_put_back(gpu):
    run(gpu.kernel(changes=["counts"]), counts=(on_gpu(1), on_gpu(1)))
    assert gpu.function.counts == [[0.0]] * 14


def test_a_misspelt_name_of_a_changed_argument(gpu):
    with pytest.raises(ValueError, match="toy.add: changes names count, which is no argument"):
        gpu.kernel(changes=["count"])


def test_too_much_shared_memory_is_never_compiled(gpu):
    gpu.shared = 100
    run(gpu.kernel(shared=lambda constants, config: config.kwargs["BLOCK"]))
    assert set(gpu.function.blocks) == {64}
    assert gpu.benched == 0


def test_nothing_fits(gpu):
    gpu.shared = 10
    with pytest.raises(RuntimeError, match="toy.add needs 64 bytes of shared memory.* has 10"):
        run(gpu.kernel(shared=lambda constants, config: config.kwargs["BLOCK"]))
    assert gpu.function.launches == []


def test_out_of_resources_is_skipped(gpu):
    gpu.function.errors[128] = OutOfResources(300_000, 100_000, "shared memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(gpu.kernel())
    assert gpu.function.blocks[-1] == 256


def test_a_failed_compile_is_skipped_with_a_warning(gpu):
    gpu.function.errors[128] = RuntimeError("PassManager::run failed")
    with pytest.warns(UserWarning, match="toy.add does not run in BLOCK=128.*PassManager"):
        run(gpu.kernel())
    assert gpu.function.blocks[-1] == 256


@pytest.mark.filterwarnings("ignore:toy.add does not run")
def test_all_fail_the_first_says_why(gpu, tmp_path):
    gpu.function.errors = {b: RuntimeError(f"no {b}") for b in (64, 128, 256)}
    with pytest.raises(RuntimeError, match="no 64"):
        run(gpu.kernel())
    assert not (tmp_path / "cache").exists()


def test_pinned(gpu):
    kernel, other = gpu.kernel(), gpu.kernel("toy.other")
    run(other)
    for number, block in ((0, 64), (2, 256), (3, 64)):
        with launch.pinned(kernel, number):
            run(kernel)
            assert gpu.function.blocks[-1] == block
            run(other)
            assert gpu.function.blocks[-1] == 128
    assert gpu.benched == 3


def test_retuning(gpu):
    kernel, other = gpu.kernel(), gpu.kernel("other.add")
    run(kernel)
    gpu.times = {64: 0.1, 128: 1.0, 256: 2.0}
    with launch.retuning(["toy"]) as tuned:
        for _ in range(2):
            run(kernel)
            run(other)  # neither stored nor meant: not tuned
    assert gpu.benched == 6
    assert gpu.function.blocks[-1] == 64
    [found] = tuned
    assert (found.kernel, found.key) == (kernel, "float32 float32 SCALE=2 size=1024")
    assert found.config == "BLOCK=64, num_ctas=1, num_stages=3, num_warps=4"
    assert list(found.times.values()) == [0.1, 1.0, 2.0]
    gpu.forget()
    run(kernel)
    assert gpu.function.blocks[-1] == 64


def test_a_shipped_table_is_used_and_the_users_own_wins(gpu, tmp_path):
    kernel = gpu.kernel()
    run(kernel)
    shipped = store.ship(0)
    assert shipped == tmp_path / "shipped" / "Fake_GPU_3000.json"
    own = store.path_for(0)
    mine = own.read_text()
    own.unlink()
    gpu.forget()
    run(kernel)
    assert (gpu.benched, gpu.function.blocks[-1]) == (3, 128)

    own.write_text(mine.replace('"config": "BLOCK=128', '"config": "BLOCK=256'))
    gpu.forget()
    run(kernel)
    assert (gpu.benched, gpu.function.blocks[-1]) == (3, 256)


def test_recording(gpu):
    kernel = gpu.kernel()
    with launch.recording() as launches:
        run(kernel)
        with launch.recording() as inner:
            run(kernel)
        run(kernel, 7)
    assert gpu.function.launches == []
    assert (len(launches), len(inner)) == (2, 1)
    assert launches[1].kernel is kernel
    assert launches[1].constants == {"SCALE": 2}
    assert launches[1].size == (7,)
    assert launches[1].pinned is None
    run(kernel)
    assert gpu.function.launches


def test_recording_is_as_launching(gpu):
    """What is pinned is noted; what has no programs is no launch."""
    kernel = gpu.kernel()
    with launch.recording() as launches, launch.pinned(kernel, 1):
        run(kernel)
        run(kernel, 0)
    assert [made.pinned.kwargs["BLOCK"] for made in launches] == [128]


@pytest.mark.parametrize(
    "capability, kilobytes", [(80, 163), (86, 99), (87, 99), (90, 227), (103, 227), (121, 99)]
)
def test_shared_memory(capability, kilobytes):
    assert launch.shared_memory(capability) == kilobytes << 10


def test_the_stored_table_can_be_read_by_people(gpu):
    run(gpu.kernel())
    content = json.loads(store.path_for(0).read_text())
    assert content["gpu"] == "Fake GPU 3000"
    assert content["triton"] == triton.__version__
    entry = content["kernels"]["toy.add"]["float32 float32 SCALE=2 size=1024"]
    assert entry["config"].startswith("BLOCK=128")
    assert list(entry["ms"].values()) == [3.0, 1.0, 2.0]  # in the order of the list
