"""Lottery tickets, sensitivity, OWL, and what one does before and after pruning."""

import copy
import json
import math

import pytest
import torch
from pruner_common import one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

from sparsekern.prune import (
    LotteryTicket,
    Pruner,
    adjusted_dropout,
    distillation_loss,
    layer_collapse,
    mask_overlap,
    owl,
    prune,
    recalibrate_batchnorm,
    schedules,
    sensitivity,
)

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
Y = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(8))


def mlp(seed=0):
    torch.manual_seed(seed)
    first = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


def state(model):
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


class Training:
    """A training with everything that a rewind must bring back."""

    def __init__(self, **options):
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.2, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.generator = torch.Generator().manual_seed(5)
        self.pruner = Pruner(self.model, self.optimizer, **options)

    def step(self):
        batch = torch.randint(0, 64, (16,), generator=self.generator)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(X[batch]), Y[batch]).backward()
        self.optimizer.step()
        self.scheduler.step()
        return self.pruner.step()

    def ticket(self):
        return LotteryTicket(self.pruner, self.scheduler, self.generator)


@pytest.mark.parametrize("early", [0, 3])
def test_a_ticket_rewinds_everything_and_trains_as_from_the_early_step(early):
    run = Training(schedule=schedules.Iterative(0.75, rounds=2, every=8))
    for _ in range(early):
        run.step()
    ticket, early_state = run.ticket(), state(run.model)
    mean = run.model[1].running_mean.clone()
    rate = run.optimizer.param_groups[0]["lr"]
    while not run.step():
        pass
    masks = {name: mask.clone() for name, mask in run.pruner.masks.items()}
    ticket.rewind()
    for name, mask in masks.items():
        index = [n for n, _ in run.model.named_parameters()].index(f"{name}.weight")
        weight = run.model.get_submodule(name).weight
        assert torch.equal(weight, torch.where(mask, early_state[index], 0))
        momentum = run.optimizer.state[weight].get("momentum_buffer") if early else None
        assert momentum is None or ((momentum[~mask] == 0).all() and (momentum[mask] != 0).any())
    assert torch.equal(run.model[1].running_mean, mean)
    assert run.optimizer.param_groups[0]["lr"] == rate
    first = [run.step() for _ in range(3)] and state(run.model)
    ticket.rewind()
    again = [run.step() for _ in range(3)] and state(run.model)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    while not run.step():
        pass
    assert run.pruner.steps == 16 and run.pruner.report().sparsity == 0.75


def test_a_warm_up_begins_anew_after_a_rewind():
    run = Training(schedule=schedules.Iterative(0.75, rounds=2, every=6))
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda t: min(1, (t + 1) / 4))
    ticket, rates = run.ticket(), []
    for _ in range(2):
        pruned = False
        while not pruned:
            rates.append(run.optimizer.param_groups[0]["lr"])
            pruned = run.step()
        ticket.rewind()
    assert rates[:6] == rates[6:] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


def test_controls_of_the_lottery():
    schedule = schedules.OneShot(0.75, at=1)
    run = Training(schedule=schedule, pattern="block:4x4", scope="uniform")
    ticket = run.ticket()
    assert run.step()
    found = {name: mask.clone() for name, mask in run.pruner.masks.items()}
    ticket.rewind(control="reinit", seed=1)
    assert mask_overlap(run.pruner.masks, found).total == 1
    other, kept = mlp(), found["0"]
    assert not torch.equal(run.model[0].weight[kept], other[0].weight[kept])
    first = run.model[0].weight.detach().clone()
    ticket.rewind(control="reinit", seed=1)
    assert torch.equal(run.model[0].weight, first)
    ticket.rewind(control="random_mask", seed=1)
    assert mask_overlap(run.pruner.masks, found).total < 0.6
    for name, mask in run.pruner.masks.items():
        assert mask.sum() == found[name].sum() and run.pruner.pattern.verify(mask)
        weight = other.get_submodule(name).weight
        assert torch.equal(run.model.get_submodule(name).weight, torch.where(mask, weight, 0))


def test_learning_rate_rewinding_keeps_the_weights():
    run = Training(sparsity=0.5)
    ticket = run.ticket()
    for _ in range(7):
        run.step()
    before, momentum = state(run.model), run.optimizer.state[run.model[0].bias]["momentum_buffer"]
    assert run.optimizer.param_groups[0]["lr"] == 0.05
    ticket.rewind(weights=False)
    assert run.optimizer.param_groups[0]["lr"] == 0.2 and run.scheduler.last_epoch == 0
    assert all(torch.equal(a, b) for a, b in zip(before, state(run.model)))
    assert torch.equal(run.optimizer.state[run.model[0].bias]["momentum_buffer"], momentum)


