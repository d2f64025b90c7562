"""Benchmarks of the ops and attacks against what people write without them. Every one checks before it times.

python -m pytest benchmarks [--device cuda] --benchmark-json=benchmarks/results/cpu/kernels.json    the kernels of cases.py
python -m benchmarks.attack --models wrn-16-4 --batches 64 --out benchmarks/results/cpu/attack.json    whole attacks
python -m benchmarks.training --out FILE    training updates; overhead: what surrounds them; data: the batches
python -m benchmarks.agreement RUN --data NPZ --out FILE    the same images as other libraries; autoattack: the same of AutoAttack
python -m benchmarks.table61 --data NPZ --out FILE --seeds 0 1 2    the thesis's Table 6.1 at a small scale, with paired tests
python -m benchmarks.figure61 --out FILE --eps 4 8 16 -- TRAINING    its Figure 6.1 on any data: which alpha suits which eps
python -m benchmarks.precision --data NPZ --out FILE    what half precision costs an attack
python -m benchmarks.workmodel --device cpu    operations, bytes and ceilings: how fast an attack could be
python -m benchmarks.calls --out FILE    what a step launches and what a call costs the host, before and after a change
python -m benchmarks.fuzz --out FILE    generated inputs for everything that takes input: none ends the interpreter or does harm
python -m benchmarks.gpu --out DIR --minutes 9.5    what some minutes on a GPU can tell (--rehearse: tiny, on the CPU)
python -m benchmarks.breakdown, .microbench, .fused    its other steps, alone: kernels of a step, convolutions and launches,
    cuDNN's fused convolutions on an H100 or H200
python -m benchmarks.report --write README.md benchmarks/NOTES.md    the tables; of files alone: report JSON ...
python -m benchmarks.plots JSON ...    throughput.png and roofline.png, beside each file of benchmarks.attack

A new benchmark is a module with `table(results) -> str`. It begins its results with `measure.begun`, and NOTES.md has the marker
<!-- benchmarks:CARD:NAME --> for the table of benchmarks/results/CARD/NAME.json.

`pip install -e '.[bench,rivals]'` brings the rivals. Those that are missing are left out, and recorded.
"""
