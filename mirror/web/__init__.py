"""The HTTP side of the mirror: a request line becomes a typed request, a result a response.

Must not know: how content is obtained, from the cache or from an upstream. ``web`` calls
``mirror.pull.service``. Of ``store`` it imports only ``store.reader``, the protocol by which a
response reads content. It imports nothing of ``upstream``.

Reading order:

- ``handler``: one handler for all requests, read from top to bottom. Begin here.
- ``paths``: parses the request line. Pure.
- ``streaming``: sends content: ranges, conditions, content that is still being fetched.
- ``stored_responses``: reuses the response to a request with the same bytes.
- ``response_headers``: the fields of every response, and which caches may store it. Pure.
- ``client_socket``: detects stalled clients, and sends files with ``sendfile``.
- ``errors``: the table from domain errors to HTTP statuses. Pure.
- ``health``: the readiness report.
"""
