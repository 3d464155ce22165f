"""csr_linear and its gradients through cuSPARSE's stand-in."""

import gc

import pytest
import torch
from conftest import SPARSE
from samples import csr_of, random_weight

from sparsekern.ops import csr_cuda, cuda_support
from sparsekern.ops._library import without_views

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def problem(dtype, tokens=9, cols=37, rows=21, sparsity=0.6):
    values, crow, col = csr_of(random_weight(rows, cols, sparsity, "skewed"))
    x = torch.randn(tokens, cols).to(dtype)
    return x, values.to(dtype), crow, col


def plans(crow, col, cols):
    return csr_cuda._plan(crow, col, cols), csr_cuda._plan(crow, col, cols, transpose=True)


def dense_of(values, crow, col, cols):
    return csr_cuda.dense_weight(values, crow, col, cols).double()


def close(have, want, dtype):
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_every_way_forward(dtype, activation, only):
    x, values, crow, col = problem(dtype)
    bias = torch.randn(21).to(dtype)
    plan, _ = plans(crow, col, 37)
    want = torch.nn.functional.linear(x.double(), dense_of(values, crow, col, 37), bias.double())
    want = {"none": want, "relu": want.relu(), "gelu": torch.nn.functional.gelu(want)}[activation]
    names = [f"cusparse {a}{'r' if r else 'c'}" for a, r in csr_cuda.algorithms(dtype)]
    for name in [*names, "dense"]:
        only(name)
        for shape in ((9, 37), (3, 3, 37)):
            y = csr_cuda._linear(x.view(shape), values, crow, col, bias, plan, None, activation)
            assert y.shape == (*shape[:-1], 21) and y.is_contiguous()
            close(y.view(9, 21), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_backward(dtype, only):
    x, values, crow, col = problem(dtype)
    grad = torch.randn(9, 21).to(dtype)
    plan, plan_t = plans(crow, col, 37)
    weight = dense_of(values, crow, col, 37)
    want_x = grad.double() @ weight
    want_values = (grad.double().t() @ x.double()).flatten()[csr_cuda.flat_index(crow, col, 37)]
    for name in [f"cusparse {a}{'r' if r else 'c'}" for a, r in csr_cuda.algorithms(dtype)]:
        only(name)
        close(csr_cuda._grad_input(grad, values, crow, col, plan_t, 37), want_x, dtype)
    names = ["dense"]
    if dtype in csr_cuda.SDDMM_DTYPES:
        names += ["cusparse plain", "cusparse transposed"]
    for name in names:
        only(name)
        for made in (plan, plan_t):
            close(csr_cuda._grad_values(grad, x, crow, col, made), want_values, dtype)


def test_results_can_be_changed_in_place(only):
    """As registered: autograd would refuse it of a view."""
    x, values, crow, col = problem(torch.float32)
    plan, plan_t = plans(crow, col, 37)
    only("cusparse 3c")
    linear = without_views(csr_cuda._linear)
    assert not linear(x.view(3, 3, 37), values, crow, col, None, plan)._is_view()
    back = without_views(csr_cuda._grad_input)
    assert not back(x.new_ones(3, 3, 21), values, crow, col, plan_t, 37)._is_view()


def test_unaligned_operands_are_copied(only):
    x, values, crow, col = problem(torch.float32)
    plan, _ = plans(crow, col, 37)
    shifted = torch.empty(values.numel() + 1)[1:].copy_(values)
    assert shifted.data_ptr() % 16
    only("cusparse 3c")
    y = csr_cuda._linear(x, shifted, crow, col, None, plan)
    close(y, x.double() @ dense_of(values, crow, col, 37).t(), torch.float32)


def test_a_plan_is_made_once_per_shape_and_stream(only, streams):
    x, values, crow, col = problem(torch.float32)
    plan, _ = plans(crow, col, 37)
    only("cusparse 3c")

    def made(tokens):
        before = SPARSE.stub_count(b"spmm preprocess")
        csr_cuda._linear(x[:tokens], values, crow, col, None, plan)
        return SPARSE.stub_count(b"spmm preprocess") - before

    assert [made(t) for t in (9, 9, 4, 4, 9)] == [1, 0, 1, 0, 0]
    streams.cuda_stream = 2  # its replays may overlap with those of the other
    x = x.clone()
    assert cuda_support.recall(plan) is not None
    assert made(9) == 0  # CPU tensors have no stream: the key of a stream needs a GPU


def test_plans_are_bounded_and_freed(only):
    x, values, crow, col = problem(torch.float32)
    plan, _ = plans(crow, col, 37)
    only("cusparse 3c")

    def alive():
        return SPARSE.stub_count(b"csr") - SPARSE.stub_count(b"csr freed")

    gc.collect()
    before = alive()
    for tokens in range(1, 10):
        csr_cuda._linear(x[:tokens], values, crow, col, None, plan)
    csr_cuda._linear(torch.randn(40, 37), values, crow, col, None, plan)
    assert alive() - before == cuda_support.MAX_PLANS
    del plan
    csr_cuda._plan(crow, col, 37)  # sweeps what has ended
    gc.collect()
    assert alive() == before


def test_a_foreign_plan_is_not_trusted(only):
    """Copied, moved, unpickled: the contents of such a plan may be of another device."""
    x, values, crow, col = problem(torch.float32)
    foreign = torch.full((50,), -1, dtype=torch.int32)
    want = x.double() @ dense_of(values, crow, col, 37).t()
    only("cusparse 3c")
    for _ in range(2):
        close(csr_cuda._linear(x, values, crow, col, None, foreign), want, torch.float32)
        back = csr_cuda._grad_input(x.new_ones(9, 21), values, crow, col, foreign[:0].clone(), 37)
        close(back, x.new_ones(9, 21).double() @ dense_of(values, crow, col, 37), torch.float32)


def test_other_index_tensors_get_a_plan_of_their_own(only):
    x, values, crow, col = problem(torch.float32)
    plan, _ = plans(crow, col, 37)
    only("cusparse 3c")
    csr_cuda._linear(x, values, crow, col, None, plan)
    before = SPARSE.stub_count(b"spmm preprocess")
    csr_cuda._linear(x, values, crow.clone(), col.clone(), None, plan)
    assert SPARSE.stub_count(b"spmm preprocess") == before + 1


def test_a_capture_takes_a_prepared_plan_for_itself(only, monkeypatch):
    x, values, crow, col = problem(torch.float32)
    plan, _ = plans(crow, col, 37)
    only("cusparse 3c")
    csr_cuda._linear(x, values, crow, col, None, plan)
    made = SPARSE.stub_count(b"spmm preprocess")
    with monkeypatch.context() as patch:
        patch.setattr(cuda_support, "capturing", lambda like: True)
        csr_cuda._linear(x, values, crow, col, None, plan)
    assert SPARSE.stub_count(b"spmm preprocess") == made
    csr_cuda._linear(x, values, crow, col, None, plan)  # the graph keeps the other
    assert SPARSE.stub_count(b"spmm preprocess") == made + 1
    assert len(cuda_support.recall(plan).pinned) == 1


def test_a_library_without_half_precision_is_left_out(recwarn):
    SPARSE.stub_refuse_half(1)
    x, values, crow, col = problem(torch.bfloat16)
    plan, _ = plans(crow, col, 37)
    want = x.double() @ dense_of(values, crow, col, 37).t()
    for _ in range(3):
        close(csr_cuda._linear(x, values, crow, col, None, plan), want, torch.bfloat16)
    messages = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert len(messages) == 2  # one for each layout, once
    assert all("csr_linear goes on without cusparse 3" in m for m in messages)
    assert "CUSPARSE_STATUS_NOT_SUPPORTED" in messages[0]


@pytest.mark.parametrize(("tokens", "cols", "rows", "sparsity"), [(0, 5, 4, 0.5), (3, 5, 4, 1.0)])
def test_empty_problems(tokens, cols, rows, sparsity):
    x, values, crow, col = problem(torch.float32, tokens, cols, rows, sparsity)
    if sparsity == 1:
        values, crow, col = csr_of(torch.zeros(rows, cols))
    plan, plan_t = plans(crow, col, cols)
    bias = torch.randn(rows)
    y = csr_cuda._linear(x, values, crow, col, bias, plan)
    weight = dense_of(values, crow, col, cols)
    close(y, torch.nn.functional.linear(x.double(), weight, bias.double()), torch.float32)
    grad = torch.ones(tokens, rows)
    assert csr_cuda._grad_input(grad, values, crow, col, plan_t, cols).shape == (tokens, cols)
    assert csr_cuda._grad_values(grad, x, crow, col, plan).shape == values.shape


def test_the_fastest_way_is_kept(monkeypatch):
    from sparsekern.ops import cuda_choice

    calls = []

    def way(name):
        return lambda: calls.append(name)

    times = {"a": 3.0, "b": 1.0, "c": 9.0}
    monkeypatch.setattr(cuda_choice, "elapsed_ms", lambda call, n: (call(), times[calls[-1]])[1])
    ways = {name: way(name) for name in times}
    cuda_choice.run_fastest(("op", 1), ways, torch.zeros(1))
    calls.clear()
    cuda_choice.run_fastest(("op", 1), ways, torch.zeros(1))
    assert calls == ["b"]


def test_nothing_is_timed_when_results_must_repeat(monkeypatch):
    from sparsekern.ops import cuda_choice

    monkeypatch.setattr(cuda_choice, "elapsed_ms", None)
    monkeypatch.setenv("SPARSEKERN_TUNE", "0")
    assert cuda_choice.run_fastest(("op", 2), {"a": lambda: 1, "b": lambda: 2}, torch.zeros(1)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_major": False, "algorithm": 7}, "csr_linear: expected algorithm 1, 2 or 3, got 7"),
        ({"col": torch.int64}, "csr_linear: expected col of dtype int32, got int64"),
        ({"values": 3}, "csr_linear: expected values.numel() = "),
    ],
)
def test_messages_of_the_compiled_half(change, message):
    x, values, crow, col = problem(torch.float32)
    col = col.to(change.get("col", torch.int32))
    values = values[: change.get("values", values.numel())].clone()
    with pytest.raises(RuntimeError, match="expected") as caught:
        torch.ops.sparsekern._cusparse_spmm_plan(
            crow, col, values, x, x.new_empty(9, 21), False, change.get("algorithm", 3)
        )
    assert message in str(caught.value)


