"""Bytes on disk: content by digest, growing content, tag records, quota, eviction, pins.

Must not know: HTTP, registries.
"""
