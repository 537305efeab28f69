"""Access: who a client is, and what it may do. In reading order:

- ``identity.py``: the user behind a request, and the actions that rules are about.
- ``rules.py``: the one decision, as a pure function of identity, repository and action.
- ``users.py``, ``access_tokens.py``, ``issuers.py``: passwords, tokens and JWTs.
- ``watched_file.py``: the files of credentials, which are read again when they change.
- ``key_sets.py``: the keys of issuers, from files and URLs.
- ``failure_limit.py``: how often an address may fail.
- ``logins.py``: turns an ``Authorization`` header into an identity.
- ``access_control.py``: the interface of this package.

Must not know: HTTP beyond that header, what is stored.
"""
