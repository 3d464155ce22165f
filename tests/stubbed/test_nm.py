"""nm_linear and its gradients through cuSPARSELt's stand-in."""

import threading

import pytest
import torch
from conftest import LT
from samples import random_nm

from sparsekern.ops import cslt, nm_cuda
from sparsekern.ops.nm import nm_to_dense, pack_index

DTYPES = (torch.float16, torch.bfloat16)


def problem(dtype, tokens=11, cols=32, rows=48):
    values, index = random_nm(rows, cols, 2, 4)
    values.view(-1)[::7] = -0.0
    return torch.randn(tokens, cols).to(dtype), values.to(dtype), index


def dense_of(values, index, cols):
    return nm_to_dense("test", values, index, cols, 2, 4).double()


def close(have, want, dtype):
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 11])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_forward(dtype, tokens, activation, only):
    x, values, index = problem(dtype, tokens)
    bias = torch.randn(48).to(dtype)
    plan = nm_cuda._plan(index, 48, 32, 2, 4)
    want = torch.nn.functional.linear(x.double(), dense_of(values, index, 32), bias.double())
    if activation == "relu":
        want = want.relu()
    elif activation != "none":
        kind = "tanh" if activation == "gelu_tanh" else "none"
        want = torch.nn.functional.gelu(want, approximate=kind)
    for name in ("cusparselt", "dense"):
        only(name)
        y = nm_cuda._linear(x, values, index, bias, plan, None, 2, 4, activation)
        assert y.shape == (tokens, 48) and y.is_contiguous()
        close(y, want, dtype)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_gelu_of_the_library_is_asked_for(kind, only, monkeypatch):
    """None, the one by erf, the one by tanh: always the right one is computed."""
    LT.stub_lt_gelu(kind)
    operands = cslt._probe_operands  # other sizes each time: the compiled half keeps its plans
    monkeypatch.setattr(
        cslt, "_probe_operands", lambda *a: [t[: 64 - 16 * kind].clone() for t in operands(*a)]
    )
    x, values, index = problem(torch.float16)
    plan = nm_cuda._plan(index, 48, 32, 2, 4)
    only("cusparselt")
    for activation, formula in (("gelu", "none"), ("gelu_tanh", "tanh")):
        y = nm_cuda._linear(x, values, index, None, plan, None, 2, 4, activation)
        want = x.double() @ dense_of(values, index, 32).t()
        close(y, torch.nn.functional.gelu(want, approximate=formula), torch.float16)
    assert cslt._FUSED_GELU == {(None, torch.float16): ("", "gelu", "gelu_tanh")[kind]}


@pytest.mark.parametrize("transposable", [True, False])
def test_backward(transposable, only):
    x, values, index = problem(torch.bfloat16)
    if transposable:  # 4 x 4 tiles with two kept in each row and column
        tile = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
        index = pack_index(tile.repeat(12, 8), 4)
    grad = torch.randn(11, 48).to(torch.bfloat16)
    plan_t = nm_cuda._plan(index, 48, 32, 2, 4, transpose=True)
    weight = dense_of(values, index, 32)
    for name in ("cusparselt", "dense") if transposable else ("dense",):
        only(name)
        for made in (plan_t, torch.zeros(1, dtype=torch.int32)):  # also one that is not ours
            have = nm_cuda._grad_input(grad, values, index, made, 32, 2, 4)
            close(have, grad.double() @ weight, torch.bfloat16)
    have = nm_cuda._grad_values(grad, x, index, plan_t, 2, 4)
    dense = grad.double().t() @ x.double()
    close(have, nm_cuda.collect(dense, index, 16, 2, 4), torch.bfloat16)


def test_a_changed_weight_is_packed_again_in_place(only):
    x, values, index = problem(torch.bfloat16)
    plan = nm_cuda._plan(index, 48, 32, 2, 4)
    only("cusparselt")

    def packings(values):
        before = LT.stub_lt_count(b"compress")
        y = nm_cuda._linear(x, values, index, None, plan, None, 2, 4)
        close(y, x.double() @ dense_of(values, index, 32).t(), torch.bfloat16)
        return LT.stub_lt_count(b"compress") - before

    assert [packings(values), packings(values)] == [1, 0]
    held = nm_cuda.recall(plan).packed["forward", torch.bfloat16]
    address = held.tensors[0].data_ptr()
    with torch.no_grad():
        values.mul_(2)
    assert [packings(values), packings(values)] == [1, 0]
    other = values.clone()  # another tensor, also at version 0
    assert [packings(other), packings(values)] == [1, 1]
    assert held.tensors[0].data_ptr() == address


