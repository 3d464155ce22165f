"""The pruning experiments on tiny settings, with the code that computes the published results."""

import json
import sys
from pathlib import Path

import pytest
import torch
from idx_common import write_files

from sparsekern.prune.methods import METHODS

FOLDER = Path(__file__).parent.parent / "examples" / "pruning"
TINY = ["--train", "60", "--batch", "20", "--epochs", "2", "--tune", "1", "--scoring", "40"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch, tmp_path):
    """The scripts are importable, and forgotten again: others have files of the same names."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    path, threads = list(sys.path), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))
    write_files(tmp_path / "data", counts=(60, 40))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "data"))
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


def execute(experiment, out: Path, *arguments: str):
    import frame

    settings = [*TINY, "--seeds", "0", "--out", str(out), *arguments]
    return frame.main(experiment, "A test.", settings)


@pytest.fixture
def bench(scripts):
    import accuracy
    import frame

    return frame.Bench(frame.parse(accuracy.EXPERIMENT, "A test.", TINY))


def test_every_method_has_a_line():
    import catalog

    lines = (*catalog.AFTER, *catalog.START, *catalog.WHOLE)
    chooses = {name for name, method in METHODS.items() if not method.keeps}
    assert {line.method for line in lines} == chooses
    others = catalog.SHAPED, catalog.GRAINS, catalog.SNIP_MLP, catalog.SNIP_CNN, catalog.DYNAMIC
    every = (*lines, *(line for group in others for line in group))
    names = {}
    for line in every:
        assert names.setdefault(line.name, line) is line  # a name stands for one thing


def test_accuracy_runs_every_line(tmp_path, capsys):
    import accuracy

    records = execute(accuracy.EXPERIMENT, tmp_path / "lines.jsonl", "--sparsities", "0.9")
    found = {(r["key"]["line"], r["key"]["sparsity"]): r for r in records.done.values()}
    lines = [line for group in accuracy.GROUPS.values() for line in group]
    assert len(found) == 1 + sum(len(line.sparsities or (0,)) for line in lines)
    for (name, sparsity), record in found.items():
        assert 0 <= record["accuracy"] <= 100
        if not name.startswith("dense"):
            assert record["sparsity"] == pytest.approx(sparsity, abs=0.02), name
            assert record["converted_error"] < 1e-5, name
    assert found["dense", 0.0]["accuracy"] > 60  # the images can be told apart
    assert found["random after training", 0.9]["pruned"] is not None
    assert found["SNIP", 0.9]["pruned"] is None  # it was not trained yet
    header = json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[0])
    assert header["settings"]["train"] == 60 and header["hardware"]["threads"] == 1


def test_a_stopped_run_goes_on(tmp_path):
    import gradual
    import rigl

    path = tmp_path / "lines.jsonl"
    first = execute(gradual.EXPERIMENT, path, "--sparsities", "0.9", "--only", "dense")
    assert [r["key"]["line"] for r in first.done.values()] == ["dense", "small, dense"]
    with open(path, "a") as file:
        file.write('{"key": {"line": "gradual magn')  # killed in the middle of a line
    again = execute(gradual.EXPERIMENT, path, "--sparsities", "0.9")
    assert len(again.done) == 4
    size = path.stat().st_size
    execute(gradual.EXPERIMENT, path, "--sparsities", "0.9")
    assert path.stat().st_size == size  # nothing was left to do
    # What another experiment has in common is there already, and computed again it is the same.
    shared = execute(rigl.EXPERIMENT, path, "--sparsities", "0.9", "--only", "RigL, ERK")
    assert len(shared.done) == 5
    fresh = execute(gradual.EXPERIMENT, tmp_path / "b.jsonl", "--sparsities", "0.9")
    for name, record in fresh.done.items():
        assert record["accuracy"] == again.done[name]["accuracy"]


def test_other_settings_and_other_files_are_refused(tmp_path):
    import gradual
    from records import Records, RecordsError

    path = tmp_path / "lines.jsonl"
    execute(gradual.EXPERIMENT, path, "--only", "small", "--sparsities", "0.9")
    with pytest.raises(RecordsError, match=r"expected settings .* name another file by --out"):
        execute(gradual.EXPERIMENT, path, "--lr", "0.1")
    other = tmp_path / "other.jsonl"
    other.write_text('{"case": "linear"}\n')
    with pytest.raises(RecordsError, match=r"expected results in .*other.jsonl, got"):
        Records(other)
    other.write_text("[1, 2]\n")
    with pytest.raises(RecordsError, match=r"expected results in .*, got '\[1, 2\]'"):
        Records(other)


def test_random_masks_take_over_the_shares_of_snip(bench):
    import catalog

    shuffled = next(line for line in catalog.SNIP_MLP if callable(line.scope))
    snip, random = catalog.SNIP.run(bench, 0.9, 0), shuffled.run(bench, 0.9, 0)
    assert random["layers"] == snip["layers"] and random["accuracy"] != snip["accuracy"]
    assert len(set(snip["layers"].values())) == 3


def test_snip_on_convolutions(tmp_path):
    import snip

    records = execute(snip.EXPERIMENT, tmp_path / "lines.jsonl", "--only", "LeNet-5")
    found = {(r["key"]["line"], r["key"]["sparsity"]): r for r in records.done.values()}
    assert len(found) == 5 and "conv2" in found["SNIP, LeNet-5", 0.98]["layers"]
    assert found["SNIP, LeNet-5", 0.98]["sparsity"] == pytest.approx(0.98, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_small_networks_use_their_budget(sparsity):
    import networks

    total = networks._weights(networks.HIDDEN)
    hidden = networks.small_hidden(sparsity)
    share = networks._weights(hidden) / total
    assert 1 - sparsity - 800 / total < share <= 1 - sparsity
    model = networks.lenet_300_100(hidden)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == share * total


def test_lottery_rewinds_to_the_first_weights(bench, tmp_path):
    import lottery
    from frame import Training, accuracy

    points = list(lottery.Lottery(bench, rewind=0, seed=0).points())
    tickets = [p for p in points if p["line"] == "ticket"]
    assert len(tickets) == lottery.ROUNDS + 1
    plain = Training(bench.fresh(lottery.NETWORK, 0), bench.data, bench.options, 2, 0)
    wanted = [accuracy(plain.model, bench.data.test) for _ in plain.epochs()]
    assert tickets[0]["curve"] == wanted and tickets[0]["sparsity"] == 0
    for number, point in enumerate(tickets):
        # The output layer, 0.4 % of the weights, loses half as much.
        assert point["sparsity"] == pytest.approx(1 - 10 ** (-0.2 * number), abs=0.002)
    compared = [tickets[number] for number in lottery.COMPARED]
    for control in lottery.CONTROLS:
        chosen = [p for p in points if p["line"] == control]
        assert [p["sparsity"] for p in chosen] == [p["sparsity"] for p in compared]
        assert [p["curve"] for p in chosen] != [p["curve"] for p in compared]


def test_lottery_with_the_learning_rate_alone(bench):
    import lottery

    run = lottery.Lottery(bench, lottery.RATE_ALONE, seed=0)
    first = run.model.fc1.weight.detach().clone()
    points = []
    for point in run.points():
        points.append(point)
        assert run.training.scheduler.last_epoch == run.training.steps
    assert [p["line"] for p in points] == ["ticket"] * (lottery.ROUNDS + 1)
    kept = run.pruner.masks["fc1"]
    assert bool((run.model.fc1.weight[kept] != first[kept]).all())
    plain = list(lottery.Lottery(bench, 0, seed=0).points())
    assert points[0] == plain[0] and points[1]["curve"] != plain[1]["curve"]


def test_damage_of_the_loss(tmp_path):
    import damage

    records = execute(damage.EXPERIMENT, tmp_path / "damage.jsonl")
    (record,) = records.done.values()
    rises = {(p["line"], p["sparsity"]): p["rise"] for p in record["points"]}
    assert len(rises) == len(damage.LINES) * len(damage.GRID) and record["loss"] > 0
    for line in ("magnitude", "OBD, Gauss-Newton"):
        assert rises[line, damage.GRID[0]] < rises[line, damage.GRID[-1]]


def test_lottery_rewinds_to_a_later_epoch(tmp_path):
    import lottery

    records = execute(lottery.EXPERIMENT, tmp_path / "lottery.jsonl", "--only", "'rewind': 1")
    (record,) = records.done.values()
    assert all(len(point["curve"]) == 1 for point in record["points"])  # of two epochs


def test_sensitivity_and_the_page(tmp_path):
    import damage
    import gradual
    import lottery
    import page
    import sensitivity

    execute(sensitivity.EXPERIMENT, tmp_path / "sensitivity.jsonl", "--hold", "20")
    execute(gradual.EXPERIMENT, tmp_path / "lines.jsonl", "--sparsities", "0.9", "0.95")
    execute(lottery.EXPERIMENT, tmp_path / "lottery.jsonl")
    execute(damage.EXPERIMENT, tmp_path / "damage.jsonl")
    regions = ("damage", "accuracy", "snip", "gradual", "rigl", "lottery", "sensitivity")
    text = "".join(f"<!-- {name}:start -->\n<!-- {name}:end -->\nby hand\n" for name in regions)
    target = tmp_path / "page.md"
    target.write_text(text)
    for _ in range(2):  # a second time nothing changes
        page.main(["--results", str(tmp_path), "--page", str(target)])
        written = target.read_text()
        assert written.count("by hand") == 7
        assert "| small, dense | " in written and "(Zhu & Gupta 2017) | open " in written
        assert "| ticket, learning rate alone | " in written
        assert "| OBD, Gauss-Newton | " in written
        assert "| ResNet-8, by sensitivity | " in written and "| random mask | " in written
    for name in ("gradual-1", "lottery", "sensitivity"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"/{name}.png)" in written


def test_page_needs_its_markers(tmp_path):
    from records import RecordsError, update_page

    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(RecordsError, match="expected <!-- snip:start --> and <!-- snip:end --> in"):
        update_page(tmp_path / "page.md", {"snip": "text"})


def test_verdicts_compare_equal_seeds():
    from claims import Claim, gaps, verdict
    from results import Point

    claim = Claim("", "a beats b", "", "a", "b")
    values = {"a": {0: 3.0, 1: 5.0, 2: 4.5}, "b": {0: 2.0, 1: 4.5}}
    points = [
        Point(line, 0.9, seed, "accuracy", value)
        for line, seeds in values.items()
        for seed, value in seeds.items()
    ]
    assert gaps(claim, points) == {0.9: [1.0, 0.5]}
    rise = Claim("", "a rises less", "", "a", "b", "rise")
    assert gaps(rise, [p._replace(metric="rise") for p in points]) == {0.9: [-1.0, -0.5]}
    assert verdict([1.0, 0.5]) == "yes" and verdict([-1.0, -0.5]) == "no"
    assert verdict([1.0, -0.5]) == "open" and verdict([1.0]) == "open"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "expected --epochs of at least 1, got 0"),
        (["--sparsities", "1"], "expected --sparsities in (0, 1), got 1.0"),
        (["--train", "50", "--hold", "20", "--batch", "40"], "got 50, 20 and 40"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    import frame
    import snip

    with pytest.raises(SystemExit):
        frame.parse(snip.EXPERIMENT, "A test.", arguments)
    assert message in capsys.readouterr().err


def test_missing_data_ends_the_program_with_the_remedy(tmp_path, monkeypatch):
    import frame
    import snip

    monkeypatch.setattr(sys, "argv", ["snip.py", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="apt-get download dataset-fashion-mnist"):
        frame.run(snip.EXPERIMENT, "A test.")
