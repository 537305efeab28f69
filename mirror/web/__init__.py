"""The HTTP side of the mirror: a request line becomes a typed request, a result a response.

Must not know: how content is obtained, from the cache or from an upstream. ``web`` calls
``mirror.pull.service`` and imports neither ``store`` nor ``upstream``.

Reading order:

- ``handler``: one handler for all requests, read from top to bottom. Begin here.
- ``paths``: parses the request line. Pure.
- ``streaming``: sends content: ranges, conditions, growing content.
- ``client_socket``: detects stalled clients, and sends files with ``sendfile``.
- ``errors``: the table from domain errors to HTTP statuses. Pure.
- ``health``: the readiness report.
"""
