"""The ops of sparsekern: one file per op with schema, fake, reference and gradient."""

from . import block_cuda, conv_cuda  # noqa: F401  (register; Triton is imported on first use)
