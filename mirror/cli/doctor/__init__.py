"""``doctor``: find what is wrong with a mirror, or with a node that should pull through it.

In reading order:

- ``findings.py``: one finding, with its remedy.
- ``machine_checks.py``: the configuration, the data directory, the index, the port, the clock.
- ``endpoint_checks.py``: each endpoint of each upstream.
- ``node_checks.py``: pulls of the probe image by the container runtimes of a node.
- ``runtimes.py``: which runtimes there are, and their commands.
- ``command.py``: the arguments, and the printing.

Must not know: how requests are served.
"""
