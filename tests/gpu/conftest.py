"""What the tests on a GPU share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """The dense convolution is one of our ways: cuDNN rounds float32 to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
