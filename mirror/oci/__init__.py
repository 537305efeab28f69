"""Types and grammars of the OCI Distribution and Image specifications.

Frozen types and pure functions: they get text or bytes, and return a value or raise an error of
``errors.py``. Every other package may import them. In reading order:

- ``reference.py``: ``Digest``, ``Repository``, ``Tag``, and the running hash of content.
- ``descriptor.py``: media types, and the blobs and manifests that a manifest refers to.
- ``headers.py``: ``Content-Type``, ``Range``, ``Content-Range``, ``ETag`` and its conditions.
- ``accept.py``, ``challenge.py``, ``links.py``: ``Accept``, ``WWW-Authenticate``, ``Link``.
- ``platform.py``: platforms, and the entries of an index that a choice of them takes.
- ``versions.py``: versions in tags, and ranges of versions.
- ``errors.py``: the errors of all packages, with the OCI error code of each.
- ``text.py``: escapes of untrusted text.

Must not know: asyncio, HTTP libraries, files, our HTTP status codes.
"""
