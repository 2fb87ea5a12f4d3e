"""Compares kernels inside a running engine: which arm runs each step, what it costs, whether the results agree.

An arm is one implementation of a feature's calls: ``host`` is the engine's own, ``patch`` is ours, plugins add others.

    schedule        step number -> arm, from the seed alone
    assign          the schedule, unless a live command or the breaker says otherwise
    timing          device events around a step, read later without a sync
    shadow          both arms on the same inputs, compared on the device
    breaker         sends a feature back to the engine's own kernel
    record          what each process writes to disk
    merge           the records of all ranks as one run
    analysis        records -> verdicts
    stats           the statistics of the verdicts
    control         commands to a running engine
    control_file    how commands are stored on disk
    html, svg       verdicts -> one page with plots
    metrics         Prometheus metrics, if the engine exposes them
    feature         the experiment on one feature: the arm of its calls
    live            all of this in a running engine

Importing any of these modules imports neither torch nor an engine.
"""
