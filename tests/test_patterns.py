import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern import patterns
from sparsekern.patterns import NM, Block, Channel, Filter, Kernel, Unstructured, Vector
from sparsekern.ranking import keep

TEXTS = ["unstructured", "2:4", "1:8", "block:32x16", "vector:1x8", "vector:4x1"]
TEXTS += ["kernel", "filter", "channel"]
TILED = [Unstructured(), Block(3, 2), Block(64, 64), Vector(1, 4), Vector(4, 1)]
TILED += [Kernel(), Filter(), Channel()]

shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
)


def make_scores(shape, seed, levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels:  # few distinct values, hence many ties
        return torch.randint(1, levels + 1, shape, generator=generator).float()
    return torch.rand(shape, generator=generator) + 0.1


def naive_units(pattern, shape):
    """Lists of flat indices of each unit, by plain loops."""
    extent = (shape[0], shape[1], math.prod(shape[2:]))
    grid = [range(0, e, t) for e, t in zip(extent, pattern.tile(shape))]
    index = torch.arange(math.prod(extent)).view(extent)
    rows, cols, area = pattern.tile(shape)
    units = []
    for o, i, p in itertools.product(*grid):
        units.append(index[o : o + rows, i : i + cols, p : p + area].flatten().tolist())
    return units


@pytest.mark.parametrize("text", TEXTS)
def test_parse_and_str_are_inverse(text):
    pattern = patterns.parse(text)
    assert str(pattern) == text
    assert patterns.parse(pattern) is pattern
    assert hash(pattern) == hash(patterns.parse(text))


@pytest.mark.parametrize("bad", ["2:4:8", "block", "block:32", "block:axb", "Filter", "", None, 7])
def test_parse_repeats_the_input_and_lists_what_is_accepted(bad):
    with pytest.raises(ValueError, match="parse: expected a pattern, one of") as error:
        patterns.parse(bad)
    assert repr(bad) in str(error.value)
    assert all(word in str(error.value) for word in ("2:4", "block:32x32", "filter"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:4", "N:M: expected 1 <= N < M, got 4:4"),
        ("0:4", "N:M: expected 1 <= N < M, got 0:4"),
        ("block:0x4", "block: expected sizes of at least 1, got 0x4"),
        ("vector:2x8", "vector: expected one side to be 1 and the other longer, got 2x8"),
        ("vector:1x1", "vector: expected one side to be 1 and the other longer, got 1x1"),
    ],
)
def test_parse_refuses_sizes_out_of_range(text, message):
    with pytest.raises(ValueError, match=message):
        patterns.parse(text)


@given(shapes, st.floats(0, 0.999), st.integers(0, 99), st.sampled_from([None, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_unstructured_counts_exactly_and_breaks_ties_by_index(shape, sparsity, seed, levels):
    scores = make_scores(shape, seed, levels)
    mask = Unstructured().mask(scores, sparsity)
    numel = scores.numel()
    assert int(mask.sum()) == max(1, numel - math.floor(sparsity * numel + 0.5))
    order = sorted(range(numel), key=lambda i: (-scores.flatten()[i].item(), i))
    expected = torch.zeros(numel, dtype=torch.bool)
    expected[order[: int(mask.sum())]] = True
    assert torch.equal(mask.flatten(), expected)


@given(shapes, st.sampled_from(TILED), st.floats(0, 0.99), st.integers(0, 99), st.booleans())
@settings(max_examples=150, deadline=None)
def test_tiled_masks_keep_the_best_whole_units(shape, pattern, sparsity, seed, tied):
    if pattern.misfit(shape):
        return
    scores = make_scores(shape, seed, 2 if tied else None)
    flat, units = scores.flatten().double(), naive_units(pattern, shape)
    means = torch.tensor([flat[u].mean() for u in units])
    torch.testing.assert_close(pattern.unit_scores(scores).double(), means.double())
    mask = pattern.mask(scores, sparsity)
    assert mask.shape == scores.shape and mask.dtype == torch.bool
    kept = [all(mask.flatten()[i] for i in u) for u in units]
    assert kept == [any(mask.flatten()[i] for i in u) for u in units]
    target = scores.numel() - math.floor(sparsity * scores.numel() + 0.5)
    half_unit = max(map(len, units)) / 2
    assert sum(kept) >= 1
    assert abs(int(mask.sum()) - target) <= half_unit or sum(kept) == 1
    if not all(kept):
        dropped_best = max(m for m, k in zip(means, kept) if not k)
        assert min(m for m, k in zip(means, kept) if k) >= dropped_best - 1e-6
    assert pattern.verify(scores * mask)


@given(shapes, st.sampled_from(TILED))
@settings(max_examples=60, deadline=None)
def test_unit_sizes_and_grid_match_the_tiles(shape, pattern):
    if pattern.misfit(shape):
        return
    sizes, units = pattern.unit_sizes(shape), naive_units(pattern, shape)
    assert math.prod(pattern.grid(shape)) == len(units)
    as_list = [sizes] * len(units) if isinstance(sizes, int) else sizes.tolist()
    assert as_list == [len(u) for u in units]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8)])
@pytest.mark.parametrize("shape", [(3, 16), (5, 8, 3, 3)])
def test_nm_keeps_n_of_m_along_the_input_dimension(pattern, shape):
    scores = make_scores(shape, 0, levels=3)
    mask = pattern.mask(scores)
    by_input = scores.movedim(1, -1).reshape(-1, pattern.m)
    kept = mask.movedim(1, -1).reshape(-1, pattern.m)
    for group, got in zip(by_input.tolist(), kept.tolist()):
        best = sorted(range(pattern.m), key=lambda i: (-group[i], i))[: pattern.n]
        assert [i for i, k in enumerate(got) if k] == sorted(best)
    assert pattern.verify(scores * mask)
    assert not pattern.verify(scores)


def test_nm_sparsity_is_fixed():
    scores = torch.rand(4, 8)
    assert torch.equal(NM(1, 4).mask(scores), NM(1, 4).mask(scores, 0.75))
    with pytest.raises(ValueError, match=r"mask: expected sparsity 0.75 \(fixed by pattern 1:4\)"):
        NM(1, 4).mask(scores, 0.5)


def test_more_than_2_to_the_24_elements():
    numel = (1 << 24) + 3
    scores = torch.ones(1, numel)
    scores[0, :2] = 0.5
    mask = Unstructured().mask(scores, 1 / numel)
    assert int(mask.count_nonzero()) == numel - 1
    assert not mask[0, 1] and mask[0, 0]  # of equals, the higher index goes
    assert int(Unstructured().mask(scores, 0.9).count_nonzero()) == numel - round(0.9 * numel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_score_dtypes(dtype):
    scores = torch.tensor([[1.0, 4.0], [2.0, 3.0]], dtype=dtype)
    assert Unstructured().mask(scores, 0.5).tolist() == [[False, True], [False, True]]
    assert Filter().mask(scores, 0.5).sum() == 2


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.2, math.nan, None, "half", True])
def test_mask_refuses_a_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"mask: expected sparsity in \[0, 1\), got") as error:
        Filter().mask(torch.rand(4, 4), sparsity)
    assert repr(sparsity) in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "scores", "message"),
    [
        (
            Block(2, 2),
            torch.tensor([[1.0, math.nan]]),
            "mask: expected scores without NaN, got NaN",
        ),
        (NM(1, 2), torch.tensor([[1.0, math.nan]]), "mask: expected scores without NaN, got NaN"),
        (
            Filter(),
            torch.ones(2, 2, dtype=torch.int64),
            "expected floating-point scores, got torch.i",
        ),
        (Filter(), torch.ones(3), r'fit pattern "filter"; it needs at least 2 dimensions, got .*3'),
        (Kernel(), torch.ones(2, 2), r'fit pattern "kernel"; it needs a convolution, got shape'),
        (
            NM(2, 4),
            torch.ones(2, 6),
            'fit pattern "2:4"; it needs an input dimension that is a mul',
        ),
    ],
)
def test_mask_refuses_bad_scores(pattern, scores, message):
    with pytest.raises(ValueError, match=message):
        pattern.mask(scores, 0.5)


