"""The build: what it says, what it links, and that a fresh clone installs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekern
from sparsekern._load import _C, native_status

ROOT = Path(sparsekern.__file__).parent.parent
native = pytest.mark.skipif(_C is None, reason="nothing was compiled")
in_repository = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="sparsekern runs from an installed package"
)


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def say(environment):
    """What setup.py prints and how it ends, without building anything."""
    out = run(sys.executable, "setup.py", "--version", cwd=ROOT, env={**os.environ, **environment})
    return out.returncode, out.stdout + out.stderr


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_only_the_stable_abi_of_torch_is_used():
    """No symbol of ATen or c10: one build serves every torch from 2.11 on."""
    symbols = run("nm", "-D", "--undefined-only", "-C", _C.__file__, check=True).stdout
    assert "aoti_torch_" in symbols
    unstable = re.findall(r"^ +U ((?:at|c10|torch)::.*)$", symbols, re.MULTILINE)
    assert not unstable


@native
def test_the_module_serves_every_python():
    assert ".abi3." in Path(_C.__file__).name


@in_repository
def test_setup_says_what_it_builds():
    code, text = say({"SPARSEKERN_CUDA": ""})
    assert code == 0
    (line,) = [line for line in text.splitlines() if line.startswith("sparsekern: CPU kernels")]
    assert "scalar" in line and "CUDA half" in line


@in_repository
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("0", "CUDA half not built: SPARSEKERN_CUDA=0"),
        ("yes", "setup: expected SPARSEKERN_CUDA to be 0 or 1, got 'yes'"),
    ],
)
def test_the_cuda_choice_can_be_forced(choice, message):
    assert message in say({"SPARSEKERN_CUDA": choice})[1]


def test_status_names_reason_and_remedy():
    status = native_status()
    assert set(status) == {"_C", "_C_cuda"}
    for half in status.values():
        assert half["loaded"] or (half["reason"] and half["remedy"])


def test_every_op_runs_without_the_compiled_half(tmp_path):
    """The plain torch reference takes over, and `doctor` tells why."""
    code = (
        "import sys; sys.modules['sparsekern._C'] = None\n"
        "import torch, sparsekern as sk\n"
        "layer = sk.SparseLinear(16, 8, sparsity=0.5, activation='gelu')\n"
        "x = torch.randn(3, 16, requires_grad=True)\n"
        "y = layer(x); y.sum().backward()\n"
        "torch.testing.assert_close(y, layer.to_dense()(x))\n"
        "rows = torch.nn.functional.relu_(sk.SparseLinear(16, 8, sparsity=0.5)(x.view(1, 3, 16)))\n"
        "rows.sum().backward()\n"  # a result that is a view would refuse this
        "conv = sk.SparseConv2d(4, 4, 3, sparsity=0.5); image = torch.randn(1, 4, 8, 8)\n"
        "torch.testing.assert_close(conv(image), conv.to_dense()(image), rtol=1e-4, atol=1e-5)\n"
        "print(sk.cpu_isa(), sk.available_isas())\n"
    )
    out = run(sys.executable, "-c", code)
    assert out.stdout.strip() == "reference ['reference']", out.stderr


@pytest.mark.slow
@in_repository
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_fresh_clone_installs_and_runs(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    if run("git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)).returncode:
        pytest.skip("this tree is no git repository")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    done = run(*pip, "--target", str(site), str(clone), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, sparsekern as sk\n"
        "layer = sk.SparseLinear(64, 64, sparsity=0.9); x = torch.randn(5, 64)\n"
        "torch.testing.assert_close(layer(x), layer.to_dense()(x))\n"
        "print(sk.__file__, sk.cpu_isa())\n"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    assert str(site) in out.stdout and "reference" not in out.stdout, out.stdout + out.stderr
