"""Time and memory of the head and of the tail, against plain torch. `python -m bench` runs all and prints one table.

suites.py          what is computed: inputs, providers, passes, FLOPs, float64 truth; one class a suite
fresh.py           one case in a process of its own: peak extra memory, and error against float64
bench_suites.py    the timed cases, collected by pytest with pytest-benchmark
report.py          their results as a table and as JSON lines
"""
