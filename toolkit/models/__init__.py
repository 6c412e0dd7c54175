"""Backbones and their checkpoints."""