def test_lottery_errors():
    run = Training(sparsity=0.5)
    with pytest.raises(TypeError, match="LotteryTicket: expected a Pruner, got Sequential"):
        LotteryTicket(run.model)
    for options in ({"control": "x"}, {"control": "reinit", "weights": False}):
        with pytest.raises(
            ValueError, match=r"LotteryTicket.rewind: expected control one of reinit"
        ):
            run.ticket().rewind(**options)
    with pytest.raises(ValueError, match="ticket taken before any pruning for control 'random_ma"):
        run.ticket().rewind(control="random_mask")
    run.model.scale = nn.ParameterList([nn.Parameter(torch.ones(1))])
    with pytest.raises(
        TypeError, match=r"expected modules with reset_parameters\(\) .*ParameterList"
    ):
        run.ticket().rewind(control="reinit")


def accuracy(model):
    with torch.no_grad():
        return float((model.eval()(X).argmax(1) == Y).float().mean())


def test_sensitivity_prunes_one_layer_at_a_time_and_puts_it_back(tmp_path):
    model = mlp()
    before, seen = state(model), []

    def evaluate(model):
        zeros = [int((model[i].weight == 0).sum()) for i in (0, 3, 5)]
        seen.append(zeros)
        model[1].running_mean += 1  # an evaluation that leaves traces
        return 1 - zeros[0] / 384 - 2 * zeros[1] / 384

    result = sensitivity(model, evaluate, (0.75, 0.5))
    model[1].running_mean -= 1  # that of the dense model
    assert all(torch.equal(a, b) for a, b in zip(before, state(model)))
    first = [[0, 0, 0], [192, 0, 0], [288, 0, 0]]
    assert seen == [*first, [0, 192, 0], [0, 288, 0], [0, 0, 32], [0, 0, 48]]
    assert result.baseline == 1 and result.sparsities == (0.5, 0.75)
    assert result.scores == {"0": (0.5, 0.25), "3": (0, -0.5), "5": (1, 1)}
    assert result.scope(0.6) == {"0": 0.5, "3": 0.0, "5": 0.75}
    assert prune(mlp(), scope=result.scope(0.6)).layers[0].sparsity == 0.5
    assert json.loads(json.dumps(result.to_dict()))["scores"]["0"] == [0.5, 0.25]
    assert "dense: 1" in str(result) and "0.25" in result.table()
    result.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_sensitivity_with_data_and_patterns():
    data = iter([(X[:32], Y[:32]), (X[32:], Y[32:])])
    result = sensitivity(
        mlp(), accuracy, method="snip", pattern="2:4", data=data, loss_fn=F.cross_entropy
    )
    assert result.sparsities == (0.5,) and len(result.scores) == 3


@pytest.mark.parametrize(
    ("evaluate", "options", "error", "message"),
    [
        (lambda m: math.nan, {}, ValueError, "expected evaluate to give a finite number, got nan"),
        (lambda m: "good", {}, TypeError, "expected evaluate to give a number, got str"),
        (lambda m: 1, {"sparsities": ()}, ValueError, "expected at least one sparsity, got none"),
        (
            lambda m: 1,
            {"sparsities": (1,)},
            ValueError,
            r"sensitivity: expected sparsity in \[0, 1\)",
        ),
    ],
)
def test_sensitivity_errors(evaluate, options, error, message):
    with pytest.raises(error, match=message):
        sensitivity(mlp(), evaluate, **options)