def test_a_workspace_without_room_is_told_and_another_way_taken(recwarn):
    x, values, crow, col = problem(torch.float32)
    plan, _ = plans(crow, col, 37)
    SPARSE.stub_greedy(1)
    want = x.double() @ dense_of(values, crow, col, 37).t()
    close(csr_cuda._linear(x, values, crow, col, None, plan), want, torch.float32)
    said = str(recwarn[0].message)
    assert "expected 1152921504606846976 bytes of GPU memory for the workspace" in said


def test_a_freed_plan_is_refused():
    x, values, _, _ = problem(torch.float32)
    with pytest.raises(RuntimeError, match="expected the number of a live plan, got 987654"):
        torch.ops.sparsekern._cusparse_spmm(987654, values, x, x)


def test_without_a_plan_every_index_is_looked_at():
    """Nothing vouches for it then, and a kernel would read past the end of x."""
    x, values, crow, col = problem(torch.float32)
    with pytest.raises(RuntimeError, match=r"csr_linear: expected col to rise .* in \[0, 37\)"):
        csr_cuda._linear(x, values, crow, col + 37)
    with pytest.raises(RuntimeError, match=r"csr_linear_grad_values: expected col to rise"):
        csr_cuda._grad_values(torch.randn(9, 21), x, crow, col + 37, None)
    with pytest.raises(RuntimeError, match=r"csr_linear_grad_input: expected col to rise"):
        csr_cuda._grad_input(torch.randn(9, 21), values, crow, col + 37, None, 37)


