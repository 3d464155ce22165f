"""Our CUDA kernels for few tokens, from their own sources, on emulated blocks of threads."""

from types import SimpleNamespace

import pytest
import torch
from samples import csr_of, random_nm, random_weight
from torch.nn.functional import gelu

from sparsekern.ops import csr_cuda, cuda_choice, cuda_packed, nm_cuda, own_check, own_cuda
from sparsekern.ops._library import ACTIVATIONS, activate
from sparsekern.ops.csr_packed import csr_lists
from sparsekern.ops.cuda_packed import Packed
from sparsekern.ops.nm import nm_to_dense
from sparsekern.ops.nm_packed import nm_pack

OPS = torch.ops.sparsekern
BF16, FP16 = torch.bfloat16, torch.float16
CLOSE = {BF16: 4e-3, FP16: 6e-4}  # half a unit in the last place of the largest output
WAYS = ("gather", "2:4 + rest")


def close(have, want):
    limit = CLOSE[have.dtype] * max(float(want.abs().max()), 1e-3)
    assert have.shape == want.shape and have.is_contiguous()
    assert float((have.double() - want).abs().max()) <= limit


def nm_problem(tokens, rows, cols, dtype):
    torch.manual_seed(tokens + rows)
    values, index = random_nm(rows, cols, 2, 4)
    values = values.to(dtype)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    weight = nm_to_dense("test", values, index, cols, 2, 4).double()
    return x, values, index, bias, torch.nn.functional.linear(x.double(), weight, bias.double())


def csr_problem(tokens, rows, cols, sparsity, dtype):
    torch.manual_seed(tokens + rows)
    weight = random_weight(rows, cols, sparsity).to(dtype)
    values, crow, col = csr_of(weight)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    return x, values, crow, col, bias, want


