"""How to ask a registry. Yields descriptors and bytes, or a typed error.

Must not know: the store, our clients.
"""
