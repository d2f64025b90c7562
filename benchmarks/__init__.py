"""Benchmarks of the ops and attacks against what people write without them. Every one checks before it times.

python -m pytest benchmarks [--device cuda] --benchmark-json=benchmarks/results/cpu/kernels.json    the kernels of cases.py
python -m benchmarks.attack --models wrn-16-4 --batches 64 --out benchmarks/results/cpu/attack.json    whole attacks
python -m benchmarks.workmodel --device cpu    operations, bytes and ceilings: how fast an attack could be
python -m benchmarks.gpu --out DIR --minutes 9.5    what some minutes on a GPU can tell (--rehearse: tiny, on the CPU)
python -m benchmarks.calls --out FILE    what a step launches and what a call costs the host, before and after a change
python -m benchmarks.report [json ...] [--write README.md benchmarks/NOTES.md]    the tables
python -m benchmarks.plots JSON ...    throughput.png and roofline.png, beside each file of benchmarks.attack
python -m benchmarks.fused both --out FILE    cuDNN's convolutions with the pointwise work in their epilogue, on an H100 or H200

`pip install -e '.[bench,rivals]'` brings the rivals; those that are missing are left out, and recorded.
"""
