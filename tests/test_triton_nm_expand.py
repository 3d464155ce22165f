"""N:M weights to dense and back compile for the GPUs we name, without spills."""

import pytest
from triton_common import compile_for

from sparsekern.ops.nm_expand_triton import BLOCK, _collect, _expand

SIZES = dict.fromkeys(("channels", "slots", "row_bytes"), "i32")


@pytest.mark.parametrize("cap", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "i8"])
def test_compiles(cap, dtype):
    constants = {"N": 2, "M": 4, "BITS": 2, "BLOCK": BLOCK}
    types = {"values": f"*{dtype}", "index": "*u8", "dense": f"*{dtype}", **SIZES}
    for taps in (1, 9):
        compile_for(_expand, types, {**constants, "TAPS": taps}, cap=cap).check()
        compile_for(_collect, types, {**constants, "TAPS": taps}, cap=cap).check()
