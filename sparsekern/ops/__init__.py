"""The ops of sparsekern: one file per op with schema, fake, reference and gradient."""

# They register themselves for CUDA, and import Triton and load libraries on first use.
from . import block_cuda, conv_cuda, csr_cuda, nm_cuda  # noqa: F401
