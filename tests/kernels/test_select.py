"""Exact top-k: the set that a sort by value, NaN first, then by index would keep."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointrend_triton import reference
from pointrend_triton.kernels import launch, select

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def short_limit(limit):
    """Rows longer than this take the four launches of long ones."""
    before, select.SHORT_LIMIT = select.SHORT_LIMIT, limit
    try:
        yield
    finally:
        select.SHORT_LIMIT = before


@pytest.fixture(params=[8192, 0], ids=["short", "long"])
def regime(request):
    with short_limit(request.param):
        yield request.param


def negative_nan(dtype):
    return torch.tensor([-1], dtype=torch.int32).view(torch.float32).to(dtype)[0]


def sorted_choice(values, k):
    """Column indices of the k largest of each row in ascending order: NaN first, ties by index."""
    rows = values.double().cpu().numpy()
    index = np.arange(rows.shape[1])
    chosen = []
    for row in rows:
        is_nan = np.isnan(row)
        order = np.lexsort((index, np.where(is_nan, 0.0, -row), ~is_nan))
        chosen.append(np.sort(order[:k]))
    return torch.from_numpy(np.array(chosen, dtype=np.int64).reshape(len(rows), k))


def check(values, k, **arguments):
    indices = select.topk(values, k, **arguments)
    assert indices.dtype == torch.int64
    assert indices.is_contiguous()
    assert torch.equal(indices.sort(dim=1).values.cpu(), sorted_choice(values, k))
    return indices


SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1e-42, -1e-42, 1.0, -1.0, 3.4e38, -3.4e38]


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row(data, device):
    rows, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 130))
    k = data.draw(st.integers(1, n))
    value = data.draw(
        st.sampled_from(
            [st.floats(width=32), st.sampled_from(SPECIAL), st.sampled_from([0.5, 0.75, 2.0])]
        )
    )
    cells = data.draw(st.lists(value, min_size=rows * n, max_size=rows * n))
    values = torch.tensor(cells).view(rows, n).to(data.draw(st.sampled_from(DTYPES))).to(device)
    with short_limit(data.draw(st.sampled_from([8192, 0]))):
        check(values, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33, 588, 3001])
def test_sizes(n, dtype, regime, device):
    values = torch.randn(3, n).to(dtype).to(device)  # half precision has ties
    for k in {1, n // 4, n - 1, n} - {0}:
        indices = check(values, k)
        if regime:
            assert torch.equal(indices, indices.sort(dim=1).values), "short rows are in order"


def test_rows_of_different_kinds(regime, device):
    n = 1500
    values = torch.randn(8, n)
    values[1] = 0.25
    values[2] = NAN
    values[3] = -INF
    values[4, ::3] = NAN
    values[5] = values[5].round()
    values[6, : n // 2], values[6, n // 2 :] = 0.0, -0.0
    values[7, ::2] = -INF
    for k in (1, 400, n - 1, n):
        check(values.to(device), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_is_the_largest(dtype, regime, device):
    values = torch.full((1, 70), INF, dtype=dtype)
    values[0, 40], values[0, 60] = NAN, negative_nan(dtype)
    assert check(values.to(device), 1).tolist() == [[40]]
    assert check(values.to(device), 2).sort().values.tolist() == [[40, 60]]
    assert check(values.to(device), 3).sort().values.tolist() == [[0, 40, 60]]


def test_lowest_index_wins_a_tie(regime, device):
    values = torch.zeros(1, 2500)
    values[0, 2000] = 1.0
    values[0, 1::2] = -0.0  # equal to 0.0
    chosen = check(values.to(device), 6).sort().values
    assert chosen.tolist() == [[0, 1, 2, 3, 4, 2000]]


def test_one_large_value_far_from_all_others(regime, device):
    """A program of the filter that finds a single value, and that one above the k-th one's bin."""
    values = torch.full((1, 4000), -7.0)
    values[0, :900], values[0, 3500] = 1.0, 100.0
    assert check(values.to(device), 3).sort().values.tolist() == [[0, 1, 3500]]


