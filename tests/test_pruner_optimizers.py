"""A Pruner with several optimizers, wrapped ones, and others that step in between."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from pruner_common import X, Y, backward, make_pruner, mlp, one_thread, sgd, train, weights  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import sparsekern as sk
from sparsekern.prune import Pruner, schedules
from sparsekern.prune.optimizers import chain

METHODS = ["magnitude", "movement", "soft_movement", "rigl", "srste"]


class Accelerated(torch.optim.Optimizer):
    """As accelerate wraps: an Optimizer that never called its base, and skips steps at will."""

    def __init__(self, optimizer):
        self.optimizer, self.accumulates = optimizer, False

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def zero_grad(self, set_to_none=True):
        if not self.accumulates:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        if not self.accumulates:
            self.optimizer.step(closure)


class Plain:
    """As DeepSpeed and apex wrap: no Optimizer at all."""

    def __init__(self, optimizer, name="optimizer"):
        setattr(self, name, optimizer)
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step
        self.param_groups = optimizer.param_groups


class Lookahead(torch.optim.Optimizer):
    """Goes half the way back to where it was: after the inner step, dropped weights return."""

    def __init__(self, inner):
        self.base_optimizer = inner
        super().__init__(inner.param_groups, {})
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    def zero_grad(self, set_to_none=True):
        self.base_optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.base_optimizer.step()
        for fast, slow in self.slow.items():
            fast.copy_(slow.lerp_(fast, 0.5))


class Shares(torch.optim.Optimizer):
    """As Lightning wraps: all attributes of the inner one, its hooks included."""

    def __init__(self, inner):
        self.__dict__ = {k: v for k, v in vars(inner).items() if k != "step"}
        self._optimizer = inner

    optimizer = property(lambda self: self._optimizer)

    def step(self, closure=None):
        self._optimizer.step()


def two(model):
    first = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    rest = [*model[1].parameters(), *model[3].parameters(), *model[5].parameters()]
    return first, torch.optim.AdamW(rest, 1e-2, weight_decay=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_two_optimizers_keep_every_zero(method):
    model = mlp()
    first, second = two(model)
    pruner = make_pruner(method, model, [first, second])
    for step in range(20):
        first.zero_grad(), second.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        first.step()
        second.step()
        pruner.step()
        assert pruner.steps == step + 1
        for weight, mask in zip(weights(model), pruner.masks.values()):
            assert (weight[~mask] == 0).all()
    for optimizer in (first, second) if method != "srste" else ():
        for name, mask in pruner.masks.items():
            for value in optimizer.state[model.get_submodule(name).weight].values():
                if value.shape == mask.shape:
                    assert (value[~mask] == 0).all()
    assert pruner.finalize().sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_two_optimizers_are_one_bit_by_bit(method):
    results = []
    for several in (False, True):
        model = mlp()
        groups = [model[:2].parameters(), model[2:].parameters()] if several else None
        groups = groups or [model.parameters()]
        optimizers = [torch.optim.SGD(group, 0.1, momentum=0.9) for group in groups]
        pruner = make_pruner(method, model, optimizers if several else optimizers[0])
        for _ in range(20):
            model.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            [optimizer.step() for optimizer in optimizers]
            pruner.step()
        results.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_layers_that_no_optimizer_holds_are_refused_by_name():
    model = mlp()
    first, _ = two(model)
    wanted = (
        r"Pruner: expected optimizers that hold every pruned layer that trains, got none for "
        r"\['3', '5'\]; pass all of them, as optimizer=\[first, second\], name these layers in "
        r"ignore, or freeze them by requires_grad_\(False\)"
    )
    with pytest.raises(ValueError, match=wanted):
        Pruner(model, first)
    assert not hasattr(model[0], "weight_mask") and not model[0].weight._backward_hooks
    Pruner(model, first, ignore=["3", "5"]).finalize()
    model[3].requires_grad_(False), model[5].requires_grad_(False)
    Pruner(model, [first]).finalize()
    model.requires_grad_(True)
    Pruner(model, two(model)).finalize()


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        ([], ValueError, "expected at least one optimizer, got an empty list"),
        (None, TypeError, "expected a torch.optim.Optimizer, got NoneType"),
        ([3], TypeError, "expected optimizers of torch.optim, got int"),
        ("scheduler", TypeError, "expected a torch.optim.Optimizer, got StepLR"),
        ("twice", ValueError, "expected each optimizer once, got one twice"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer, error, message):
    model = mlp()
    if optimizer == "scheduler":
        optimizer = torch.optim.lr_scheduler.StepLR(sgd(model), 1)
    elif optimizer == "twice":
        optimizer = [sgd(model)] * 2
    with pytest.raises(error, match=f"Pruner: {message}"):
        Pruner(model, optimizer)


WRAPPERS = {
    "accelerate": Accelerated,
    "accelerate around a plain one": lambda o: Accelerated(Plain(o)),
    "plain": Plain,
    "apex": lambda o: Plain(o, "optim"),
    "lookahead": Lookahead,
    "shared hooks": Shares,
    "accelerate around lookahead": lambda o: Accelerated(Lookahead(o)),
}


@pytest.mark.parametrize("method", ["magnitude", "movement", "rigl", "srste"])
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_wrapped_optimizers(wrapper, method):
    model, plain = mlp(), mlp()
    optimizer, other = WRAPPERS[wrapper](sgd(model)), sgd(plain)
    pruner, reference = make_pruner(method, model, optimizer), make_pruner(method, plain, other)
    for _ in range(20):
        train(model, optimizer, pruner, 1)
        train(plain, other, reference, 1)
        for weight, mask in zip(weights(model), pruner.masks.values()):
            assert (weight[~mask] == 0).all()
    assert pruner.steps == 20
    if "lookahead" not in wrapper:
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain)))
    assert pruner.finalize().sparsity == pytest.approx(0.5, abs=0.02)


def test_accumulated_gradients_count_as_one_step():
    model = mlp()
    optimizer = Accelerated(sgd(model))
    pruner = make_pruner("movement", model, optimizer)
    for micro in range(40):
        optimizer.accumulates = micro % 4 != 3
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        assert pruner.steps == (micro + 1) // 4


def test_a_chain_is_looked_through_and_cycles_end():
    inner = sgd(mlp())
    wrapper = Plain(Accelerated(inner))
    inner.optimizer = wrapper
    assert chain(wrapper) == [inner]
    del inner.optimizer
    several, other = Accelerated(inner), sgd(mlp())
    several.optimizers = [inner, other]
    assert chain(several) == [inner, other]


def test_zero_redundancy_optimizer():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, plain = mlp(), mlp()
        kind = {"lr": 0.1, "momentum": 0.9}
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, **kind)
        other = torch.optim.SGD(plain.parameters(), **kind)
        pruner = make_pruner("movement", model, optimizer)
        train(model, optimizer, pruner, 20)
        train(plain, other, make_pruner("movement", plain, other), 20)
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain)))
        mask = pruner.masks["0"]
        momentum = optimizer.optim.state[model[0].weight]["momentum_buffer"]
        assert pruner.steps == 20 and (momentum[~mask] == 0).all()
    finally:
        dist.destroy_process_group()


def test_steps_that_a_scheduler_or_a_scaler_wraps_count_once():
    model = mlp()
    first, second = two(model)
    pruner = Pruner(model, [first, second], schedule=schedules.OneShot(0.5, at=2))
    rates = [torch.optim.lr_scheduler.StepLR(o, 1) for o in (first, second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (math.inf, 1, math.inf, 1, 1):
        first.zero_grad(), second.zero_grad()
        scaler.scale(F.cross_entropy(model(X), Y) * factor).backward()
        scaler.step(first), scaler.step(second)
        scaler.update()
        [rate.step() for rate in rates]
        pruner.step()
    assert pruner.steps == 3 and pruner.report().sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_layer_that_joins_an_optimizer_later_is_guarded():
    model = mlp()
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[5].parameters()], 0.1)
    pruner = Pruner(model, optimizer, sparsity=0.5, scope="uniform")
    train(model, optimizer, pruner, 2)
    model[3].requires_grad_(True)
    optimizer.add_param_group({"params": model[3].parameters(), "weight_decay": 0.1})
    before = model[3].weight.detach().clone()
    train(model, optimizer, pruner, 2)
    assert not torch.equal(model[3].weight, before)
    assert [la.sparsity for la in pruner.report().layers] == [0.5, 0.5, 0.5]


def test_a_step_of_another_optimizer_is_an_error_before_it_changes_anything():
    model = mlp()
    old = sgd(model)
    pruner = Pruner(model, old, sparsity=0.5)
    train(model, old, pruner, 2)
    new = torch.optim.Adam(model[3].parameters(), 0.1)
    backward(model, new)
    before = weights(model)[1].clone()
    with pytest.raises(RuntimeError, match=r"got one of another Adam that holds the weights of"):
        new.step()
    assert torch.equal(model[3].weight, before)
    other = mlp()
    backward(other, optimizer := sgd(other)), optimizer.step()  # of another model: none of ours

    state = pruner.state_dict()
    pruner.finalize()
    again = Pruner(model, torch.optim.Adam(model.parameters(), 0.01), sparsity=0.5)
    again.load_state_dict(state)
    train(model, again.optimizers[0], again, 2)
    assert again.report().sparsity == 0.5 and again.steps == 4
    again.finalize()
    backward(model, new), new.step()  # free again


def test_what_a_wrapper_holds_may_be_made_anew():
    model = mlp()
    optimizer = Accelerated(sgd(model))
    pruner = Pruner(model, optimizer, sparsity=0.5)
    optimizer.optimizer = sgd(model)
    train(model, optimizer, pruner, 3)
    assert pruner.steps == 3 and pruner.report().sparsity == 0.5


def test_a_step_that_fails_inside_does_not_stop_the_guard():
    class Fails(Lookahead):
        def step(self, closure=None):
            if self.fails:
                raise KeyboardInterrupt
            super().step()

    model = mlp()
    optimizer = Fails(sgd(model))
    pruner = Pruner(model, optimizer, sparsity=0.5)
    optimizer.fails = True
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, pruner, 1)
    optimizer.fails = False
    train(model, optimizer, pruner, 2)
    assert pruner.steps == 2 and pruner.report().sparsity == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_step_by_way_of_the_base_class_is_one_step(method):
    class Derived(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    outcomes = []
    for kind in (torch.optim.AdamW, Derived):  # both classes call the hooks once they have objects
        model = mlp()
        optimizer = kind(model.parameters(), 0.01)
        pruner = make_pruner(method, model, optimizer)
        train(model, optimizer, pruner, 20)
        outcomes.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_no_copy_of_a_pruner_that_would_guard_nothing():
    model = mlp()
    pruner = Pruner(model, sgd(model), sparsity=0.5)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="Pruner: expected no copy and no pickle of a Pruner"):
            copied(pruner)


def test_tickets_rewind_all_optimizers():
    model = mlp()
    first, second = two(model)
    pruner = Pruner(model, [first, second], schedule=schedules.Iterative(0.5, 2, 4))
    ticket = sk.LotteryTicket(pruner)
    start = copy.deepcopy(model.state_dict())
    for _ in range(5):
        first.zero_grad(), second.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        first.step(), second.step()
        pruner.step()
    ticket.rewind()
    assert not first.state and not second.state
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_submodule(name).weight, start[f"{name}.weight"] * mask)


def test_slimming_scales_in_another_optimizer_stay_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight.uniform_(0.1, 1)
    convs = torch.optim.SGD([*model[0].parameters(), *model[3].parameters()], 0.1)
    norms = torch.optim.SGD(model[1].parameters(), 0.1, weight_decay=0.1)
    options = {"pattern": "filter", "sparsity": 0.5, "scope": "uniform", "ignore": ["3"]}
    average = AveragedModel(model)
    average.update_parameters(model)
    pruner = Pruner(model, [convs, norms], "slimming", **options)
    for _ in range(3):
        convs.zero_grad(), norms.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        convs.step(), norms.step()
        pruner.step()
        dropped = ~pruner.masks["0"].flatten(1).any(1)
        assert dropped.sum() == 4 and (model[1].weight[dropped] == 0).all()
    pruner.apply_masks(average)
    assert (average.module[1].weight[dropped] == 0).all()
    assert (average.module[1].weight[~dropped] != 0).all()
