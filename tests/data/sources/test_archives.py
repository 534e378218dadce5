"""Archives: names, prefixes, licences, and every kind of hostile member."""

import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from muse_lightning.data.documents import DamagedSource, Repository
from muse_lightning.data.sources import Archives, Download, downloads
from muse_lightning.data.sources.archives import declared_by_file_name
from muse_lightning.data.sources.unpacking import BoundedStream
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, REPOSITORIES, contents, counted, read_all, special, tar, write, zipped

FILES = [(f"alpha-1.0/{path}", content) for path, content in REPOSITORIES["alpha"].items()]
PKG_INFO = b"Metadata-Version: 2.4\nName: Alpha.Kit\nVersion: 1.2\nLicense-Expression: MIT OR Apache-2.0\n\nText\n"


def only(source: Archives) -> Repository:
    (unit,) = source.units()
    (repository,) = unit.read(LIMITS)
    return repository


def refusal(path: Path, limits=LIMITS) -> str:
    """The line that says why an archive is not read."""
    (unit,) = Archives(path).units()
    with pytest.raises(DamagedSource) as error:
        read_all(unit, limits)
    assert str(path) not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_of_every_compression(tmp_path, mode):
    path = tar(tmp_path / "alpha-1.0.tar.gz", FILES, mode)
    assert contents(Archives(path)) == {"alpha": REPOSITORIES["alpha"]}


def test_tar_packed_by_zstd(tmp_path):
    plain = tar(tmp_path / "plain", FILES, "w")
    write(tmp_path / "a" / "alpha-1.0.tar.zst", zstandard.compress(plain.read_bytes()))
    assert contents(Archives(tmp_path / "a")) == {"alpha": REPOSITORIES["alpha"]}


def test_zip_is_the_same_repository(tmp_path):
    assert contents(Archives(zipped(tmp_path / "alpha-1.0.zip", FILES))) == {"alpha": REPOSITORIES["alpha"]}


def test_a_folder_is_searched_at_any_depth_and_other_files_are_not_taken(tmp_path):
    tar(tmp_path / "x" / "y" / "alpha-1.0.tgz", FILES)
    zipped(tmp_path / "trap.zip", list(REPOSITORIES["trap"].items()))
    write(tmp_path / "notes.txt")
    assert [unit.name for unit in Archives(tmp_path).units()] == ["trap.zip", "x/y/alpha-1.0.tgz"]
    assert set(contents(Archives(tmp_path))) == {"alpha", "trap"}


@pytest.mark.parametrize(
    ("file", "name", "version"),
    [
        ("requests-2.32.5.tar.gz", "requests", "2.32.5"),
        ("ruamel.yaml-0.18.tar.gz", "ruamel.yaml", "0.18"),
        ("python-dateutil-2.9.0.post0.tar.gz", "python-dateutil", "2.9.0.post0"),
        ("coreutils_9.1.orig.tar.xz", "coreutils", "9.1.orig"),
        ("numpy-2.0.0-cp311-cp311-manylinux_2_17_x86_64.whl", "numpy", "2.0.0"),
        ("notes.zip", "notes", None),
    ],
)
def test_names_without_metadata_are_those_of_the_files(file, name, version):
    assert declared_by_file_name(f"/a-1/{file}")[:2] == (name, version)


def test_metadata_gives_name_version_and_licence(tmp_path):
    members = [*FILES, ("alpha-1.0/PKG-INFO", PKG_INFO), ("alpha-1.0/src/PKG-INFO", b"Name: other\n")]
    repository = only(Archives(tar(tmp_path / "x-3.tar.gz", members)))
    assert (repository.name, repository.revision, repository.licence) == ("Alpha.Kit", "1.2", "MIT OR Apache-2.0")


def test_npm_metadata(tmp_path):
    package = b'{"name": "@scope/kit", "version": "4.0.0", "license": "ISC"}'
    repository = only(Archives(tar(tmp_path / "kit-4.0.0.tgz", [("package/package.json", package)])))
    assert (repository.name, repository.revision, repository.licence) == ("@scope/kit", "4.0.0", "ISC")


