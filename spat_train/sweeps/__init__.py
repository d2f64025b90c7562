"""Hyper-parameter sweeps (`spat-train sweep`): trainings over a grid of options, on Optuna."""
