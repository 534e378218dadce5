"""`muse bench attention`: MuSe attention timed beside the best alternatives on one GPU, once it is known to be right.

`command.py` is the verb; the order of its work is gate, inputs, variants, timing, parts, error, then report and figure.
"""