def test_another_stream_waits_for_the_packing(only, streams):
    x, values, index = problem(torch.bfloat16)
    plan = nm_cuda._plan(index, 48, 32, 2, 4)
    only("cusparselt")
    nm_cuda._linear(x, values, index, None, plan, None, 2, 4)
    assert streams.waited == 0
    streams.cuda_stream = 2
    nm_cuda._linear(x, values, index, None, plan, None, 2, 4)
    assert streams.waited == 1


def test_plans_and_searches_are_kept(only):
    x, values, index = problem(torch.bfloat16, tokens=16)
    plan = nm_cuda._plan(index, 48, 32, 2, 4)
    only("cusparselt")
    run = lambda: nm_cuda._linear(x, values, index, None, plan, None, 2, 4)  # noqa: E731
    run()
    plans, searches = LT.stub_lt_count(b"plan"), LT.stub_lt_count(b"search")
    run()
    assert (LT.stub_lt_count(b"plan"), LT.stub_lt_count(b"search")) == (plans, searches)
    (algorithm,) = cslt._ALGORITHMS.values()
    assert algorithm[0] == 2 and len(algorithm) == 4  # what the search of the stand-in finds


def test_every_thread_has_a_handle(only):
    x, values, index = problem(torch.bfloat16)
    plan = nm_cuda._plan(index, 48, 32, 2, 4)
    only("cusparselt")
    before = LT.stub_lt_count(b"init")
    results = []

    def work():
        results.append(nm_cuda._linear(x, values, index, None, plan, None, 2, 4))

    work()
    mine = LT.stub_lt_count(b"init")
    assert mine <= before + 1
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mine < LT.stub_lt_count(b"init") <= mine + 3  # an ended thread leaves its to the next
    assert all(torch.equal(r, results[0]) for r in results)


def test_tokens_are_padded_without_a_copy_where_there_is_room():
    room = torch.randn(16, 32)
    padded = cslt.padded_tokens(room[:11])
    assert padded.shape == (16, 32) and padded.data_ptr() == room.data_ptr()
    copied = cslt.padded_tokens(room[8:15].clone())
    assert copied.shape == (8, 32) and torch.equal(copied[:7], room[8:15])
    assert cslt.padded_tokens(room) is room


def test_bytes_multiply_too():
    """int8 with results in bfloat16: for callers of the compiled half."""
    weight = torch.randint(-9, 9, (64, 64)).to(torch.int8)
    weight[:, ::4], weight[:, 3::4] = 0, 0
    x = torch.randint(-9, 9, (16, 64)).to(torch.int8)
    bias = torch.randn(64)
    packed = cslt.pack(weight)
    y = torch.ops.sparsekern._cslt_linear(x, packed, bias, 64, 0, 0.5, torch.bfloat16, [])
    want = (x.double() @ weight.double().t()) * 0.5 + bias.double()
    torch.testing.assert_close(y.double(), want, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8], ids=["int8", "float8"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_weights_and_tokens_of_8_bits(kind, tokens, monkeypatch):
    """Both are packed as bytes; the products come out in bfloat16 and are scaled then."""
    from sparsekern.ops import nm_int8, nm_int8_cuda
    from sparsekern.weights_int8 import Float8NMWeight, Int8NMWeight

    make = Int8NMWeight if kind == torch.int8 else Float8NMWeight
    values, index = random_nm(64, 96, 2, 4)
    held, scales = make.quantized(values.float(), (index,), (64, 96))
    x, bias = torch.randn(tokens, 96).bfloat16(), torch.randn(64).bfloat16()
    plan = nm_cuda._plan(index, 64, 96, 2, 4)
    wide = nm_int8.dequantize_rows(held, scales).double()
    seen = nm_int8.rounded_tokens(x, kind).double()
    want = (seen @ dense_of(wide, index, 96).t() + bias.double()).relu()
    taken = []

    def run(key, ways, like):
        taken.extend(ways)
        return ways["cusparselt"]()

    monkeypatch.setattr(nm_int8_cuda, "run_fastest", run)
    monkeypatch.setattr(nm_int8_cuda, "device_facts", nm_cuda.device_facts)
    for _ in range(2):
        y = nm_int8_cuda._linear(x, held, scales, index, bias, plan, 2, 4, True, "relu")
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)
    assert taken == ["cusparselt", "dense"] * 2
    (packed,) = nm_cuda.recall(plan).packed.values()
    assert packed.tensors[0].numel() == 64 * 96  # of the stand-in: the dense bytes


