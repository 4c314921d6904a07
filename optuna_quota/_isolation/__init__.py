"""Runs a trial in a process of its own that can be ended at any instant.

::

    the study's process, one thread a trial
    ├── template: a fresh interpreter that has the objective's modules loaded
    │   └── supervisor, one a trial: reaps and kills all that the trial starts
    │       └── child: the objective
    └── two sockets a trial: calls of the child, control of the supervisor
"""
