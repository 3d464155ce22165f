"""The ops of sparsekern: one file per op with schema, fake, reference and gradient."""
