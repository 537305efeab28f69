"""The commands of ``oci-mirror``.

In reading order:

- ``main.py``: the parser, and the commands that serve and configure.
- ``commands.py``: the table of the commands that have a module of their own.
- ``arguments.py``: the arguments that many of them have.
- ``output.py``, ``listing.py``, ``table_layout.py``, ``exit_codes.py``: lines, tables, exit codes.
- ``check.py``: ``check-config``, and the checks that ``serve`` makes before it starts.
- ``online.py``: ``check-config --online``, one request to each endpoint.
- ``clients.py``: ``clients``, the configuration files of container clients.
- ``completion.py``: ``completion``, for shells.
- ``doctor/``: ``doctor``, and ``own_server.py``: requests to a running server.
- ``schemas.py``: the JSON Schemas of the lines of ``--json``.
- ``schema.py``: ``schema``, the JSON Schema of the configuration.
- ``health.py``: ``healthcheck``.

Must not know: how requests are served.
"""
