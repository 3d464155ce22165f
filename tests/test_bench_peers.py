"""Peers in processes of their own: the protocol, what is left out, the rounds. Needs no peer."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import baselines
import cases
import peaks
import rounds
import run
from peers import client, install
from peers.client import Peer

BENCH = Path(run.__file__).parent

# The real worker with a made-up engine in the place of DeepSparse: y = x W^T + b, or a failure.
FAKE = """
import os, sys, time
sys.path.insert(0, {folder!r})
import engines, worker

def fake(job):
    print("a banner on stdout")
    calls = 0
    def call():
        nonlocal calls
        calls += 1
        if "{mood}" == "dies" and calls > 1:
            print("out of luck", file=sys.stderr)
            os._exit(7)
        if "{mood}" == "hangs" and calls > 1:
            time.sleep(60)
        x, weight, bias = (job.arrays[name] for name in ("x", "weight", "bias"))
        return [x @ weight.T + bias + ("{mood}" == "wrong")]
    if "{mood}" == "refuses":
        raise ValueError("no such layer\\nand a long tail")
    return call, f"1.2 on {{job.threads}}"

engines.ENGINES["deepsparse"] = fake
worker.main()
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Make a mood of the fake engine what the client starts."""
    monkeypatch.setattr(install, "installed", lambda name: name == "deepsparse")
    monkeypatch.setattr(install, "python", lambda name: Path(sys.executable))

    def choose(mood="works"):
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(folder=str(BENCH / "peers"), mood=mood))
        monkeypatch.setattr(client, "WORKER", script)

    return choose


@pytest.fixture
def problem():
    return cases.build(cases.Linear(32, 16, 19), "unstructured", 0.5, torch.float32)


def engine_sides(problem, *names):
    with ExitStack() as stack:
        return baselines.engine_sides(problem, names or client.ENGINES, stack)


def test_a_peer_answers_with_its_result_and_its_own_time(fake, problem):
    fake()
    job = {"kind": "linear", "threads": 1}
    arrays = {"x": problem.x, "weight": problem.weight, "bias": problem.bias}
    with Peer("deepsparse", job, arrays) as peer:
        assert peer.version == "1.2 on 1"
        torch.testing.assert_close(peer.result()[0], problem.reference()[0].float())
        assert 0 < peer.sample(1) < 1 and peer.sample(1000) > peer.sample(1)
        process = peer._process
    assert process.returncode is not None
    peer.close()


def test_the_worker_answers_errors_and_goes_on(tmp_path):
    script = BENCH / "peers" / "worker.py"
    requests = '{"do": "time", "calls": 1}\nnot json\n{"do": "fly"}\n'
    run = subprocess.run(
        [sys.executable, str(script)], input=requests, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith('{"error": ') for line in lines)
    assert "TypeError" in lines[0] and "JSONDecodeError" in lines[1] and "fly" in lines[2]


def test_a_missing_peer_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, problem):
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    found, left_out = engine_sides(problem)
    assert not found and set(left_out) == set(client.ENGINES.values())
    assert left_out["deepsparse"] == "not installed: python bench/peers/install.py deepsparse"


def test_a_peer_that_is_right_becomes_a_side(fake, problem):
    fake()
    found, left_out = engine_sides(problem)
    assert [(s.name, s.role, s.version) for s in found] == [
        ("deepsparse", "peer", f"1.2 on {torch.get_num_threads()}")
    ]
    assert found[0].error < 1e-6 and "openvino dense" in left_out


@pytest.mark.parametrize(
    "mood, reason",
    [
        ("refuses", "ValueError: no such layer"),
        ("wrong", "bench: expected deepsparse to be right to 0.0001 at linear 32-16 T=19, got a"),
        ("dies", None),
    ],
)
def test_a_peer_that_fails_is_left_out_with_its_reason(fake, problem, mood, reason):
    fake(mood)
    found, left_out = engine_sides(problem, "deepsparse")
    if reason is not None:
        assert not found and left_out["deepsparse"].startswith(reason)
    else:  # its first call is right
        assert [side.name for side in found] == ["deepsparse"]


def test_what_a_peer_cannot_do_is_said_without_starting_it(fake, problem):
    bfloat16 = cases.build(cases.Linear(32, 16, 19), "unstructured", 0.5, torch.bfloat16)
    assert engine_sides(bfloat16, "deepsparse")[1] == {"deepsparse": "float32 only"}
    case = cases.Linear(32, 16, 19, training=True)
    training = cases.build(case, "unstructured", 0.5, torch.float32)
    _, left_out = engine_sides(training, "deepsparse", "sparseprop")
    assert left_out["deepsparse"] == "runs the forward pass only"
    assert left_out["sparseprop"] == "not installed: python bench/peers/install.py sparseprop"


@pytest.mark.parametrize(
    "mood, reason",
    [
        ("dies", "its process ended with status 7: out of luck"),
        ("hangs", "no answer to time within 0.5 s"),
    ],
)
def test_a_peer_lost_while_timing_is_left_out_and_the_others_are_timed(
    fake, problem, monkeypatch, mood, reason
):
    fake(mood)
    with ExitStack() as stack:
        sides, left_out = baselines.sides(problem, peers=False)
        engines, _ = baselines.engine_sides(problem, ["deepsparse"], stack)
        sides = [*engines, *sides]
        monkeypatch.setattr(client, "TIMEOUT_S", 0.5)
        timings = baselines.time_all(sides, left_out, 0.01)
    assert left_out["deepsparse"] == reason
    assert len(timings) == len(sides) and "deepsparse" not in [side.name for side in sides]


def test_a_run_times_a_peer_in_the_same_rounds(fake, monkeypatch, tmp_path):
    fake()
    monkeypatch.setattr(peaks, "measure", lambda threads: {"unavailable": "not asked"})
    out = tmp_path / "out.jsonl"
    arguments = ["--suite", "overhead", "--peers", "deepsparse", "openvino", "--budget", "0.01"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    point = run.json.loads(out.read_text().splitlines()[1])
    peer = point["sides"]["deepsparse"]
    assert peer["role"] == "peer" and peer["version"] == "1.2 on 1" and peer["median_ms"] > 0
    assert len({side["rounds"] for side in point["sides"].values()}) == 1
    assert "openvino dense" in point["left_out"] and "sparseprop" not in point["left_out"]
    assert list(point["sides"])[-1] == "sparsekern"


def test_peers_without_names_are_all_of_them():
    assert run.parse_arguments(["--peers"]).peers == list(client.ENGINES)
    assert run.parse_arguments(["--peers", "openvino"]).peers == ["openvino"]
    assert run.parse_arguments([]).peers is None


def test_rounds_take_turns_and_count_no_lead_in():
    log = []

    def side(name, seconds):
        def sample(calls):
            log.append((name, calls))
            return calls * seconds

        return sample

    fast, slow = rounds.interleaved([side("f", 1e-4), side("s", 0.2)], 1e-9, min_rounds=4)
    assert (fast.calls, slow.calls) == (10, 1) and fast.rounds == slow.rounds == 4
    assert fast.median_ms == pytest.approx(0.1) and slow.min_ms == pytest.approx(200)
    # Fast samples follow an untimed one; every other round turns the order round.
    once = [("f", 10), ("f", 10), ("s", 1)]
    assert log[-12:] == [*once, ("s", 1), ("f", 10), ("f", 10)] * 2


@pytest.mark.parametrize("samplers, options", [([], {}), ([sum], {"min_rounds": 0})])
def test_impossible_rounds_are_refused(samplers, options):
    with pytest.raises(ValueError, match="interleaved: expected samplers, budget_s > 0 and 1 <="):
        rounds.interleaved(samplers, 1.0, **options)
    with pytest.raises(ValueError, match=r"got 1 samplers, budget_s=0, rounds 5 to 1000"):
        rounds.interleaved([sum], 0)


def test_installed_means_finished_and_of_these_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    steps = []
    monkeypatch.setattr(install, "_run", lambda arguments, *environment: steps.append(arguments))
    monkeypatch.setattr(install.shutil, "rmtree", lambda folder, **options: folder.mkdir())
    assert not install.installed("openvino")
    install.install("openvino")
    assert install.installed("openvino") and not install.installed("deepsparse")
    assert steps[0][1:3] == ["-m", "venv"] and "openvino==2026.4.1" in steps[1]
    monkeypatch.setitem(install.PEERS, "openvino", (("openvino==2099.1",),))
    assert not install.installed("openvino")


def test_the_installer_goes_on_after_a_failure_and_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(install, "FOLDER", tmp_path)

    def install_one(name):
        if name == "deepsparse":
            output = "Collecting deepsparse\nERROR: No matching distribution\nnotice\n"
            raise subprocess.CalledProcessError(1, "pip", output=output)

    monkeypatch.setattr(install, "install", install_one)
    assert install.main(["deepsparse", "openvino"]) == 1
    shown = capsys.readouterr()
    assert "deepsparse: failed, ERROR: No matching distribution" in shown.err
    assert "openvino: installed into" in shown.out


def test_an_unknown_peer_is_refused(capsys):
    with pytest.raises(SystemExit) as leave:
        install.main(["tensorflow"])
    assert leave.value.code == 2
    assert (
        "expected names of deepsparse, onnxruntime, openvino, sparseprop, onnx, got tensorflow"
        in (capsys.readouterr().err)
    )
