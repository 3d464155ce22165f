"""The ops of sparsekern: one file per op with schema, fake, reference and gradient."""

# They register themselves for CUDA, and import Triton and load libraries on first use.
from . import (  # noqa: F401
    block_cuda,
    conv_cuda,
    csr_conv_cuda,
    csr_cuda,
    nm_conv_cuda,
    nm_cuda,
    nm_int8_cuda,
    nm_ste_cuda,
)
