"""Proxies: K models trained in turn in the memory of one; the offloaded ones wait in a store of safetensors."""
