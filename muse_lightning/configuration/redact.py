"""Credentials out of text that is kept: a run's config.yaml is read by more people than may use the keys in it."""

import re

REDACTED = "<redacted>"
# Not every "..._token": the special tokens of a tokenizer are called so as well.
SECRET_NAME = (
    r"(?:[\w.-]*[_-])?(?:password|passwd|secret|api_?key|access_key(?:_id)?|credentials?|"
    r"(?:auth|access|session|api|hf|bearer)_token)|token"
)
SECRET_VALUE = re.compile(rf"^(\s*-?\s*(?:{SECRET_NAME}):[ \t]+)(?!null\b)\S.*$", re.IGNORECASE | re.MULTILINE)
SECRET_IN_QUERY = re.compile(
    r"(?<=[?&])([\w.-]*(?:sig|signature|token|credential|key|secret|password)[\w.-]*=)[^\s&'\"]+", re.IGNORECASE
)
USER_IN_ADDRESS = re.compile(r"(\w+://)[^\s/@]+@")


def without_credentials(text: str) -> str:
    """YAML text with the values of secret-sounding keys, and users, passwords and signatures in addresses, replaced."""
    text = SECRET_IN_QUERY.sub(rf"\1{REDACTED}", text)
    return USER_IN_ADDRESS.sub(rf"\1{REDACTED}@", SECRET_VALUE.sub(rf"\1{REDACTED}", text))
