"""Borrowing a model: modes, gradients, statistics."""