def test_a_wheel_keeps_its_folders_and_its_licence_files_decide_the_licence_only(tmp_path):
    members = [("alpha/a.py", b"a\n"), ("alpha-1.0.dist-info/METADATA", PKG_INFO)]
    members += [("alpha-1.0.dist-info/licenses/LICENSE", b"MIT\n"), ("alpha-1.0.dist-info/RECORD", b"x\n")]
    path = zipped(tmp_path / "alpha-1.0-py3-none-any.whl", members)
    assert contents(Archives(path)) == {"Alpha.Kit": {"alpha/a.py": b"a\n"}}
    licences = [file.path for file in only(Archives(path)).files if file.for_licence]
    assert licences == ["alpha-1.0.dist-info/METADATA", "alpha-1.0.dist-info/licenses/LICENSE"]


def test_suffixes_and_excluded_folders(tmp_path):
    members = [*FILES, ("alpha-1.0/LICENSE", b"MIT\n"), ("alpha-1.0/node_modules/x.py", b"x\n")]
    source = Archives(tar(tmp_path / "alpha-1.0.tar.gz", members), suffixes=(".py",))
    assert set(contents(source)["alpha"]) == {"src/a.py", "src/b.py"}
    assert counted(source) == {"suffix": 1, "excluded": 1}
    assert [file.path for file in only(source).files if file.for_licence] == ["LICENSE"]


def test_hostile_members_of_a_tar_are_counted(tmp_path):
    members = [
        ("good/a.py", b"a\n"),
        ("../outside.py", b"secret\n"),
        ("good/../../outside.py", b"secret\n"),
        ("/etc/passwd", b"secret\n"),
        ("C:\\windows\\a.py", b"secret\n"),
        ("good\\..\\..\\a.py", b"secret\n"),
        ("good/" + "x" * 5000, b"secret\n"),
        special("good/link", tarfile.SYMTYPE, "/etc/passwd"),
        special("good/hard", tarfile.LNKTYPE, "../../etc/passwd"),
        special("good/loop", tarfile.SYMTYPE, "loop"),
        special("good/pipe", tarfile.FIFOTYPE),
        special("good/device", tarfile.CHRTYPE),
        special("good/folder", tarfile.DIRTYPE),
        ("good/link/passwd", b"below a link\n"),
        ("good/big.py", b"x" * 10_001),
        ("good/twice.py", b"first\n"),
        ("./good//twice.py", b"second\n"),
        (os.fsdecode(b"good/caf\xe9.py"), b"odd\n"),
        ("good/binary.py", b"\0\1"),
    ]
    source = Archives(tar(tmp_path / "good.tar.gz", members))
    assert contents(source) == {
        "good": {
            "a.py": b"a\n",
            "link/passwd": b"below a link\n",
            "twice.py": b"second\n",
            os.fsdecode(b"caf\xe9.py"): b"odd\n",
            "binary.py": b"\0\1",
        }
    }
    assert counted(source) == {"outside": 6, "symlink": 3, "special": 2, "oversize": 1, "shadowed": 1}


