"""Benchmarks of the ops against what people write without them.

python -m pytest benchmarks --benchmark-json=benchmarks/results/cpu/kernels.json    check and time cases.py
python -m benchmarks.report [json] [--write README.md]                              the table
"""
