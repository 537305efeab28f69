"""The decisions: may this be served, is it fresh, join or fetch, what if the upstream fails.

Must not know: aiohttp, paths.
"""
