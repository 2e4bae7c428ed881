"""What is claimed for a GPU, settled by one command on a machine that has one; see docs/gpu.md."""
