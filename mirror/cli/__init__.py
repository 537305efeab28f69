"""The commands of ``oci-mirror``.

In reading order:

- ``main.py``: the parser, exit codes, and one function for each command.
- ``check.py``: ``check-config``, and the checks that ``serve`` makes before it starts.
- ``online.py``: ``check-config --online``, one request to each endpoint.
- ``clients.py``: ``clients``, the configuration files of container clients.
- ``schema.py``: ``schema``, the JSON Schema of the configuration.
- ``health.py``: ``healthcheck``.

Must not know: how requests are served.
"""
