"""Secrets in addresses: refused where an address is given, and left out wherever a message quotes one."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from sqsd_filter.errors import UsageError

_NAMES = r"secret|token|sig|pass|pwd|key|auth|jwt|code|credential|accessid|session"  # of parameters, in any case
_TOKENS = r"hf_\w{8,}|gh[a-z]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|AKIA\w{12,}|eyJ[\w-]{8,}\.[\w-]{8,}[\w.-]*"
_BY_NAME = re.compile(_NAMES, re.IGNORECASE)
_BY_FORM = re.compile(rf"(?<![A-Za-z0-9])({_TOKENS})")
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*)://(?P<user>[^\s/'\"?#]+)@", re.IGNORECASE)
_PARAMETER = re.compile(rf"([?&#;][^\s=&#;'\"]*(?:{_NAMES})[^\s=&#;'\"]*=)[^\s&#;'\")]+", re.IGNORECASE)
HIDDEN = "…"


def check_address(address: str) -> None:
    """Raise `UsageError` for a URL with a password, a key or a token in it. Any other text passes."""
    if "://" not in address:
        return
    try:
        parts = urlsplit(address)
        named = parse_qsl(parts.query) + parse_qsl(parts.fragment)
    except ValueError as problem:
        raise UsageError(f"A URL can't be read ({problem}): correct it.") from problem
    # before the @ of other services is a container or a login, and no secret
    user = parts.password or (parts.username if parts.scheme.startswith("http") else "")
    if user or any(_BY_NAME.search(name) for name, _ in named) or _BY_FORM.search(address):
        raise UsageError("A URL must not hold a password or a key: give those in the environment.")


def redacted(text: str) -> str:
    """The text without the secrets of the URLs in it."""

    def without_user(match: re.Match[str]) -> str:
        secret = ":" in match["user"] or match["scheme"].lower().startswith("http")
        return f"{match['scheme']}://{HIDDEN}@" if secret else match[0]

    text = _USER.sub(without_user, text) if "://" in text else text
    return _BY_FORM.sub(HIDDEN, _PARAMETER.sub(rf"\1{HIDDEN}", text) if "=" in text else text)
