"""What the suites and the commands share, in the same rooms as ``tests``.

``accuracy``, ``graph``, ``perf`` and ``report`` serve the suite of their name; ``machine`` says who measured. Beside
them stands what all of them use: the operator catalogue, the models' dimensions, the tiny checkpoint, files.
"""
