"""Pruning to 2:4 compiles for GPUs that need not be there, without spills."""

import pytest
from triton_common import compile_for

pytest.importorskip("triton")
from sparsekern.ops import nm_prune_triton


@pytest.mark.parametrize(("dtype", "cap"), [("bf16", 80), ("fp32", 90), ("fp16", 100)])
def test_compiles(dtype, cap):
    types = dict.fromkeys(("weight", "out"), f"*{dtype}")
    groups = nm_prune_triton.GROUPS
    kernel = nm_prune_triton.prune_rows_kernel
    compile_for(kernel, {**types, "groups": "i32"}, {"GROUPS": groups}, cap).check()
    sizes = dict.fromkeys(("tiles", "cols", "by_row"), "i32")
    constants = {"TILES": groups, "by_col": 1}
    compile_for(nm_prune_triton.prune_tiles_kernel, {**types, **sizes}, constants, cap).check()
