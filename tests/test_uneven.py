"""Convolutions whose zeros differ from side to side, where a kernel knows even padding alone."""

import pytest
import torch
from samples import SAMPLES
from test_ops import OPS, REFERENCES

from sparsekern.ops import block_conv, conv, nm_conv
from sparsekern.ops.uneven import pad_first

MODULES = {"csr_conv2d": conv, "block_conv2d": block_conv, "nm_conv2d": nm_conv}
UNEVEN = [
    pytest.param(name, sample, id=f"{name}-{sample.id}")
    for name in MODULES
    for sample in SAMPLES[name]
    if sample.uneven
]


def test_every_format_has_a_sample():
    assert {case.values[0] for case in UNEVEN} == set(MODULES)


@pytest.mark.parametrize(("name", "sample"), UNEVEN)
def test_what_is_padded_first_is_the_same(name, sample):
    arguments = sample.build(torch.float64)
    y = OPS[name](*arguments)
    torch.testing.assert_close(REFERENCES[name](*arguments), y)
    x, values, *rest = arguments
    index = rest[: 1 if name == "nm_conv2d" else 2]
    at = next(i for i, a in enumerate(rest) if isinstance(a, list))
    geometry, tail = rest[at : at + 5], rest[at - 2 : at] if name == "nm_conv2d" else []
    grad, ops = torch.randn_like(y), torch.ops.sparsekern
    for part, inputs in {
        "grad_input": (grad, values, *index, None, *x.shape[1:], *tail, *geometry),
        "grad_values": (
            grad, x, *index, None, *(values.shape[1:] if name == "block_conv2d" else tail),
            *geometry,
        ),
    }.items():  # fmt: skip
        reference = getattr(MODULES[name], f"_{part}_reference")
        got = pad_first(f"{name}_{part}", reference)(*inputs)
        assert got.is_contiguous()
        torch.testing.assert_close(got, getattr(ops, f"{name}_{part}")(*inputs))


def test_other_ops_are_handed_back():
    assert pad_first("csr_linear", len) is len
