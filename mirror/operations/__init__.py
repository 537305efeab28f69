"""The operations of a person who runs the mirror: fill the cache, clean it, repair it, mark images.

One module for each operation: a function that takes the parts that it needs, and a ``report``
callback for its progress. The commands, the admin API and the scheduled jobs of the server call the
same functions. Content is fetched through :mod:`mirror.pull`, as for a client.

Must not know: arguments of a command line, HTTP clients of ours, how progress is shown.
"""
