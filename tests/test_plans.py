"""A plan vouches for the indices it was made of, and for nothing else."""

import copy
import gc
import pickle
import threading

import pytest
import torch

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.ops.csr import csr_linear, csr_plan
from sparsekern.ops.nm import nm_linear, nm_plan

pytestmark = pytest.mark.skipif(_C is None, reason="only compiled kernels have plans")

PATTERNS = ("unstructured", "block:4x4", "vector:4x1", "2:4")
X = torch.randn(40, 32)


def layer_of(pattern, seed=0, **options):
    torch.manual_seed(seed)
    sparsity = None if pattern == "2:4" else 0.5
    return sk.SparseLinear(32, 32, sparsity=sparsity, pattern=pattern, **options)


def conv_of(pattern):
    torch.manual_seed(0)
    sparsity = None if pattern == "2:4" else 0.5
    return sk.SparseConv2d(8, 8, 3, sparsity=sparsity, pattern=pattern)


def train(layer, x):
    layer(x.clone().requires_grad_()).square().sum().backward()


def changed(plan, word, by):
    plan = plan.clone()
    plan[word] += by
    return plan


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("few", [True, False])
def test_every_word_of_a_plan_counts(pattern, few):
    layer = layer_of(pattern)
    x = X[:1] if few else X
    layer(x)
    plan = layer.weight.plan
    words = range(len(plan)) if len(plan) < 200 else torch.randint(len(plan), (200,)).tolist()
    for word in words:
        layer.weight.plan = changed(plan, word, 1)
        with pytest.raises(RuntimeError, match=r"expected plan made by \w+_plan for this pattern"):
            layer(x)
    layer.weight.plan = plan
    layer(x)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("make, x", [(layer_of, X), (conv_of, torch.randn(2, 8, 6, 6))])
def test_changed_in_place_after_calls(pattern, make, x):
    layer = make(pattern)
    train(layer, x)
    for name in ("plan", "plan_t"):
        plan = getattr(layer.weight, name)
        plan[20 % len(plan)] += 1
        with pytest.raises(RuntimeError, match=f"expected {name} made by"):
            train(layer, x)
        plan[20 % len(plan)] -= 1
        train(layer, x)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("make, x", [(layer_of, X), (conv_of, torch.randn(2, 8, 6, 6))])
def test_indices_changed_after_calls(pattern, make, x):
    layer = make(pattern)
    y = layer(x)
    for index in layer.weight.indices():
        place = index.numel() // 2
        index.view(-1)[place] += 1
        with pytest.raises(RuntimeError, match="or indices that were changed since"):
            layer(x)
        index.view(-1)[place] -= 1
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_plan_of_another_weight_of_the_same_counts(pattern):
    one, two = layer_of(pattern, 0, format="auto"), layer_of(pattern, 1)
    one(X), two(X)
    one.weight.plan, two.weight.plan = two.weight.plan, one.weight.plan
    for layer in (one, two):
        with pytest.raises(RuntimeError, match="a plan of another pattern"):
            layer(X)


def test_averaged_and_copied_plans():
    layer = layer_of("unstructured")
    y, plan = layer(X), layer.weight.plan
    layer.weight.plan = (plan.float() * 0.9).int()
    with pytest.raises(RuntimeError, match="a plan whose words were changed"):
        layer(X)
    layer.weight.plan = plan.clone()
    assert torch.equal(layer(X), y)
    layer.weight.plan = torch.stack([plan, plan], 1)[:, 0]  # not contiguous
    assert torch.equal(layer(X), y)
    for short in (plan[:3], plan[:-1], plan.view(1, -1)):
        layer.weight.plan = short
        with pytest.raises(RuntimeError, match="csr_linear: expected plan"):
            layer(X)


def test_no_other_tensor_takes_the_place_of_the_indices_of_a_plan():
    layer = layer_of("unstructured")
    crow, col, values = layer.weight.crow, layer.weight.col, layer.weight.values
    plan = csr_plan(crow, col, 32)
    memory, count = col.data_ptr(), col.numel()
    layer.weight.col = torch.zeros(0, dtype=torch.int32)
    layer.weight.plan = torch.zeros(0, dtype=torch.int32)
    del col
    gc.collect()
    taken = [torch.zeros(count, dtype=torch.int32) for _ in range(50)]
    assert all(t.data_ptr() != memory for t in taken)  # the plan still holds it
    for t in taken:
        with pytest.raises(RuntimeError, match="a plan of another pattern"):
            csr_linear(X, values, crow, t, None, plan)


