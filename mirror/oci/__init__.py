"""The vocabulary of the OCI Distribution and Image specifications, sans-IO.

Frozen types and pure functions only. Nothing here knows asyncio, HTTP
libraries, files or HTTP status codes; every other room may import it.
"""