def test_hostile_members_of_a_zip_are_counted(tmp_path):
    link = zipfile.ZipInfo("good/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    device = zipfile.ZipInfo("good/device")
    device.external_attr = (stat.S_IFCHR | 0o600) << 16
    lzma_packed = zipfile.ZipInfo("good/lzma.py")
    lzma_packed.compress_type = zipfile.ZIP_LZMA
    members = [
        ("good/a.py", b"a\n"),
        ("../outside.py", b"secret\n"),
        ("/etc/passwd", b"secret\n"),
        (link, b"/etc/passwd"),
        (device, b""),
        (lzma_packed, b"x\n"),
        ("good/big.py", b"x" * 10_001),
        ("good/folder/", b""),
    ]
    source = Archives(zipped(tmp_path / "good.zip", members))
    assert contents(source) == {"good": {"a.py": b"a\n"}}
    assert counted(source) == {"outside": 2, "symlink": 1, "special": 1, "unreadable": 1, "oversize": 1}


def test_names_in_a_zip_that_are_not_flagged_as_utf8(tmp_path):
    path = zipped(tmp_path / "good.zip", [("good/cafX.py", b"a\n"), ("good/b.py", b"b\n")])
    path.write_bytes(path.read_bytes().replace(b"cafX", b"caf\xe9"))
    assert set(contents(Archives(path))["good"]) == {os.fsdecode(b"caf\xe9.py"), "b.py"}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_truncated_and_corrupt_tars_are_refused(tmp_path, mode):
    whole = tar(tmp_path / "whole", [*FILES, ("alpha-1.0/noise", os.urandom(9000))], mode).read_bytes()
    for number, damaged in enumerate([whole[:-1], whole[: len(whole) // 2], whole[:20]]):
        refusal(write(tmp_path / f"{number}.tar.gz", damaged))
    middle = len(whole) // 2
    refusal(write(tmp_path / "flipped.tar.gz", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]))


def test_a_plain_tar_with_a_broken_header_is_refused(tmp_path):
    whole = tar(tmp_path / "whole", FILES, "w").read_bytes()
    broken = whole[:1024] + b"x" + whole[1025:]
    assert "broken header" in refusal(write(tmp_path / "broken.tar", broken))
    refusal(write(tmp_path / "cut.tar", whole[:515]))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 no archive", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    refusal(write(tmp_path / "x.zip", content))


def test_a_broken_member_of_a_zip_is_counted_alone(tmp_path):
    noise = os.urandom(500)
    path = zipped(tmp_path / "good.zip", [("good/a.py", b"a\n"), ("good/noise", noise), ("good/b.py", b"b\n")])
    data = path.read_bytes()
    at = data.index(noise[:20])
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert set(contents(Archives(path))["good"]) == {"a.py", "b.py"}
    assert counted(Archives(path)) == {"unreadable": 1}


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_bomb_is_refused_by_its_ratio(tmp_path, mode):
    bomb = tar(tmp_path / "bomb.tar.gz", [("bomb/zeros", bytes(65 << 20))], mode)
    assert bomb.stat().st_size < 100_000
    assert "unpacks to more than 67,108,864 bytes" in refusal(bomb)


def test_a_bomb_is_refused_by_its_size(tmp_path):
    files = tar(tmp_path / "many.tar", [(f"a/{number}", os.urandom(5000)) for number in range(30)], "w")
    assert "unpacks to more than 100,000 bytes" in refusal(files, replace(LIMITS, max_unpacked_bytes=100_000))
    assert len(contents(Archives(files))["many"]) == 30


def test_a_zip_bomb_is_refused_before_anything_is_unpacked(tmp_path):
    path = zipped(tmp_path / "bomb.zip", [(f"bomb/{number}", bytes(1 << 20)) for number in range(70)])
    assert "unpacks to more than 67,108,864 bytes" in refusal(path)


def test_a_zip_that_lies_about_a_length_is_not_unpacked_beyond_it(tmp_path):
    path = zipped(tmp_path / "liar.zip", [("liar/zeros", bytes(5 << 20)), ("liar/a.py", b"a\n")])
    size = struct.pack("<L", 5 << 20)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<L", 10)))
    assert contents(Archives(path)) == {"liar": {"a.py": b"a\n"}}
    assert counted(Archives(path)) == {"unreadable": 1}


@pytest.mark.parametrize("make", [tar, zipped])
def test_too_many_members_are_refused(tmp_path, make):
    path = make(tmp_path / "many.zip", [(f"a/{number}", b"") for number in range(501)])
    assert "more than 500 members" in refusal(path)


def test_a_header_without_an_end_is_refused(tmp_path):
    # A pax header of 60 MiB: tarfile would load it, to find the name of one file.
    info = tarfile.TarInfo("a/b.py")
    info.type, info.size = tarfile.XHDTYPE, 60 << 20
    path = tmp_path / "header.tar"
    path.write_bytes(info.tobuf() + bytes(60 << 20))
    assert "asks for 62,914,560 bytes at once" in refusal(path)


def test_many_headers_of_one_member_are_refused(tmp_path):
    info = tarfile.TarInfo("a/b.py")
    info.type, info.size = tarfile.XHDTYPE, 400 << 10
    record = b"%d comment=" % (400 << 10)
    one = info.tobuf() + record + b"x" * ((400 << 10) - len(record) - 1) + b"\n"
    refused = refusal(write(tmp_path / "headers.tar", one * 3 + tarfile.TarInfo("a/b.py").tobuf() + bytes(1024)))
    assert "has a header of more than 1,048,576 bytes" in refused


def test_a_stream_is_read_forwards_only():
    stream = BoundedStream(io.BytesIO(bytes(100)), 1000, 1000)
    stream.read(20)
    assert stream.seek(30) == stream.tell() == 30
    with pytest.raises(DamagedSource, match="backwards"):
        stream.seek(29)


def test_a_negative_length_does_not_read_backwards(tmp_path):
    info = tarfile.TarInfo("a/b.py")
    header = bytearray(info.tobuf())
    # Base 256, as GNU tar writes numbers that do not fit: minus 1024.
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    refusal(write(tmp_path / "negative.tar", bytes(header) + bytes(1024)))


def test_an_xz_header_that_asks_for_gigabytes_is_refused(tmp_path):
    buffer = io.BytesIO(tar(tmp_path / "plain", FILES, "w").read_bytes())
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 512 << 20, "preset": 0}]
    refusal(write(tmp_path / "a.tar.xz", lzma.compress(buffer.getvalue(), filters=filters)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: Archives(root / "none"), "No such file"),
        (lambda root: Archives(write(root / "d" / "a.txt").parent), "no archive found"),
        (lambda root: Archives(), "neither path nor downloads"),
    ],
    ids=["missing", "empty", "nothing"],
)
def test_bad_places_are_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        list(make(tmp_path).units())
    assert "\n" not in str(error.value)


