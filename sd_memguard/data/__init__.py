"""Captioned images: reading, checking, transforming, encoding."""
