"""Runs each trial in a process of its own that can be killed at any time.

::

    the study's process (run, server, outcome), one thread a trial
    └── forkserver: a fresh interpreter with the objective's modules loaded
        └── supervisor, one a trial: enforces the memory limit, stops and kills
            └── child: the objective

Two sockets a trial connect the study's process with the child (remote calls, output, the outcome)
and with the supervisor (orders, breaches, the exit report). Where there are no supervisors, on
other systems than Linux, a thread in `launch` takes their place.
"""
