"""Presets of tokenizers."""

PRESETS = {"default": {"batch": 96, "steps": 30_000, "model": {}}}
