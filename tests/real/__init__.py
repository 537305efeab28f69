"""Real programs for tests: registries, token services, clients, a rate-limited proxy, our server.

Every class here is a synchronous context manager that starts a program on a free loopback port in
a directory of its own, waits until it answers, and leaves no process and no file behind. A program
that is not installed fails the test loudly; nothing here skips. In an ``async`` test call these
through ``asyncio.to_thread``, since they block.
"""
