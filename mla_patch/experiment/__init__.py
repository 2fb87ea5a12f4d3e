"""Two kernels in one running engine: which arm runs a step, what it cost, whether the numbers agree.

schedule   step number -> arm, from the seed alone          assign    the same, with live commands and the breaker
timing     device events, harvested without a sync          shadow    both arms on the same inputs, compared
record     what each process keeps on disk                  merge     the ranks' records as one
analysis   records -> verdicts                              stats     their statistics
control    commands to a running engine                     control_file   their form on disk
html       verdicts -> one page                             svg       its plots
breaker    back to the host                                 metrics   counters, where the engine exposes them
live       all of it in a running engine

Importing any of them imports neither torch nor an engine.
"""
