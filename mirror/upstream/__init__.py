"""Client of the upstream registries: send requests of the OCI Distribution specification.

The rest of the mirror knows one registry as :class:`mirror.upstream.api.Registry`. It gets typed
values and a stream of bytes, or an error of ``mirror.oci.errors``. Endpoints, tokens, redirects,
retries and time limits stay inside this package.

Reading order, from the outside in:

1. ``api.py``: the contract. Read this first; callers need nothing else.
2. ``registries.py``: creates one registry for each configured upstream.
3. ``registry.py``: builds the requests and checks the responses: digests, ranges, pages.
4. ``failover.py``: sends one request to the endpoints in turn, with retries and credentials.
5. ``transport.py``: one HTTP exchange with its redirects. The only user of the client session.
   Translates failures into typed errors.

Used on the way:

- ``endpoints.py``: order of the endpoints, and a circuit breaker for each. No I/O.
- ``retry.py``: which failures are retried, delays, ``Retry-After``. Pure.
- ``auth.py``: ``Authorization`` headers: Basic, and bearer tokens of a token service.
- ``credentials.py``: logins from the configuration, files, a Docker ``config.json``, helpers.
- ``outbound.py``: which URLs and addresses may be connected to, and through which proxy.
- ``connections.py``: look-up of names, TLS settings, our own addresses.
- ``failures.py``: why an exchange failed, in words.
- ``statuses.py``: translates refusals into typed errors.

One request passes: registry, failover, auth (credentials), outbound, transport. A 429 becomes
``UpstreamRateLimited`` in ``statuses.error_of`` and a pause in ``CircuitBreaker.back_off``.

Must not know: the store, our clients.
"""
