"""Convolutions that do the pointwise pass behind them, and the choice of who does it."""