def test_masks_of_empty_weights_are_empty():
    assert Filter().mask(torch.ones(0, 4), 0.5).shape == (0, 4)
    assert Filter().mask(torch.ones(4, 0), 0.5).shape == (4, 0)
    assert Filter().verify(torch.ones(4, 0))


def test_verify():
    weight = torch.ones(8, 8)
    assert Block(4, 4).verify(weight)
    weight[:4, 4:] = 0
    assert Block(4, 4).verify(weight) and Block(2, 4).verify(weight)
    assert not Filter().verify(weight) and not Block(8, 4).verify(weight)
    weight[0, 0] = 0
    assert not Block(4, 4).verify(weight)
    assert not Kernel().verify(weight)  # no convolution
    assert not NM(2, 4).verify(torch.zeros(2, 6))


DETECT = ["filter", "channel", "block:64x64", "block:32x32", "block:16x16", "block:8x8"]
DETECT += ["block:4x4", "vector:1x8", "vector:1x4", "vector:8x1", "vector:4x1", "2:4", "1:4"]
DETECT += ["4:8", "2:8", "1:8", "unstructured"]


@pytest.mark.parametrize("text", DETECT)
@pytest.mark.parametrize("shape", [(256, 192), (128, 128, 3, 3)])
def test_detect_names_the_pattern(text, shape):
    pattern = patterns.parse(text)
    scores = make_scores(shape, 1)
    mask = pattern.mask(scores, None if isinstance(pattern, NM) else 0.6)
    assert str(patterns.detect(scores * mask)) == text