def test_what_a_first_backward_has_made_vouches(only):
    """A layer without schedules for gradients comes with an empty one; a capture cannot look."""
    _, values, crow, col = problem(torch.float32)
    grad, empty = torch.randn(9, 21), torch.empty(0, dtype=torch.int32)
    only("cusparse 3c")
    with pytest.raises(RuntimeError, match=r"csr_linear_grad_input: expected crow to start at 0"):
        csr_cuda._grad_input(grad, values, crow + 1, col, empty, 37)
    want = grad.double() @ dense_of(values, crow, col, 37)
    with pytest.MonkeyPatch.context() as patch:
        looked = []
        patch.setattr(csr_cuda, "check_indices", lambda op, *rest: looked.append(op))
        for _ in range(2):
            close(csr_cuda._grad_input(grad, values, crow, col, empty, 37), want, torch.float32)
    assert looked == ["csr_linear_grad_input", "csr_plan"]


@pytest.mark.parametrize("given", [None, torch.empty(0, dtype=torch.int32)], ids=["none", "empty"])
def test_nothing_is_looked_at_in_a_capture(given, monkeypatch):
    x, values, crow, col = problem(torch.float32)
    grad = torch.randn(9, 21)
    monkeypatch.setattr(csr_cuda, "capturing", lambda like: True)
    said = "expected a plan made by csr_plan while a CUDA graph is captured, got none"
    with pytest.raises(RuntimeError, match=f"csr_linear: {said}"):
        csr_cuda._linear(x, values, crow, col, None, given)
    with pytest.raises(RuntimeError, match=f"csr_linear_grad_input: {said}"):
        csr_cuda._grad_input(grad, values, crow, col, given, 37)
    with pytest.raises(RuntimeError, match=f"csr_linear_grad_values: {said}"):
        csr_cuda._grad_values(grad, x, crow, col, given)


def test_an_empty_plan_serves_two_patterns(only):
    """And both directions: nothing made for one of them is taken for another."""
    empty, problems = torch.empty(0, dtype=torch.int32), []
    for sparsity in (0.6, 0.8):
        problems.append(problem(torch.float32, sparsity=sparsity))
    only("cusparse 3c")
    for x, values, crow, col in 2 * problems:
        weight, grad = dense_of(values, crow, col, 37), torch.randn(9, 21)
        y = csr_cuda._linear(x, values, crow, col, None, empty)
        close(y, x.double() @ weight.t(), torch.float32)
        back = csr_cuda._grad_input(grad, values, crow, col, empty, 37)
        close(back, grad.double() @ weight, torch.float32)
