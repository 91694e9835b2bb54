"""Small seeded studies of what the losses do; README.md in this folder tells what they found.

granularity.py, adadpo.py, alphadpo.py, anchored.py, alpha_divergence.py    one study each
signed_accumulation.py    seconds and not losses, so not in STUDIES: groups too long for the workspace
common.py      command line, processes, intervals, tables, pictures
language.py    the demo's language model and pairs, a training loop that a study can look into, held-out measures
"""

STUDIES = ("granularity", "adadpo", "alphadpo", "anchored", "alpha_divergence")
