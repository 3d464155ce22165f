"""The kernel that expands N:M convolution weights, on the interpreter, for every sample."""

import pytest
import torch
from samples import SAMPLES

from sparsekern.ops import conv_cuda, nm_conv


@pytest.mark.filterwarnings("ignore:.*is computed with the dense weight")
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("sample", SAMPLES["nm_conv2d"], ids=lambda s: s.id)
def test_nm_conv(sample, planned, monkeypatch):
    monkeypatch.setattr(conv_cuda, "kernel_fault", lambda device: "")
    arguments = list(sample.build(torch.float32))
    want = nm_conv._conv_reference(*arguments)
    if not planned:
        arguments[4] = None
    torch.testing.assert_close(conv_cuda._nm_conv(*arguments), want)
