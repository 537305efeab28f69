"""The configuration: typed settings, read from a YAML file and the environment.

Must not know: what the settings are used for.
"""
