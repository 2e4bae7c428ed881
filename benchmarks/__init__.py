"""What is measured; a regular package, since Opacus installs a `benchmarks` of its own that would hide a namespace."""
