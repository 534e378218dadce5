"""What must not be kept, and what must not be lost."""

import pytest

from muse_lightning.configuration.redact import REDACTED, arguments_without_credentials, without_credentials
from tests.data.test_credentials import URLS


@pytest.mark.parametrize(
    "line",
    [
        "password: hunter2",
        "    aws_secret_access_key: hunter2",
        "  aws_access_key_id: hunter2",
        "  - api_key: hunter2",
        "token: hunter2",
        "hf_token: hunter2",
        'client_secret: "hunter2"',
        "url: s3://me:hunter2@host/path",
        "- https://hunter2@host/path",
        "- https://host/path?a=1&X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
        *(f"- https://host/a?page=2&{key}=hunter2" for key in ("auth", "pwd", "pass", "code", "st")),
        "- https://host/a?page=2;sig=hunter2",
        "- https://host/a;sig=hunter2",
        "- 'https://host/a?sig=a''hunter2'",
        *(f"- {url}" for url, shown in URLS if url != shown),
    ],
)
def test_credentials_go(line: str) -> None:
    text = without_credentials(f"a: 1\n{line}\nb: 2\n")
    assert "hunter2" not in text
    assert text.startswith("a: 1\n")
    assert text.endswith("\nb: 2\n")


@pytest.mark.parametrize(
    "line",
    [
        "tokenizer: bytes",
        "repo_token: <|repo_name|>",
        "api_key: null",
        "path: s3://bucket/a@b",
        *(f"- {url}" for url, shown in URLS if url == shown),
        "max_tokens: 3",
        "- https://host/path?page=2#v1",
    ],
)
def test_everything_else_stays(line: str) -> None:
    assert without_credentials(line + "\n") == line + "\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--data.source.password=hunter2"],
        ["--data.source.password", "hunter2"],
        ["--data.dataset=s3://me:hunter2@host/path"],
        ["--data.sources=[{class_path: A, init_args: {api_key: hunter2}}]"],
        ["--data.sources", "{token: hunter2"],
        ["https://host/a?sig=hunter2"],
    ],
    ids=" ".join,
)
def test_credentials_leave_a_command_line(args: list[str]) -> None:
    kept = arguments_without_credentials(["--a=1", *args, "--b", "2"])
    assert "hunter2" not in " ".join(kept)
    assert REDACTED in " ".join(kept)
    assert (kept[0], kept[-2:], len(kept)) == ("--a=1", ["--b", "2"], 3 + len(args))