def test_what_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    tar(tmp_path / "more" / "a.tar", FILES)
    scandir, stat = os.scandir, os.stat

    def refuse_folder(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refuse_file(path, **options):
        if str(path).endswith("a.tar"):
            raise OSError(5, "Input/output error", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "scandir", refuse_folder)
    with pytest.raises(UserError, match=r"Archives: .*/more: cannot be read"):
        list(Archives(tmp_path).units())
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "stat", refuse_file)
    with pytest.raises(UserError, match=r"Archives: .*/a\.tar: Input/output error; give an archive"):
        list(Archives(tmp_path).units())


def test_downloads_are_fetched_once_and_compared(tmp_path):
    path = tar(tmp_path / "there" / "alpha-1.0.tar.gz", FILES)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = Archives(downloads=[Download(path.as_uri(), digest)], cache=tmp_path / "cache")
    assert contents(source) == {"alpha": REPOSITORIES["alpha"]}
    path.unlink()
    assert contents(source) == {"alpha": REPOSITORIES["alpha"]}
    (cached,) = (tmp_path / "cache").rglob("*.tar.gz")
    cached.write_bytes(b"rotten")
    with pytest.raises(UserError, match=r"download file://.*alpha-1.0.tar.gz: .*check the address"):
        contents(source)
    tar(path, [("alpha-1.0/other.py", b"other\n")])
    with pytest.raises(UserError, match=f"SHA-256 [0-9a-f]{{64}} found, {digest} expected"):
        contents(source)
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("path", ["..", "%2e%2e", ".", "", "a/..", "%00", "x" * 300, "a%2F..", "kit.zip/"])
def test_any_url_of_a_download_is_a_file_in_the_cache(tmp_path, monkeypatch, path):
    archive = zipped(tmp_path / "kit.zip", [("kit/a.py", b"x = 1\n")])
    monkeypatch.setattr(downloads, "open_file", lambda url: archive.open("rb"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    found = Archives(downloads=[Download(f"https://host/{path}", digest)], cache=tmp_path / "cache")
    for _ in range(2):
        (unit,) = found.units()
        assert Path(unit.location).is_file()
        assert Path(unit.location).parent == tmp_path / "cache" / "archives" / digest
        assert read_all(unit) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    write(tmp_path / "cache", b"no folder")
    with pytest.raises(UserError, match=r"download https://.*: cannot write .*/cache/archives/0+: Not a directory"):
        list(Archives(downloads=[Download("https://host/a.zip", "0" * 64)], cache=tmp_path / "cache").units())


def test_a_full_disk_is_no_fault_of_the_network(tmp_path, longest_file):
    path = tar(tmp_path / "alpha-1.0.tar.gz", FILES)
    download = Download(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())
    longest_file(64)
    with pytest.raises(UserError, match=r": cannot write .*: File too large; choose another cache$"):
        list(Archives(downloads=[download], cache=tmp_path / "cache").units())
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_file_in_the_cache_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "cache" / "archives" / ("0" * 64) / "a.zip").mkdir(parents=True)
    with pytest.raises(UserError, match=r"download https://.*: cannot write .*: Is a directory; choose another cache"):
        list(Archives(downloads=[Download("https://host/a.zip", "0" * 64)], cache=tmp_path / "cache").units())


def test_a_download_needs_a_digest():
    with pytest.raises(UserError, match="64 digits"):
        Download("https://example.com/a.tar.gz", "abc")
