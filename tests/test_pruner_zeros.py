"""Zeros that are there already: they stay, or a warning says what undoes them; method "keep"."""

import pytest
import torch
from methods_common import BATCHES, IMAGES, LABELS, cnn
from methods_common import mlp as mlp64
from pruner_common import X, Y, backward, make_pruner, mlp, one_thread, sgd, train, weights  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import sparsekern as sk
from sparsekern import patterns
from sparsekern.prune import Pruner, schedules
from sparsekern.prune.methods import METHODS, make_method

PATTERNS = ["unstructured", "2:4", "1:4T", "block:4x4", "vector:1x4", "vector:4x1", "filter"]
ONE_SHOT = [
    (name, pattern)
    for name, method in METHODS.items()
    for pattern in PATTERNS
    if method.one_shot and make_method(name, {}).misfit(patterns.parse(pattern)) is None
]


def options_of(method):
    options = {"data": BATCHES, "loss_fn": F.cross_entropy}
    return {**options, "ignore": "4"} if method == "apoz" else options


def prepared(method):
    model = mlp64(nn.ReLU)
    if method != "slimming":
        return model
    model = nn.Sequential(model[0], nn.BatchNorm1d(12).double(), *model[1:])
    return model[:4]


def zeros(model):
    return [m.weight.detach() == 0 for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("old", [0.4, 0.8])
@pytest.mark.parametrize(("method", "pattern"), ONE_SHOT)
def test_pruning_again_revives_nothing(method, pattern, old):
    model, options = prepared(method), options_of(method)
    if method == "slimming":
        options["ignore"] = "3"
    sk.prune(model, "random", sparsity=old, scope="uniform")
    before = zeros(model)
    count = sum(int(z.sum()) for z in before)
    final = None if ":4" in pattern and "x" not in pattern else 0.6
    report = sk.prune(model, method, final, pattern, **options)
    assert all((now | ~was).all() for now, was in zip(zeros(model), before))
    if old == 0.8 and pattern == "unstructured":  # nothing is left to prune
        assert sum(int(z.sum()) for z in zeros(model)) == count
    elif pattern == "unstructured":
        assert report.sparsity == pytest.approx(0.6, abs=0.03)
    elif final is None:
        wanted = patterns.parse(pattern)
        assert all(wanted.verify(weight) for weight in weights_of(model, report))


def weights_of(model, report):
    return [model.get_submodule(layer.name).weight.detach() for layer in report.layers]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "kernel"])
@pytest.mark.parametrize("method", ["sparsegpt", "refit", "wanda", "magnitude"])
def test_pruning_convolutions_again_revives_nothing(method, pattern):
    model = cnn()
    sk.prune(model, "random", sparsity=0.5, scope="uniform")
    before = zeros(model)
    final = None if pattern == "2:4" else 0.7
    options = {"data": [(IMAGES, LABELS)], "targets": nn.Conv2d}
    report = sk.prune(model, method, final, pattern, scope="uniform", **options)
    assert all((now | ~was).all() for now, was in zip(zeros(model), before))
    if pattern == "unstructured":
        assert report.sparsity == pytest.approx(0.7, abs=0.01)


def test_sparsegpt_reaches_its_sparsity_wherever_the_old_zeros_are():
    """Old zeros in the first columns, then in the last, leave the budget of the others whole."""
    inputs = torch.randn(512, 256, dtype=torch.float64)
    for columns in (slice(0, 128), slice(128, 256)):
        torch.manual_seed(0)
        layer = nn.Linear(256, 64).double()
        with torch.no_grad():
            layer.weight[:, columns] = 0
        before = layer(inputs).detach()
        report = sk.prune(layer, "sparsegpt", 0.75, data=[inputs], blocksize=32)
        assert report.zeros == 64 * 192 and (layer.weight[:, columns] == 0).all()
        error = (layer(inputs) - before).square().mean() / before.square().mean()
        twin = nn.Linear(256, 64).double()
        twin.load_state_dict(layer.state_dict())
        assert error < 0.35


def test_two_four_prefers_to_drop_what_is_zero():
    for method in ("magnitude", "sparsegpt", "refit", "wanda", "random"):
        torch.manual_seed(0)
        layer = nn.Linear(32, 16)
        with torch.no_grad():
            layer.weight.view(16, 8, 4)[:, :, 1:3] = 0
        data = {"data": [torch.randn(64, 32)]} if METHODS[method].needs else {}
        report = sk.prune(layer, method, pattern="2:4", **data)
        assert report.sparsity == 0.5 and (layer.weight.view(16, 8, 4)[:, :, 1:3] == 0).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("method", ["magnitude", "snip", "random"])
