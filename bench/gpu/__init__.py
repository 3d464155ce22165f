"""What `make gpu` runs: builds, tests and sweeps on a GPU, one process each, whatever fails."""