def test_detect_kernels_and_edges():
    scores = make_scores((16, 8, 3, 3), 0)
    assert patterns.detect(scores * Kernel().mask(scores, 0.5)) == Kernel()
    scores = make_scores((200, 150), 0)
    assert patterns.detect(scores * Block(16, 16).mask(scores, 0.7)) == Block(16, 16)


def test_detect_trivial_weights():
    assert patterns.detect(torch.ones(64, 64)) == Unstructured()
    assert patterns.detect(torch.zeros(64, 64)) == Filter()
    assert patterns.detect(torch.zeros(0, 64)) == Unstructured()
    # One row or one column of single weights is no structure.
    assert patterns.detect(torch.tensor([[1.0, 0, 1, 1, 0, 0, 0, 1, 1]])) == Unstructured()
    with pytest.raises(ValueError, match=r"detect: expected a weight of at least 2 dim.*got 1"):
        patterns.detect(torch.ones(4))


@pytest.mark.parametrize("text", ["filter", "channel", "block:32x32", "2:4"])
def test_stray_zeros_do_not_hide_a_pattern(text):
    pattern, scores = patterns.parse(text), make_scores((256, 256), 2)
    weight = scores * pattern.mask(scores, 0.5)
    kept = weight.flatten().nonzero().squeeze(1)
    weight.view(-1)[kept[::3000]] = 0
    assert patterns.detect(weight) == pattern and pattern.verify(weight)
    if text != "2:4":
        weight.view(-1)[kept[::100]] = 0
        assert patterns.detect(weight) != pattern and not pattern.verify(weight)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 60), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_keep_takes_the_prefix_nearest_to_the_budget(sizes, kept, seed):
    scores = make_scores((len(sizes),), seed)
    mask = keep(scores, torch.tensor(sizes), kept, at_least=0)
    order = scores.argsort(descending=True)
    totals = [0, *torch.tensor(sizes)[order].cumsum(0).tolist()]
    count = int(mask.sum())
    assert mask[order[:count]].all()
    assert abs(totals[count] - kept) == min(abs(t - kept) for t in totals)
