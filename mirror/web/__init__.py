"""The HTTP surface: a path becomes a typed request, an answer becomes a response.

Must not know: how any of it is done.
"""
