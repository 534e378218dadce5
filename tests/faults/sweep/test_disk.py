"""The model of what a power cut leaves, on system calls written by hand."""

from pathlib import Path

import pytest

from tests.faults.sweep.disk import Disk, power_cuts
from tests.faults.sweep.tracing import parse

FOLDER = "/r/c"
MAKE = ['mkdir("/r/c", 0777) = 0', "fsync(3</r>) = 0"]
FLUSH = f"fsync(3<{FOLDER}>) = 0"


def write(name: str, is_flushed: bool = True) -> list[str]:
    path = f"{FOLDER}/.{name}.partial-1"
    return [
        f'openat(AT_FDCWD</x>, "{path}", O_WRONLY|O_CREAT|O_EXCL, 0666) = 5<{path}>',
        f'write(5<{path}>, ""..., 64) = 64',
        f"fsync(5<{path}>) = {'0' if is_flushed else '-1 EIO (Input/output error) (INJECTED)'}",
        f'rename("{path}", "{FOLDER}/{name}") = 0',
    ]


DATA, MANIFEST = "step=1.ckpt", "step=1.manifest.json"
WHOLE = [*MAKE, *write(DATA), FLUSH, *write(MANIFEST), FLUSH]
CONFIRM = 'access("/confirmed/1", F_OK) = -1 ENOENT (No such file or directory)'


def disk_after(lines: list[str]) -> Disk:
    disk = Disk(Path(FOLDER))
    for call in parse("\n".join(lines)):
        disk.apply(call)
    return disk


def cuts(lines: list[str]) -> list[str]:
    return [line.split(" (")[0] for line in power_cuts(parse("\n".join(lines)), Path(FOLDER))]


def test_what_is_flushed_in_its_order_is_there() -> None:
    assert disk_after(WHOLE).surely_whole() == {1}
    assert not cuts([*WHOLE, CONFIRM])


@pytest.mark.parametrize("left_out", range(1, len(WHOLE)))
def test_every_step_counts(left_out: int) -> None:
    """But for writes: a file that is empty is as whole to the model as any."""
    lines = WHOLE[:left_out] + WHOLE[left_out + 1 :]
    is_write = WHOLE[left_out].startswith("write")
    assert (cuts([*lines, CONFIRM]) == []) == is_write


@pytest.mark.parametrize(
    "after",
    [
        [f'unlink("{FOLDER}/{DATA}") = 0'],
        [f'openat(AT_FDCWD</x>, "{FOLDER}/{MANIFEST}", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 5<{FOLDER}/{MANIFEST}>'],
        [f'write(5<{FOLDER}/{DATA}>, ""..., 64) = 64'],
        write(MANIFEST, is_flushed=False),
    ],
    ids=["removed", "begun anew", "written to", "replaced by what failed to be flushed"],
)
def test_what_is_changed_afterwards_may_be_lost(after: list[str]) -> None:
    assert cuts([*WHOLE, CONFIRM, *after])[0] == "after a power cut, confirmed step 1 may be lost"


def test_replaced_by_what_is_flushed_it_stays() -> None:
    assert not cuts([*WHOLE, CONFIRM, *write(MANIFEST)])


@pytest.mark.parametrize("lines", [[*write(MANIFEST), FLUSH, *write(DATA)], [*write(DATA), *write(MANIFEST)]])
def test_a_manifest_before_its_data_is_found(lines: list[str]) -> None:
    assert cuts([*MAKE, *lines]) == ["after a power cut, step 1 may have a manifest and no data"]


def test_calls_are_read_from_a_log() -> None:
    calls = parse(
        "read(4</a/b c>, 0x7ff, 170) = -1 EIO (Input/output error) (INJECTED)\n"
        'read(4</a/b (deleted)>, ""..., 170) = 170\n'
        'rename("/a/x", "/a/y") = ?\n'
        "+++ killed by SIGKILL +++\n"
    )
    assert [(call.name, call.number, call.paths, call.error, call.was_injected) for call in calls] == [
        ("read", 1, ("/a/b c",), "EIO", True),
        ("read", 2, ("/a/b",), "", False),
        ("rename", 1, ("/a/x", "/a/y"), "killed", False),
    ]
