"""Time and memory of the head and of the losses, against every peer on the same task.

`python -m bench` checks, measures and reports, on the CPU or the GPU at hand; `python -m bench.gpu` measures what
matters most on a GPU first, within minutes; `python -m bench.report --plots FOLDER` makes tables and pictures of what
they wrote, all of bench/results unless files are named.

shapes.py          real models' heads, the standard shape, and what a machine allows
providers.py       who computes: plain torch, ours, and the peers that are installed
suite.py           what a suite is: inputs, providers, passes, FLOPs and bytes, float64 truth
heads.py           the suites that multiply by the head: head, scaling, models, dpo
row_suites.py      those that do not: tail, logits
suites.py          all of them by name
trainer_step.py    whole training steps against TRL's trainer
fresh.py           one case in a process of its own: peak extra memory, and error against float64
bench_suites.py    the timed cases, collected by pytest with pytest-benchmark
gpu.py, meter.py   the same on a GPU: blocks in the order of importance, and a meter that counts by the device's clock
once.py            a quick look: providers in turn, nothing written
record.py          JSON lines, one a measurement, with all that its figures depend on
report.py          tables of them
plots.py           pictures of them
"""