@pytest.mark.parametrize(
    "tokens, rows, cols, split, dtype",
    [
        (1, 16, 32, 1, BF16),  # less than a unit
        (8, 33, 1160, 1, FP16),  # two chunks; one row more than a strip
        (3, 40, 130, 1, BF16),  # rows of x that are not aligned
        (5, 32, 6000, 1, BF16),  # more chunks than stages
        (9, 70, 520, 1, BF16),
        (16, 64, 3000, 2, FP16),
        (17, 130, 300, 2, BF16),
        (32, 20, 36, 1, FP16),
        (33, 140, 520, 3, BF16),
        (64, 128, 1100, 1, FP16),
        (2, 48, 2048, 16, BF16),  # parts without columns
        (2, 48, 2048, 8, BF16),  # the largest cluster
        (1, 14341, 264, 1, BF16),  # as many rows, then columns, as layers of Llama-3 have, and some
        (16, 14341, 136, 2, FP16),
        (8, 40, 14340, 7, FP16),
        (64, 33, 14344, 4, BF16),
    ],
)
def test_two_four(tokens, rows, cols, split, dtype):
    x, values, index, bias, want = nm_problem(tokens, rows, cols, dtype)
    packed = nm_pack(values, index, cols)
    x = own_cuda._padded(x)
    close(OPS._own_nm_decode(x, packed, bias, rows, 0, split), want)
    without = OPS._own_nm_decode(x, packed, None, rows, 0, split)
    close(without, want - bias.double())
    if 1 < split <= own_cuda.MAX_CLUSTER:
        together = OPS._own_nm_decode(x, packed, bias, rows, 0, split, True)
        close(together, want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "tokens, rows, cols, sparsity, dtype",
    [
        (1, 16, 32, 0.5, BF16),
        (2, 33, 130, 0.7, FP16),
        (3, 40, 1100, 0.6, BF16),  # two slices
        (8, 70, 260, 0.5, FP16),
        (4, 37, 2500, 0.9, BF16),
        (11, 50, 1300, 0.8, FP16),
        (16, 1, 5, 0.2, BF16),
        (5, 9, 8, 0.95, FP16),
        (64, 140, 96, 0.4, BF16),
        (1, 14341, 264, 0.6, BF16),
        (16, 40, 14340, 0.6, FP16),
    ],
)
def test_unstructured(way, tokens, rows, cols, sparsity, dtype):
    x, values, crow, col, bias, want = csr_problem(tokens, rows, cols, sparsity, dtype)
    close(own_cuda.csr_linear(way, x, values, crow, col, bias, "none", Packed()), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("split", [1, 2])
def test_activations(activation, split):
    x, values, index, bias, want = nm_problem(4, 40, 1200, FP16)
    y = OPS._own_nm_decode(
        x, nm_pack(values, index, 1200), bias, 40, ACTIVATIONS.index(activation), split
    )
    close(y, activate(want, activation, "test"))


def test_the_way_of_the_cluster(only, monkeypatch):
    x, values, index, bias, want = nm_problem(3, 48, 2100, BF16)
    monkeypatch.setattr(own_cuda, "multiprocessors", lambda device: 132)
    plan = nm_cuda._plan(index, 48, 2100, 2, 4)
    only("mma.sp cluster")
    close(nm_cuda._linear(x, values, index, bias, plan, None, 2, 4, "gelu"), gelu(want))
    monkeypatch.undo()
    message = "_own_nm_decode: expected at most 8 parts in a cluster, got 9"
    with pytest.raises(RuntimeError, match=message):
        call("_own_nm_decode", split=9, cluster=True)


def test_weights_that_are_not_stored_touch_nothing():
    """Words that fill up lists must not meet an infinite x either."""
    x, values, crow, col, _, _ = csr_problem(3, 40, 64, 0.9, BF16)
    unused = torch.ones(64, dtype=torch.bool).index_fill_(0, col.long(), False)
    unused[0] = True
    keep = col != 0
    row = torch.repeat_interleave(torch.arange(40), crow.diff().long())[keep]
    crow = torch.nn.functional.pad(torch.bincount(row, minlength=40).cumsum(0), (1, 0)).int()
    values, col = values[keep], col[keep]
    x[:, unused] = float("inf")
    y = own_cuda.csr_linear("gather", x, values, crow, col, None, "none", Packed())
    weight = torch.zeros(40, 64).double().index_put_((row, col.long()), values.double())
    close(y, x.masked_fill(unused, 0).double() @ weight.t())


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_and_infinity_arrive(activation):
    x, values, index, bias, _ = nm_problem(3, 32, 64, BF16)
    x[0], x[1] = float("nan"), float("inf")
    code = ACTIVATIONS.index(activation)
    y = OPS._own_nm_decode(x, nm_pack(values, index, 64), bias, 32, code, 1)
    assert y[0].isnan().all() and not y[1].isfinite().all() and y[2].isfinite().all()


def test_results_repeat_bit_for_bit():
    x, values, crow, col, bias, _ = csr_problem(9, 70, 1300, 0.5, BF16)
    runs = [
        own_cuda.csr_linear("2:4 + rest", x, values, crow, col, bias, "gelu", Packed())
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_the_ways_of_the_ops(only):
    """Through the implementations for CUDA, with a plan that keeps what was packed."""
    x, values, index, bias, want = nm_problem(3, 48, 64, BF16)
    plan = nm_cuda._plan(index, 48, 64, 2, 4)
    only("mma.sp")
    for _ in range(2):
        y = nm_cuda._linear(x.view(3, 1, 64), values, index, bias, plan, None, 2, 4, "relu")
        close(y.view(3, 48), want.relu())
    x, values, crow, col, bias, want = csr_problem(3, 40, 64, 0.6, FP16)
    plan = csr_cuda._plan(crow, col, 64)
    for way in WAYS:
        only(way)
        close(csr_cuda._linear(x, values, crow, col, bias, plan, None, "relu"), want.relu())


def test_any_bias_will_do(only):
    x, values, index, _, _ = nm_problem(3, 48, 64, BF16)
    bias = torch.randn(97).bfloat16()[1::2]  # strides, and no multiple of 16 bytes
    plan = nm_cuda._plan(index, 48, 64, 2, 4)
    only("mma.sp")
    y = nm_cuda._linear(x, values, index, bias, plan, None, 2, 4)
    weight = nm_to_dense("test", values, index, 64, 2, 4).double()
    close(y, torch.nn.functional.linear(x.double(), weight, bias.double()))


def test_a_changed_weight_is_packed_again_in_place(only):
    x, values, crow, col, bias, want = csr_problem(3, 40, 64, 0.6, BF16)
    plan = csr_cuda._plan(crow, col, 64)
    only("2:4 + rest")
    run = lambda: csr_cuda._linear(x, values, crow, col, None, plan)  # noqa: E731
    close(run(), want - bias.double())
    (held,) = [h for (kind, _), h in csr_cuda.recall(plan).packed.items() if kind == "2:4 + rest"]
    places = [t.data_ptr() for t in held.tensors]
    assert held.changes == 0
    with torch.no_grad():
        values.mul_(2)
    close(run(), 2 * (want - bias.double()))
    assert held.changes == 1 and places == [t.data_ptr() for t in held.tensors]
    # What changes all the time goes another way, without our memory.
    held.changes, held.source = own_cuda.MAX_CHANGES, None
    message = "csr_linear: expected a weight that stays, got one that changed 17 times"
    with pytest.raises(RuntimeError, match=message):
        run()
    assert held.tensors is None


def test_nothing_is_sorted_in_a_capture(monkeypatch):
    x, values, crow, col, bias, _ = csr_problem(3, 40, 64, 0.6, BF16)
    monkeypatch.setattr(own_cuda, "capturing", lambda like: True)
    message = "csr_linear: expected one product before the capture, got a weight to be packed"
    with pytest.raises(RuntimeError, match=message):
        own_cuda.csr_linear("gather", x, values, crow, col, bias, "none", Packed())


def test_the_choice_times_them(monkeypatch):
    """They are among the ways, and one that fails goes with its reason."""
    x, values, index, bias, want = nm_problem(3, 48, 64, BF16)
    plan = nm_cuda._plan(index, 48, 64, 2, 4)
    arguments = (x, values, index, bias, plan, 2, 4, "none")
    assert list(nm_cuda._linear_ways(*arguments)) == ["mma.sp", "cusparselt", "dense"]
    monkeypatch.setattr(own_cuda, "nm_split", lambda *sizes: 65)
    with pytest.warns(RuntimeWarning, match="nm_linear goes on without mma.sp on this device"):
        y = nm_cuda._linear(x, values, index, bias, plan, None, 2, 4)
    close(y, want)
    (why,) = cuda_choice.choices()[1].values()
    assert why == {"mma.sp": "_own_nm_decode: expected split in 1 to 64, got 65"}


@pytest.mark.parametrize("wrong", [False, True])
def test_a_kernel_that_is_wrong_is_left_out(wrong, monkeypatch):
    x, values, index, bias, _ = nm_problem(3, 48, 64, BF16)
    plan = nm_cuda._plan(index, 48, 64, 2, 4)
    monkeypatch.setattr(own_check, "TOKENS", (1, 9))
    monkeypatch.setattr(own_cuda, "multiprocessors", lambda device: 132)
    if wrong:
        right = own_cuda._OPS._own_csr_decode
        fake = SimpleNamespace(_own_nm_decode=OPS._own_nm_decode)
        fake._own_csr_decode = lambda x, *rest: right(x, *rest) * (1.1 if x.shape[0] > 1 else 1)
        monkeypatch.setattr(own_cuda, "_OPS", fake)
    ways = nm_cuda._linear_ways(x, values, index, bias, plan, 2, 4, "none")
    assert "mma.sp" in ways  # one that is wrong takes no other along
    (found,) = own_check._FOUND.values()
    said = "expected a right product for 9 tokens, got an error of 0."
    assert list(found) == (["gather", "2:4 + rest"] if wrong else [])
    assert all(reason.startswith(said) for reason in found.values())


def test_a_check_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(own_check, "TOKENS", (1,))
    monkeypatch.setattr(own_cuda, "nm_split", lambda *sizes: 65)
    x = torch.zeros(1, 8).bfloat16()
    said = "_own_nm_decode: expected split in 1 to 64, got 65"
    assert own_check.faults(x, (8, 0))["mma.sp"] == said
    with pytest.warns(RuntimeWarning, match=f"nm_linear goes without mma.sp: {said}"):
        assert own_check.sound("nm_linear", ["mma.sp"], x) == []
    monkeypatch.setattr(own_check, "capturing", lambda like: True)
    said = "expected one product before the capture, got none"
    assert own_check.faults(x.half(), (9, 0))["gather"] == said


def test_what_loses_gives_its_memory_back(monkeypatch):
    x, values, index, bias, want = nm_problem(3, 48, 64, BF16)
    plan = nm_cuda._plan(index, 48, 64, 2, 4)
    for winner in ("dense", "mma.sp"):
        monkeypatch.setattr(cuda_choice, "_fastest", lambda key, ways, w=winner: w)
        cuda_choice._CHOSEN.clear()
        own_cuda.nm_linear(x, values, index, bias, "none", _own_of(plan, values), False)
        close(nm_cuda._linear(x, values, index, bias, plan, None, 2, 4), want)
        assert (_own_of(plan, values).tensors is None) == (winner == "dense")


def test_what_a_graph_reads_stays(monkeypatch):
    x, values, index, bias, _ = nm_problem(3, 48, 64, BF16)
    held = Packed()
    own_cuda.nm_linear(x, values, index, bias, "none", held, False)
    monkeypatch.setattr(cuda_packed, "capturing", lambda like: True)
    own_cuda.nm_linear(x, values, index, bias, "none", held, False)
    held.release()
    assert held.tensors is not None


def _own_of(plan, values):
    return cuda_packed.packed_record(plan, values, ("own", BF16))


def call(op, **change):
    x, values, index, bias, _ = nm_problem(3, 40, 64, BF16)
    words, starts = csr_lists(values[:, 0], torch.arange(40), torch.arange(40), 40, 64)
    given = {"x": x, "packed": nm_pack(values, index, 64), "bias": bias, "rows": 40}
    given |= {"activation": 0, "split": 1}
    if op == "_own_csr_decode":
        given |= {"words": words, "starts": starts, "width": 64}
    return getattr(OPS, op)(**{**given, **change})


@pytest.mark.parametrize("op", ["_own_nm_decode", "_own_csr_decode"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 64)}, "expected x of dtype"),
        ({"x": torch.zeros(3, 1, 64).bfloat16()}, "expected x with 2 dimensions, got"),
        ({"x": torch.zeros(65, 64).bfloat16()}, "expected 1 to 64 rows of x, got 65"),
        ({"x": torch.zeros(0, 64).bfloat16()}, "expected 1 to 64 rows of x, got 0"),
        ({"rows": 1 << 24}, "expected a weight of 1 to 16777215 rows and columns, got 16777216 x"),
        ({"x": torch.zeros(3, 60).bfloat16()}, "expected x padded to a multiple of 8 columns, got"),
        ({"activation": 5}, "expected activation 0 to 4, got 5"),
        ({"bias": torch.zeros(40)}, "expected bias of dtype"),
        ({"bias": torch.zeros(39).bfloat16()}, r"expected bias\.numel\(\) = 40, got 39"),
        ({"packed": torch.zeros(4608, dtype=torch.uint8)}, "expected bytes of packed = 9216, got"),
        ({"packed": torch.zeros(9216, dtype=torch.int8)}, "expected packed of dtype"),
        ({"split": 0}, "expected split in 1 to 64, got 0"),
    ],
)
def test_messages(op, change, message):
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        call(op, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 2049}, "expected width in 1 to 2048, got 2049"),
        ({"words": torch.zeros(4)}, "expected words of dtype"),
        ({"starts": torch.zeros(40, dtype=torch.int32)}, r"expected starts\.numel\(\) = 41, got"),
        ({"starts": torch.zeros(41)}, "expected starts of dtype"),
    ],
)
def test_messages_of_lists(change, message):
    with pytest.raises(RuntimeError, match=f"_own_csr_decode: {message}"):
        call("_own_csr_decode", **change)


def test_a_kernel_that_fails_is_told():
    """Metadata that do not rise are undefined on a GPU; here they end the launch."""
    x, values, index, _, _ = nm_problem(3, 40, 64, BF16)
    packed = nm_pack(values, index, 64)
    packed[:16] = 0
    message = "expected a kernel that runs, got metadata that are not ordered"
    with pytest.raises(RuntimeError, match=message):
        OPS._own_nm_decode(x, packed, None, 40, 0, 1)