def test_smallest_numbers_are_told_apart(regime, device):
    tiny = torch.arange(-40, 40, dtype=torch.float32).flip(0) * 1.4e-45
    assert check(tiny[None].to(device), 5).sort().values.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("number", range(len(select.FINISH.configs({}))))
def test_long_lists(number, device):
    """More values in the bin of the k-th than one program holds in registers."""
    n = 9001
    values = torch.stack(
        [torch.ones(n), 1 + torch.rand(n), 1 + torch.randint(0, 3, (n,)) / 4, torch.randn(n)]
    )
    with short_limit(0), launch.pinned(select.FINISH, number):
        for k in (2500, n):
            check(values.to(device), k)


@pytest.mark.parametrize(
    ("kernel", "limit"),
    [
        (select.SHORT, 8192),
        (select.HISTOGRAM, 0),
        (select.FILTER, 0),
        (select.FINISH, 0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_configuration(kernel, limit, device):
    scores = torch.randn(2, 1, 50, 91).half().to(device)  # with ties
    constants = {"BLOCK": 8192} if limit else {}
    for number in range(len(kernel.configs(constants))):
        with short_limit(limit), launch.pinned(kernel, number):
            indices, coords = select.topk_on_grid(scores, 1200)
        assert torch.equal(indices.sort().values.cpu(), sorted_choice(scores.flatten(1), 1200))
        assert torch.equal(coords, reference.grid_coords(indices, 50, 91))


@pytest.mark.parametrize("number", range(len(select.POINTS.configs({"BLOCK": 4096}))))
def test_every_configuration_of_points(number, device):
    scores, candidates = torch.randn(2, 3001, device=device), torch.rand(2, 3001, 2, device=device)
    random = torch.rand(2, 1100, 2, device=device)
    with launch.pinned(select.POINTS, number):
        coords = select.select_points(scores, candidates, random, 700)
    chosen = sorted_choice(scores, 700).to(device)
    assert torch.equal(coords[:, :700], candidates.gather(1, chosen[..., None].expand(-1, -1, 2)))
    assert torch.equal(coords[:, 700:], random)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (131, 7), (4, 683)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_and_their_centres(size, dtype, regime, device):
    scores = torch.randn(2, 1, *size).to(dtype).to(device)
    cells = size[0] * size[1]
    for k in (1, cells // 3, cells, cells + 5):
        indices, coords = select.topk_on_grid(scores, k)
        assert indices.shape == (2, min(k, cells))
        assert coords.dtype == torch.float32
        assert coords.is_contiguous()
        chosen = sorted_choice(scores.flatten(1), min(k, cells))
        assert torch.equal(indices.sort(dim=1).values.cpu(), chosen)
        assert torch.equal(coords, reference.grid_coords(indices, *size)), "bit for bit"


def test_strides_of_maps(regime, device):
    whole = torch.randn(3, 4, 22, 34, device=device)
    maps = {
        "one channel of four": whole[:, 1:2],
        "channels last": whole.contiguous(memory_format=torch.channels_last)[:, 2:3],
        "every other column": whole[:, :1, :, ::2],
        "part of the rows": whole[:, :1, 3:9, 1:30],
        "transposed": whole[:, :1].transpose(2, 3),
        "one map for all": whole[:1, :1].expand(3, 1, 22, 34),
        "one value for all": whole[:1, :1, :1, :1].expand(3, 1, 22, 34),
        "every other map": whole[::2, 3:],
    }
    for name, scores in maps.items():
        indices, coords = select.topk_on_grid(scores, 30)
        expected = sorted_choice(scores.flatten(1), 30)
        assert torch.equal(indices.sort(dim=1).values.cpu(), expected), name
        assert torch.equal(coords, reference.grid_coords(indices, *scores.shape[2:])), name


@pytest.mark.parametrize("row", ["sliced", "repeated"])
def test_strides_of_rows(row, regime, device):
    whole = torch.randn(4, 900, device=device)
    check(whole[::2, 11:800] if row == "sliced" else whole[1:2].expand(3, 900), 200)


def test_nothing_to_choose(regime, device):
    indices, coords = select.topk_on_grid(torch.zeros(2, 1, 5, 6, device=device), 0)
    assert (indices.shape, coords.shape) == ((2, 0), (2, 0, 2))
    indices, coords = select.topk_on_grid(torch.zeros(0, 1, 5, 6, device=device), 4)
    assert (indices.shape, coords.shape) == ((0, 4), (0, 4, 2))
    assert (indices.dtype, coords.dtype) == (torch.int64, torch.float32)
    assert select.topk(torch.zeros(0, 9, device=device), 3).shape == (0, 3)


def test_counters_of_the_caller(regime, device):
    values = torch.randn(3, 700, device=device)
    shape = select.workspace_shape(3, 700)
    workspace = torch.zeros(shape, dtype=torch.int64, device=device)
    check(values, 90, workspace=workspace)
    assert workspace.any() == (regime == 0)


@pytest.mark.parametrize(("k", "r"), [(0, 7), (40, 0), (13, 9), (1, 1), (40, 95)])
def test_points(k, r, regime, device):
    """The chosen candidates, as many as the reference's and as uncertain, then the random ones."""
    scores = torch.randn(3, 40, device=device)
    scores[1, 5:9], scores[2] = NAN, 0.5
    candidates, random = torch.rand(3, 40, 2, device=device), torch.rand(3, r, 2, device=device)
    coords = select.select_points(scores, candidates, random, k)
    assert coords.shape == (3, k + r, 2)
    assert coords.is_contiguous()
    assert torch.equal(coords[:, k:], random)
    for i, row in enumerate(sorted_choice(scores, k)):
        expected = candidates[i, row.to(device)].tolist()
        assert sorted(coords[i, :k].tolist()) == sorted(expected)
        assert not regime or coords[i, :k].tolist() == expected, "short rows are in order"


def test_points_of_strided_draws(regime, device):
    scores = torch.randn(2, 3, 60, device=device)[:, 1]
    candidates = torch.rand(2, 2, 60, device=device).transpose(1, 2)
    random = torch.rand(1, 8, 2, device=device).expand(2, 8, 2)
    coords = select.select_points(scores, candidates, random, 25)
    expected = select.select_points(
        scores.contiguous(), candidates.contiguous(), random.contiguous(), 25
    )
    for ours, theirs in zip(coords.tolist(), expected.tolist(), strict=True):
        assert sorted(ours[:25]) == sorted(theirs[:25])
        assert ours[25:] == theirs[25:]


def test_points_of_no_map(device):
    empty = torch.zeros(0, 12, 2, device=device)
    assert select.select_points(empty[..., 0], empty, empty[:, :5], 9).shape == (0, 14, 2)


@pytest.mark.parametrize(
    ("n", "names"),
    [
        (8192, ["select.short"]),
        (8193, ["select.histogram", "select.filter", "select.finish"]),
    ],
)
def test_launches(n, names):
    """Their number and shapes do not depend on values, so a CUDA graph can hold them."""
    with launch.recording() as launches:
        indices, coords = select.topk_on_grid(torch.empty(2, 1, 1, n, device="meta"), 100)
    assert [launch.kernel.name for launch in launches] == names
    assert (indices.shape, coords.shape) == ((2, 100), (2, 100, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (8, 6144, 1536),
        (100, 37632, 9408),
        (1, 87552, 8196),
        (1, 350208, 8196),
        (1, 524288, 8196),
        (1, 2097152, 8196),
    ],
)
def test_sizes_of_the_model(rows, n, k, device):
    values = -torch.randn(rows, n, device=device).abs()
    for each in (values, values.half().float(), torch.zeros_like(values)):
        first = check(each, k).sort().values
        for _ in range(5):
            assert torch.equal(select.topk(each, k).sort().values, first)


@pytest.mark.gpu
def test_in_a_graph(device):
    values = torch.randn(1, 100000, device=device)
    select.topk(values, 500)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = select.topk(values, 500)
    for _ in range(3):
        values.normal_()
        graph.replay()
        assert torch.equal(indices.sort().values.cpu(), sorted_choice(values, 500))