def test_tensors_of_inference_mode_are_read_at_every_call():
    with torch.inference_mode():
        layer = layer_of("unstructured")
        crow, col = layer.weight.crow.clone(), layer.weight.col.clone()
        plan = csr_plan(crow, col, 32)
        y = csr_linear(X, layer.weight.values, crow, col, None, plan)
        assert torch.equal(y, csr_linear(X, layer.weight.values, crow, col))
        col[3] += 1
        with pytest.raises(RuntimeError, match="indices that were changed since"):
            csr_linear(X, layer.weight.values, crow, col, None, plan)


def test_nm_plans_are_bound_to_bytes():
    weight = layer_of("2:4").weight
    plan = nm_plan(weight.index, 32, 32, 2, 4)
    index = weight.index.clone()
    y = nm_linear(X, weight.values, index, None, plan, None, 2, 4)
    index[0, 0] ^= 1
    with pytest.raises(RuntimeError, match="nm_linear: expected plan made by nm_plan"):
        nm_linear(X, weight.values, index, None, plan, None, 2, 4)
    index[0, 0] ^= 1
    assert torch.equal(nm_linear(X, weight.values, index, None, plan, None, 2, 4), y)


def test_many_threads_make_use_and_drop_plans():
    failures = []

    def work(seed):
        try:
            for _ in range(50):
                layer = layer_of("unstructured", seed)
                assert torch.equal(layer(X), layer(X))
        except Exception as error:  # a thread's error is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures


def remembered(layer):
    """Whether a change that torch does not count stays unseen: the plan was not read again."""
    plan = layer.weight.plan
    plan.data[2] += 1  # a size, which is compared at every call, by the seal first
    with pytest.raises(RuntimeError) as error:
        layer(X)
    plan.data[2] -= 1
    return "words were changed" not in str(error.value)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copies_of_layers_have_plans_of_their_own(pattern, tmp_path):
    layer = layer_of(pattern)
    y = layer(X)
    torch.save(layer, tmp_path / "layer.pt")
    shared = layer_of(pattern)
    shared.share_memory()
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
        shared,
        layer.double().float(),
    ]
    for one in copies:
        assert torch.equal(one(X), y)
        assert remembered(one)
        train(one, X)
    layer.weight.plan = layer.weight.plan.clone()
    assert not remembered(layer)


def test_layers_made_in_inference_mode_are_like_others():
    dense = torch.nn.Linear(32, 32)
    sk.prune(dense, sparsity=0.5)
    with torch.inference_mode():
        layer = sk.SparseLinear.from_dense(dense)
        y = layer(X)
    assert not any(t.is_inference() for t in (*layer.parameters(), *layer.buffers()))
    assert remembered(layer) and torch.equal(layer(X), y)
    train(layer, X)
    assert layer.weight.values.grad.abs().sum() > 0


def test_what_is_written_onto_itself_is_read_once_more():
    layer = layer_of("unstructured")
    y = layer(X)
    layer.weight.col.copy_(layer.weight.col.clone())
    assert torch.equal(layer(X), y)
    assert remembered(layer)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("make, x", [(layer_of, X), (conv_of, torch.randn(2, 8, 6, 6))])
def test_indices_that_are_given_other_memory(pattern, make, x):
    """`index.data = other` is not counted: the version stays, the memory is another."""
    layer = make(pattern)
    y = layer(x)
    for index in layer.weight.indices():
        own = index.data
        index.data = torch.full_like(own, 113)
        for _ in range(20):  # another tensor may be put where the first one was, but for the plan
            index.data = torch.full_like(own, 113)
            with pytest.raises(RuntimeError, match="or indices that were changed since"):
                layer(x)
        index.data = own
        assert torch.equal(layer(x), y)


def test_indices_can_be_swapped():
    """torch.utils.swap_tensors refuses a tensor that something else holds."""
    layer = layer_of("unstructured")
    y = layer(X).detach()  # a graph holds them, too
    torch.utils.swap_tensors(layer.weight.col, layer.weight.col.clone())
    assert torch.equal(layer(X), y)
    torch.utils.swap_tensors(layer.weight.col, torch.zeros_like(layer.weight.col))
    with pytest.raises(RuntimeError, match="or indices that were changed since"):
        layer(X)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pickles_in_which_the_indices_were_buffers(pattern):
    layer = layer_of(pattern)
    y, old = layer(X), copy.deepcopy(layer)
    weight = old.weight
    for name in (*weight.parts[1:], "plan", "plan_t"):
        index = weight.__dict__.pop(name)
        weight.register_buffer(name, index, persistent=name in weight.parts)
    again = pickle.loads(pickle.dumps(old))
    assert torch.equal(again(X), y) and not list(again.buffers())
    assert set(again.state_dict()) == set(layer.state_dict())
    assert remembered(again)
