"""Access: who a client is, and what it may do. In reading order:

- ``identity.py``: the user behind a request.
- ``rules.py``: the one decision, as a pure function of identity, repository and action.
- ``users.py``, ``access_tokens.py``, ``issuers.py``: passwords, tokens and JWTs.
- ``watched_file.py``: the files of credentials, which are read again when they change.
- ``key_sets.py``: the keys of issuers, from files and URLs.
- ``known_names.py``: the names that users of the files have, or once had.
- ``login_credentials.py``: all of these of one configuration, and their refresh.
- ``failure_limit.py``: how often an address may fail.
- ``logins.py``: turns an ``Authorization`` header into an identity.
- ``access_control.py``: the interface of this package.

Must not know: HTTP beyond that header, what is stored.
"""