def test_owl_gives_blocks_with_outliers_more_weights():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)])
    with torch.no_grad():
        model[1][0].weight[:3, :4] *= 30
    got = owl(model, [X], 0.7, threshold=5.0, spread=0.1)
    # By hand, with the dense inputs of every layer.
    shares, hidden = [], X
    for block in model:
        scores = block[0].weight.detach().abs() * hidden.norm(dim=0)
        shares.append(float((scores > 5 * scores.mean()).double().mean()))
        hidden = block(hidden).detach()
    shares = torch.tensor(shares)
    offsets = (shares - shares.min()) / (shares.max() - shares.min()) * 0.2
    wanted = 1 - (offsets - offsets.mean() + 0.3)
    assert list(got) == ["0.0", "1.0", "2.0"]
    assert list(got.values()) == pytest.approx(wanted.tolist(), abs=1e-6)
    assert got["1.0"] == min(got.values()) and sum(got.values()) / 3 == pytest.approx(0.7)
    assert prune(model, "wanda", scope=got, data=[X]).sparsity == pytest.approx(0.7, abs=2e-3)
    for options, message in (
        ((1.0,), r"owl: expected sparsity in \[0, 1\), got 1.0"),
        ((0.5, 0), "owl: expected threshold > 0, got 0"),
        ((0.95, 5, 0.08), r"owl: expected spread in \[0, 0.05\], got 0.08"),
    ):
        with pytest.raises(ValueError, match=message):
            owl(model, [X], *options)


def test_recalibrated_batchnorm_has_the_averages_of_the_data():
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).train()
    model[0][3].eval()
    model[0][1].momentum = 0.3
    prune(model, sparsity=0.5)
    flags = [m.training for m in model.modules()]
    assert recalibrate_batchnorm(model, [X[:32], (X[32:], Y[32:])]) == 1
    hidden, norm = model[0][0](X).detach(), model[0][1]
    parts = hidden[:32], hidden[32:]
    torch.testing.assert_close(norm.running_mean, sum(p.mean(0) for p in parts) / 2)
    torch.testing.assert_close(norm.running_var, sum(p.var(0) for p in parts) / 2)
    assert norm.momentum == 0.3 and [m.training for m in model.modules()] == flags
    assert recalibrate_batchnorm(nn.Linear(16, 4), [X]) == 0
    with pytest.raises(ValueError, match="expected data with at least one batch, got none"):
        recalibrate_batchnorm(model, [])


def test_distillation_loss_by_its_formula():
    student = torch.randn(3, 5, 4, requires_grad=True)
    teacher = torch.randn(3, 5, 4, requires_grad=True)
    target = torch.randint(0, 4, (3, 5))
    p, q = (t.detach().div(3).softmax(-1) for t in (teacher, student))
    soft = 9 * (p * (p / q).log()).sum(-1).mean()
    hard = -student.detach().log_softmax(-1).gather(-1, target[..., None]).mean()
    loss = distillation_loss(student, teacher, target, temperature=3, alpha=0.7)
    torch.testing.assert_close(loss.detach(), 0.7 * soft + 0.3 * hard)
    torch.testing.assert_close(distillation_loss(student, teacher, None, 3).detach(), soft)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    for options, message in (
        (
            {"teacher": teacher[0]},
            "distillation_loss: expected logits of one shape, got .3, 5, 4. an",
        ),
        ({"temperature": 0}, "distillation_loss: expected temperature > 0, got 0"),
        ({"alpha": 2}, r"distillation_loss: expected alpha in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_loss(**{"student": student, "teacher": teacher, **options})


def test_adjusted_dropout():
    assert adjusted_dropout(0.5, 0.75) == 0.25 and adjusted_dropout(0.5, 0) == 0.5
    with pytest.raises(ValueError, match=r"adjusted_dropout: expected rate in \[0, 1\], got 2"):
        adjusted_dropout(2, 0.5)


def test_layer_collapse_names_dead_layers():
    model = mlp()
    assert layer_collapse(model) == []
    with torch.no_grad():
        model[3].weight.zero_()
    assert layer_collapse(model) == ["3"] and layer_collapse(model, ignore="3") == []


def test_mask_overlap():
    a, b = mlp(), mlp()
    prune(a, sparsity=0.5, scope="uniform")
    prune(b, "random", 0.5, scope="uniform")
    overlap = mask_overlap(a, b)
    same = (a[0].weight != 0) & (b[0].weight != 0)
    either = (a[0].weight != 0) | (b[0].weight != 0)
    assert overlap.layers["0"] == int(same.sum()) / int(either.sum())
    assert mask_overlap(a, copy.deepcopy(a)).total == 1 and 0.2 < overlap.total < 0.5
    empty = {"x": torch.zeros(3, dtype=torch.bool)}
    assert mask_overlap(empty, empty).total == 1
    with pytest.raises(ValueError, match=r"mask_overlap: expected the same layers, got \['0', '3'"):
        mask_overlap(a, empty)
    with pytest.raises(ValueError, match=r"expected one shape in layer 'x', got \(3,\) and \(4,\)"):
        mask_overlap(empty, {"x": torch.ones(4)})