@pytest.mark.parametrize(
    "schedule", [schedules.Constant(0.5, 2, 10), schedules.Cubic(0.1, 0.5, 0, 10)]
)
@pytest.mark.filterwarnings("ignore:Pruner. the schedule starts at step 0 with sparsity 0.1")
def test_a_pruner_revives_nothing(schedule, method, pattern):
    model = mlp()
    sk.prune(model, "random", sparsity=0.3, scope="uniform")
    before, optimizer = [w == 0 for w in weights(model)], sgd(model)
    pruner = make_pruner(method, model, optimizer, pattern, schedule=schedule)
    for _ in range(12):
        train(model, optimizer, pruner, 1)
        assert all((w[z] == 0).all() for w, z in zip(weights(model), before))
    assert pruner.finalize().sparsity == pytest.approx(0.5, abs=0.16)


@pytest.mark.parametrize("method", ["movement", "soft_movement"])
def test_scores_of_training_do_not_bring_old_zeros_back(method):
    """Weights of inputs that are never active do not move, which scores above those that shrink."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, ::4] = 0
    silent = X.clone()
    silent[:, ::4] = 0
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match="training undoes its zeros"):
        pruner = make_pruner(method, model, optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(silent), Y).backward()
        optimizer.step()
        pruner.step()
        assert pruner.steps < 6 or not pruner.masks["0"][:, ::4].any()


def test_layers_above_their_budget_keep_their_zeros():
    model = mlp()
    sk.prune(model, sparsity=0.9, scope="uniform", ignore=["3", "5"])
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, "snip", 0.6, scope="uniform", **{
        "data": [(X, Y)], "loss_fn": F.cross_entropy
    })  # fmt: skip
    train(model, optimizer, pruner, 3)
    assert [round(la.sparsity, 1) for la in pruner.report().layers] == [0.9, 0.6, 0.6]


def test_a_schedule_below_the_present_sparsity_says_what_it_undoes():
    model = mlp()
    sk.prune(model, sparsity=0.8, scope="uniform")
    message = (
        "Pruner: the schedule starts at step 0 with sparsity 0, but the model is at 0.8005: "
        "training undoes its zeros, in layer '0' 307 of 384 zeros, layer '3' 307 of 384 zeros, "
        "layer '5' 51 of 64 zeros. To resume a training, load the old pruner's state_dict() by "
        "load_state_dict(); to keep the zeros that are there, use method='keep'; to prune on from "
        "them, start the schedule at 0.8005"
    ).replace("0.8005", f"{665 / 832:.4g}")
    for options in (
        {"sparsity": 0.0},
        {"schedule": schedules.Cubic(0.0, 0.9, 0, 10)},
        {"schedule": schedules.Cubic(0.5, 0.9, 3, 10)},
        {"schedule": schedules.OneShot(0.9, at=5)},
        {"schedule": schedules.Iterative(0.9, 2, 5)},
        {"method": "rigl", "schedule": schedules.OneShot(0.9, at=5)},
    ):
        with pytest.warns(UserWarning) as caught:
            Pruner(model, sgd(model), **options).finalize()
        assert [str(w.message) for w in caught] == [message]
        assert caught[0].filename == __file__


def test_resuming_without_a_state_is_told_and_loading_it_afterwards_loses_nothing():
    def begin(seed=0):
        model = mlp(seed)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return model, optimizer

    schedule = schedules.Cubic(0.1, 0.9, 0, 20, 2)
    model, optimizer = begin()
    pruner = Pruner(model, optimizer, schedule=schedule)
    train(model, optimizer, pruner, 14)
    saved = [part.state_dict() for part in (model, optimizer, pruner)]
    saved = torch.load(_written(saved), weights_only=True)
    train(model, optimizer, pruner, 10)

    again, other = begin(1)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    with pytest.warns(UserWarning, match="starts at step 0 with sparsity 0.1.*state_dict"):
        resumed = Pruner(again, other, schedule=schedule)
    resumed.load_state_dict(saved[2])
    train(again, other, resumed, 10)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model)))
    momentum = [o.state[m[0].weight]["exp_avg"] for o, m in ((other, again), (optimizer, model))]
    assert torch.equal(*momentum)


def _written(value):
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_momentum_that_the_first_update_clears_comes_back_with_the_state():
    model = mlp()
    optimizer = sgd(model)
    pruner = make_pruner("rigl", model, optimizer)
    train(model, optimizer, pruner, 9)
    saved = _written([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, pruner, 9)
    saved = torch.load(saved, weights_only=True)
    again = mlp(1)
    other = sgd(again)
    again.load_state_dict(saved[0]), other.load_state_dict(saved[1])
    with pytest.warns(UserWarning, match="method draws its first masks without regard to the zer"):
        resumed = make_pruner("rigl", again, other)
    resumed.load_state_dict(saved[2])
    train(again, other, resumed, 9)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model)))


def fresh_models():
    tied = nn.Sequential(nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 20, bias=False))
    tied[1].weight = tied[0].weight
    starts_at_zero = mlp()
    nn.init.zeros_(starts_at_zero[3].weight)
    stray = mlp()
    with torch.no_grad():
        stray[0].weight[0, :3] = 0
    low, identity = mlp().half(), mlp()
    nn.init.eye_(identity[3].weight)
    start = {"zero init": starts_at_zero, "identity": identity}
    return {**start, "tied": tied, "stray": stray, "plain": mlp(), "half": low}


@pytest.mark.parametrize("name", list(fresh_models()))
def test_a_fresh_model_is_warned_of_nothing(name, recwarn):
    for method in ("magnitude", "rigl", "srste", "movement"):
        model = fresh_models()[name]
        late = schedules.Cubic(0.0, 0.5, 4, 10)
        schedule = late if method in ("movement", "magnitude") else None
        Pruner(model, sgd(model), method, schedule=schedule)
    assert not recwarn.list


def test_a_layer_that_starts_at_zero_everywhere_still_trains():
    model = mlp()
    nn.init.zeros_(model[3].weight)
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, sparsity=0.5, scope="uniform")
    train(model, optimizer, pruner, 5)
    assert (model[3].weight != 0).sum() > 0.05 * model[3].weight.numel()


def any_zeros(kind):
    model = mlp()
    if kind == "by hand":
        with torch.no_grad():
            model[0].weight[::3] = 0
            model[3].weight.masked_fill_(torch.rand(16, 24) < 0.7, 0)
            model[5].weight.zero_()
    elif kind == "torch":
        for i in (0, 3):
            torch_prune.random_unstructured(model[i], "weight", 0.6)
            torch_prune.remove(model[i], "weight")
    else:
        sk.prune(model, "magnitude", None if kind == "2:4" else 0.75, kind)
    return model


@pytest.mark.parametrize("kind", ["by hand", "torch", "unstructured", "2:4", "block:4x4", "filter"])
def test_keep_keeps_exactly_the_zeros_that_are_there(kind, recwarn):
    model = any_zeros(kind)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.3)
    before, grown = [w != 0 for w in weights(model)], [w.clone() for w in weights(model)]
    for _ in range(3):
        backward(model, optimizer)
    optimizer.step()  # momentum that would revive
    with torch.no_grad():
        for weight, old in zip(weights(model), grown):
            weight.copy_(old)
    pruner = Pruner(model, optimizer, method="keep")
    train(model, optimizer, pruner, 10)
    assert all(torch.equal(w != 0, kept) for w, kept in zip(weights(model), before))
    assert all(torch.equal(m, kept) for m, kept in zip(pruner.masks.values(), before))
    told = [str(warning.message) for warning in recwarn.list]
    assert pruner.steps == 10 and len(told) == (kind == "by hand")
    assert all("keeps all weights of ['5'] at 0" in text for text in told)
    report = pruner.finalize()
    assert report.method == "keep" and report.zeros == sum(int((~k).sum()) for k in before)


def test_keep_says_that_layers_at_zero_stay_so():
    model = mlp()
    sk.prune(model, sparsity=0.5)
    nn.init.zeros_(model[3].weight)
    with pytest.warns(UserWarning, match=r"keeps all weights of \['3'\] at 0.*name them in ignore"):
        Pruner(model, sgd(model), "keep")


def test_keep_resumes():
    model = any_zeros("2:4")
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, "keep", pattern="2:4", sparsity=0.5)
    train(model, optimizer, pruner, 3)
    saved = _written([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, pruner, 3)
    saved = torch.load(saved, weights_only=True)
    again = mlp(1)
    other = sgd(again)
    with pytest.warns(UserWarning, match="Pruner: method 'keep' found no zeros to keep; load the"):
        resumed = Pruner(again, other, "keep", pattern="2:4")
    for part, state in zip((again, other, resumed), saved):
        part.load_state_dict(state)
    train(again, other, resumed, 3)
    assert resumed.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": schedules.OneShot(0.75)}, "expected no schedule with method 'keep'.*OneShot"),
        ({"scope": "global"}, "expected no scope with method 'keep'.*got 'global'"),
        (
            {"sparsity": 0.5},
            r"expected no sparsity with method 'keep', or that of .0.75.., got 0.5",
        ),
        ({"pattern": "2:4"}, "expected zeros in pattern 2:4 in layer '0', which method 'keep' was"),
        ({"pattern": "filter"}, "expected zeros in pattern filter in layer '0'"),
    ],
)
def test_what_contradicts_keep_is_refused(options, message):
    model = any_zeros("unstructured")
    before = [w.clone() for w in weights(model)]
    message = message.replace(".0.75..", r"the weights \(0.75\)")
    with pytest.raises(ValueError, match=f"Pruner: {message}"):
        Pruner(model, sgd(model), "keep", **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before))
    assert not hasattr(model[0], "weight_mask")
    Pruner(model, sgd(model), "keep", sparsity=0.75, pattern="unstructured")


def test_keep_of_nothing_but_zeros_and_keep_without_training():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="expected weights that are not 0 for method 'keep', got"):
        Pruner(layer, sgd(layer), "keep")
    with pytest.raises(ValueError, match=r"got 'keep'; use Pruner\(model, optimizer, method='kee"):
        sk.prune(mlp(), "keep")
