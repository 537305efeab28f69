"""The configuration: typed settings, read from a YAML file and the environment.

In reading order:

- ``settings.py``: each key with its type, default and description.
- ``values.py``: the grammars of sizes, durations, ratios, hosts, URLs.
- ``load.py``: YAML, environment variables, and error messages.

Must not know: what the settings are used for.
"""
