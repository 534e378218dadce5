"""Credentials out of text that is kept: a run's config.yaml is read by more people than may use the keys in it."""

import re
from collections.abc import Sequence

import yaml

from muse_lightning.errors import QUERY_IN_URL, USER_IN_URL

REDACTED = "<redacted>"
# Not every "..._token": the special tokens of a tokenizer are called so as well.
SECRET_NAME = (
    r"(?:[\w.-]*[_-])?(?:password|passwd|secret|api_?key|access_key(?:_id)?|credentials?|"
    r"(?:auth|access|session|api|hf|bearer)_token)|token"
)
SECRET_VALUE = re.compile(rf"^(\s*-?\s*(?:{SECRET_NAME}):[ \t]+)(?!null\b)\S.*$", re.IGNORECASE | re.MULTILINE)
# In any address; in one whose query is known as such, every value goes but those of HARMLESS_KEYS.
SECRET_ASSIGNED = re.compile(
    r"(?<=[?&;])([\w.-]*(?:sig|signature|token|credential|key|secret|password)[\w.-]*=)[^\s&;'\"]+", re.IGNORECASE
)
HARMLESS_KEYS = frozenset({"download", "format", "lang", "page", "raw", "ref", "rev", "revision", "version"})


def without_credentials(text: str) -> str:
    """YAML text with the values of secret-sounding keys, and users, passwords and signatures in addresses, replaced."""
    # Users first, for a password may hold a question mark; what stands for them meanwhile does not end a URL.
    text = QUERY_IN_URL.sub(_redacted_query, USER_IN_URL.sub("\0@", text)).replace("\0", REDACTED)
    text = SECRET_ASSIGNED.sub(rf"\1{REDACTED}", text)
    return SECRET_VALUE.sub(rf"\1{REDACTED}", text)


def arguments_without_credentials(args: Sequence[str]) -> list[str]:
    """A command line likewise: a value in which there is a credential is replaced whole."""
    kept: list[str] = []
    key = ""
    for arg in args:
        name, is_assignment, value = arg.partition("=")
        if not arg.startswith("-"):
            name, is_assignment, value = key, "", arg
        is_safe = not value or _is_without_credentials(name.lstrip("-").rpartition(".")[2], value)
        kept.append(arg if is_safe else f"{name}={REDACTED}" if is_assignment else REDACTED)
        key = name
    return kept


def _is_without_credentials(key: str, value: str) -> bool:
    try:
        # As in config.yaml: a line for each key.
        text = yaml.safe_dump({key: yaml.safe_load(value)}, default_flow_style=False, width=2**31)
    except yaml.YAMLError:
        return False
    return without_credentials(text) == text and without_credentials(value) == value


def _redacted_query(found: re.Match[str]) -> str:
    parts = re.split("([&;])", found[2])
    return f"{found[1]}?{''.join(_redacted_part(part) for part in parts)}"


def _redacted_part(part: str) -> str:
    key, assigns, _ = part.partition("=")
    if part in ("&", ";", "") or (assigns and key.lower() in HARMLESS_KEYS):
        return part
    return f"{key}={REDACTED}" if assigns else REDACTED
