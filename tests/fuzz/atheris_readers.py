"""Coverage-guided fuzzing of one reader. Usage: python -m tests.fuzz.atheris_readers READER CORPUS [libFuzzer options]

atheris is in the extra `fuzz` (Linux, x86-64). CORPUS is a folder of inputs, to which new ones are added; it begins as
a copy of tests/fuzz/corpus/READER. `-max_total_time=300` ends after five minutes, `-runs=N` after N inputs.
"""

import contextlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["muse_lightning", "tests.fuzz.readers"]):
    from tests.fuzz.readers import READERS, read

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, -0.0, float("nan"), float("inf"), "", "a", "..", "../x"),
    *(
        "/etc/passwd",
        "\ud800",
        "\0",
        "x" * 300,
        [],
        [[]],
        {},
        [0],
        {"a": 1},
        [None],
        "F32",
        "BF16",
        [2**40, 2**40],
        [-1],
    ),
]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time a value of a JSON document is replaced, removed or copied elsewhere; else bytes are."""
    chosen = random.Random(seed)
    start = 8 if data[8:9] == b"{" else 0  # the header of safetensors has its length before it
    if chosen.random() < 0.5:
        return atheris.Mutate(data, max_size)
    try:
        document = json.loads(data[start:].rsplit(b"}", 1)[0] + b"}")
    except (ValueError, RecursionError):
        return atheris.Mutate(data, max_size)
    places = list(_places(document))
    if not places:
        return atheris.Mutate(data, max_size)
    holder, key = chosen.choice(places)
    fault = chosen.random()
    if fault < 0.6:
        holder[key] = chosen.choice(VALUES)
    elif fault < 0.75:
        del holder[key]
    else:
        other, there = chosen.choice(places)
        with contextlib.suppress(IndexError):
            holder[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else other[there]))
    text = json.dumps(document).encode()
    if not start:
        return text[:max_size]
    tail = data[8 + int.from_bytes(data[:8], "little") :]
    return (len(text).to_bytes(8, "little") + text + tail)[:max_size]


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    if name not in READERS:
        raise SystemExit(f"{name!r} is no reader; accepted: {', '.join(READERS)}")
    with tempfile.TemporaryDirectory() as folder:

        def test(data: bytes) -> None:
            read(name, data, Path(folder))

        atheris.Setup([sys.argv[0], corpus, "-max_len=20000", *options], test, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
