"""These tests launch Triton kernels on CPU tensors: TRITON_INTERPRET=1 before anything is imported.

`tests/test_interpreted.py` runs them, one process per file; by hand:
`TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_....py`. About 1.4 ms per step of an
inner loop, whatever the tile: keep a test at a few hundred steps. Arithmetic in bfloat16 is
silently wrong there; kernels convert to float32 right after a load where they are interpreted.
"""

import os

# Kernels of a process are interpreted or compiled, all of them; the other tests need compiled ones.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
