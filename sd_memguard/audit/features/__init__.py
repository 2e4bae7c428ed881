"""Image descriptors and their cache."""