def test_float32_takes_1_of_2_where_tf32_is_allowed(only, monkeypatch):
    values, index = random_nm(48, 32, 1, 2)
    values, x, bias = values.float(), torch.randn(11, 32), torch.randn(48)
    plan = nm_cuda._plan(index, 48, 32, 1, 2)
    run = lambda: nm_cuda._linear(x, values, index, bias, plan, None, 1, 2, "relu")  # noqa: E731
    dense = nm_to_dense("test", values, index, 32, 1, 2).double()
    only("cusparselt")
    with pytest.raises(ValueError, match="not enough values"):
        run()  # full precision is wanted: no such way
    monkeypatch.setattr(cslt, "precision", lambda dtype: "tf32")
    before = LT.stub_lt_count(b"matmul")
    want = torch.nn.functional.linear(x.double(), dense, bias.double()).relu()
    torch.testing.assert_close(run().double(), want, rtol=1e-5, atol=1e-5)
    assert LT.stub_lt_count(b"matmul") > before


@pytest.mark.parametrize(
    ("rows", "cols", "tokens", "dtype", "message"),
    [
        (48, 24, 8, torch.bfloat16, "expected a weight of sizes that are multiples of 16, got"),
        (48, 48, 8, torch.int8, "expected a weight of sizes that are multiples of 32, got"),
        (48, 32, 8, torch.float64, "expected a weight of float32, float16, bfloat16, int8 or floa"),
        (48, 32, 7, torch.bfloat16, "expected padded tokens, a multiple of 8, got 7"),
    ],
)
def test_messages_of_the_compiled_half(rows, cols, tokens, dtype, message):
    x = torch.ones(tokens, cols).to(dtype)
    packed = torch.zeros(rows * cols * x.element_size(), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsekern._cslt_linear(x, packed, None, rows, 0, 1.0, dtype, [])


def test_nothing_leaks():
    gone = LT.stub_lt_count(b"selection freed"), LT.stub_lt_count(b"plan freed")
    x = torch.ones(8, 32, dtype=torch.bfloat16)
    packed = torch.zeros(48 * 32 * 2, dtype=torch.uint8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cusparseLtMatmulPlanInit to succeed"):
            torch.ops.sparsekern._cslt_linear(
                x, packed, None, 48, 0, 1.0, torch.bfloat16, [99, 1, 1, 0]
            )
    assert LT.stub_lt_count(b"selection freed") == gone[0] + 2
    assert LT.stub_lt_count(b"plan freed") == gone[1]


def wrong_index(index):
    """Positions that fall inside of a group."""
    return torch.full_like(index, 0b0001_0001)


def test_without_a_plan_every_position_is_looked_at():
    """mma.sp, say, has no result for positions that do not rise."""
    x, values, index = problem(torch.bfloat16)
    grad, wrong, nm = torch.randn(11, 48).bfloat16(), wrong_index(index), (2, 4)
    said = "expected index with positions that rise strictly inside each group"
    empty = torch.empty(0, dtype=torch.int32)
    for plan in (None, empty):
        with pytest.raises(RuntimeError, match=f"nm_linear: {said}"):
            nm_cuda._linear(x, values, wrong, None, plan, None, *nm)
        with pytest.raises(RuntimeError, match=f"nm_linear_grad_input: {said}"):
            nm_cuda._grad_input(grad, values, wrong, plan, 32, *nm)
        with pytest.raises(RuntimeError, match=f"nm_linear_grad_values: {said}"):
            nm_cuda._grad_values(grad, x, wrong, plan, *nm)


def test_what_was_looked_at_with_an_empty_plan_is_not_looked_at_again(monkeypatch):
    x, values, index = problem(torch.bfloat16)
    grad, empty, looked = torch.randn(11, 48).bfloat16(), torch.empty(0, dtype=torch.int32), []
    check = nm_cuda.slot_columns
    monkeypatch.setattr(nm_cuda, "slot_columns", lambda op, *a: looked.append(op) or check(op, *a))
    for _ in range(2):
        nm_cuda._grad_values(grad, x, index, empty, 2, 4)
        nm_cuda._grad_input(grad, values, index, empty, 32, 2, 4)
    assert looked == ["nm_linear_grad_values", "nm_plan"]  # the second: is it transposable


def test_nothing_is_looked_at_in_a_capture(monkeypatch):
    x, values, index = problem(torch.bfloat16)
    monkeypatch.setattr(nm_cuda, "capturing", lambda like: True)
    said = "nm_linear: expected a plan made by nm_plan while a CUDA graph is captured, got none"
    with pytest.raises(RuntimeError, match=said):
        nm_cuda._linear(x, values, index, None, None, None, 2, 4)


def test_a_weight_of_another_size_is_refused():
    x, values, index = problem(torch.bfloat16)
    said = r"nm_linear: expected index of shape \(48, 4\), got \(48, 3\)"
    with pytest.raises(RuntimeError, match=said):
        nm_cuda._linear(x, values, index[:, :3], None, None, None, 2, 4)
    said = r"nm_linear: expected values of shape \(48, 16\), got \(48, 15\)"
    with pytest.raises(RuntimeError, match=said):
        nm_cuda._linear(x, values[:, :15], index, None, None, None, 2, 4)
