"""Reports to the operator: events, log lines, metrics.

Another package reports a frozen event to an observer, and does not know who observes. In reading
order:

- ``events.py``: each event, and ``RequestRecord``, the record of one request. The events of hosted
  repositories and of jobs are in ``hosted_events.py`` and ``job_events.py``.
- ``logs.py``: the observer that writes log lines, and the ``Server-Timing`` header.
- ``library_logs.py``: writes what libraries log as our lines.
- ``log_stream.py``: passes log lines to a thread, so that no write blocks the event loop.
- ``metrics.py``: the observer that counts, for Prometheus.

Must not know: how an event comes about.

This module imports nothing: ``prometheus_client`` reads its environment when it is imported, so
the server decides when that happens.
"""
