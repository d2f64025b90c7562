"""Attacks as CUDA graphs."""
