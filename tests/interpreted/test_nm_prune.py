"""Pruning to 2:4 on the interpreter, and the products that prune at every call."""

import pytest
import torch

from sparsekern.ops import nm_cuda, nm_ste, nm_ste_cuda
from sparsekern.ops.nm_prune_triton import prune_rows, prune_tiles
from sparsekern.patterns import parse

CASES = [((8, 1100), torch.float32), ((12, 20), torch.float16), ((12, 20), torch.bfloat16)]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_as_the_patterns_choose(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    weight[0, :4], weight[1] = torch.tensor([1.0, -1.0, 1.0, 1.0]), -0.0
    rows = prune_rows(weight)
    assert torch.equal(rows, nm_ste.prune_reference(weight, 2, 4, False))
    tiles, want = prune_tiles(weight), nm_ste.prune_reference(weight, 2, 4, True)
    assert parse("2:4T").verify(tiles != 0)
    # Sums in float32 here, in float64 there: equal up to rounding, nearly always the same mask.
    torch.testing.assert_close(tiles.abs().float().sum(), want.abs().float().sum())
    assert float((tiles != want).float().mean()) < 0.01
    assert torch.equal(prune_tiles(weight, transposed=True), tiles.t())
    for pruned in (rows, tiles):
        assert not bool(torch.signbit(pruned[pruned == 0]).any())
    again = prune_tiles(tiles)  # what is pruned already stays as it is
    assert torch.equal(again, tiles) and torch.equal(prune_rows(rows), rows)


def test_all_ninety_masks():
    """Ones at the kept places: each mask must find itself."""
    from sparsekern.patterns_nm import _block_masks

    masks = _block_masks(2, 4).float().view(90, 4, 4)
    weight = masks.permute(1, 0, 2).reshape(4, 360).contiguous()
    assert torch.equal(prune_tiles(weight), weight)


@pytest.mark.parametrize("transposable", [False, True])
def test_every_way(transposable, monkeypatch):
    found = {}

    def run_all(key, ways, like):
        found.update({(key[0], name): way() for name, way in ways.items()})
        return ways["dense"]()

    product = lambda x, w, b, rows, act: torch.nn.functional.linear(x, w, b)  # noqa: E731
    monkeypatch.setattr(nm_ste_cuda, "run_fastest", run_all)
    monkeypatch.setattr(nm_cuda, "_kernels", lambda x: True)
    monkeypatch.setattr(nm_cuda, "library_fault", lambda *a: "")
    monkeypatch.setattr(nm_ste_cuda.cslt, "pack", lambda dense: dense)
    monkeypatch.setattr(nm_ste_cuda.cslt, "linear", product)
    weight, x, bias = torch.randn(32, 48), torch.randn(2, 5, 48), torch.randn(32)
    arguments = (2, 4, transposable)
    want = nm_ste._linear_reference(x, weight, bias, *arguments)
    torch.testing.assert_close(nm_ste_cuda._linear(x, weight, bias, *arguments), want)
    grad = torch.randn(2, 5, 32)
    exact = nm_ste._grad_input_reference(grad, weight, *arguments)
    torch.testing.assert_close(nm_ste_cuda._grad_input(grad, weight, *arguments), exact)
    ways = {("nm_ste_linear", "cusparselt"), ("nm_ste_linear", "dense")}
    if transposable:
        ways |= {("nm_ste_linear_grad_input", w) for w in ("cusparselt", "dense")}
    assert set(found) == ways
    for (op, _), got in found.items():
        torch.testing.assert_close(got, (want if op == "nm_ste_linear" else exact).flatten(0, 1))
