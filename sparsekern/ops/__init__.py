"""The ops of sparsekern: one file per op with schema, fake, reference and gradient."""

from . import csr_cuda, nm_cuda  # noqa: F401  (they import Triton and load libraries on first use)
