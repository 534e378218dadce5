"""Git repositories: revisions, kinds of entries, clones, and hostile repositories."""

import os
import shutil
import socket
import subprocess
import time
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources import GitRepositories, git_clones
from muse_lightning.errors import UserError
from tests.data.sources.builders import (
    LIMITS,
    REPOSITORIES,
    commit_all,
    contents,
    counted,
    git,
    git_repository,
    read_all,
    write,
)
from tests.data.sources.servers import git_server
from tests.data.test_jobs import is_running, wait_for

ALPHA = REPOSITORIES["alpha"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return git_repository(tmp_path / "alpha", ALPHA)


def source(path: Path | str, **arguments) -> GitRepositories:
    return GitRepositories([str(path)], **arguments)


def objects(repository: Path, kind: str) -> list[Path]:
    """The loose object files of one kind."""
    listed = git(repository, "cat-file", "--batch-all-objects", "--batch-check=%(objectname) %(objecttype)").split("\n")
    names = [line.split()[0] for line in listed if line.endswith(kind)]
    return [repository / ".git" / "objects" / name[:2] / name[2:] for name in names]


def written(repository: Path, *command: str, content: bytes) -> str:
    """The id of an object that git writes from what it is given."""
    done = subprocess.run(["git", *command], cwd=repository, input=content, capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_the_commit_is_read_and_not_the_work_tree(repository):
    write(repository / "src" / "a.py", b"edited\n")
    write(repository / "new.py")
    (unit,) = source(repository).units()
    (read,) = unit.read(LIMITS)
    assert unit.stamp == read.revision == git(repository, "rev-parse", "HEAD")
    assert contents(source(repository)) == {"alpha": ALPHA}
    assert [file.path for file in read.files] == sorted(ALPHA)


@pytest.mark.parametrize("pack", [False, True], ids=["loose", "packed"])
@pytest.mark.parametrize("bare", [False, True], ids=["work-tree", "bare"])
def test_any_revision_of_any_layout(repository, tmp_path, pack, bare):
    first = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "--annotate", "v1", "--message", "one")
    write(repository / "src" / "a.py", b"a = 2\n")
    second = commit_all(repository)
    git(repository, "branch", "side", first)
    if pack:
        git(repository, "gc", "--quiet")
    place = repository
    if bare:
        place = tmp_path / "bare" / "alpha.git"
        git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(place))
    for revision, content in {
        "HEAD": b"a = 2\n",
        "main": b"a = 2\n",
        second: b"a = 2\n",
        second[:8]: b"a = 2\n",
        "v1": b"a = 1\n",
        "side": b"a = 1\n",
        "HEAD~1": b"a = 1\n",
        first: b"a = 1\n",
    }.items():
        assert contents(source(f"{place}#{revision}"))["alpha"]["src/a.py"] == content
        assert contents(source(place, revision=revision))["alpha"]["src/a.py"] == content


def test_entries_that_are_no_files_are_counted(repository, tmp_path):
    (repository / "link").symlink_to("/etc/passwd")
    git(repository, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendored")
    write(repository / "node_modules" / "x.js")
    write(repository / "big.py", b"x" * 10_001)
    write(repository / os.fsdecode(b"caf\xe9.py"), b"odd\n")
    git(repository, "add", "link", "node_modules", "big.py", os.fsdecode(b"caf\xe9.py"))
    git(repository, "commit", "--quiet", "--message", "more")
    assert contents(source(repository)) == {"alpha": {**ALPHA, os.fsdecode(b"caf\xe9.py"): b"odd\n"}}
    assert counted(source(repository)) == {"symlink": 1, "submodule": 1, "excluded": 1, "oversize": 1}


def test_suffixes(repository):
    write(repository / "LICENSE")
    commit_all(repository)
    assert set(contents(source(repository, suffixes=(".md",)))["alpha"]) == {"README.md"}
    assert counted(source(repository, suffixes=(".md",))) == {"suffix": 2}


def test_a_pattern_takes_repositories_only(repository, tmp_path):
    git_repository(tmp_path / "beta", REPOSITORIES["trap"])
    write(tmp_path / "notes" / "a.py")
    (tmp_path / "linked").symlink_to(repository)
    assert set(contents(source(tmp_path / "*"))) == {"alpha", "beta"}


def test_a_url_is_cloned_bare_and_shallow_and_used_again(repository, tmp_path):
    write(repository / "src" / "a.py", b"a = 2\n")
    commit_all(repository)
    url, cache = repository.as_uri(), tmp_path / "cache"
    name = f"{tmp_path.name}/alpha"
    assert contents(source(url, cache=cache))[name]["src/a.py"] == b"a = 2\n"
    (clone,) = (cache / "git").glob("*.git")
    assert not (clone / "hooks").exists()
    assert not (clone / ".git").exists()
    assert git(clone, "rev-list", "--count", "--all") == "1"
    write(repository / "src" / "a.py", b"a = 3\n")
    commit_all(repository)
    assert contents(source(url, cache=cache))[name]["src/a.py"] == b"a = 2\n"
    assert contents(source(url, cache=cache, refresh=True))[name]["src/a.py"] == b"a = 3\n"
    assert contents(source(f"{url}#HEAD~2", cache=cache))[name] == ALPHA
    shutil.rmtree(repository)
    assert contents(source(url, cache=cache))[name]["src/a.py"] == b"a = 3\n"
    assert not list((cache / "git").glob(".*partial"))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{root}/none", "no git repository; give a repository's path"),
        ("{root}/*.git", "no git repository; give a repository's path"),
        ("{root}/alpha#none", r"no commit 'none': it has the branches and tags main; give a repository and a"),
        ("file://{root}/none", r"file://.*/none: .*; check the address and the revision"),
        (
            "file://{root}/alpha#none",
            r"GitRepositories: file://.*/alpha: no commit 'none': it has the branches and tags main; give a",
        ),
        ("https://user:secret@127.0.0.1:1/owner/name", r"GitRepositories: https://127.0.0.1:1/owner/name: "),
    ],
)
def test_bad_places_are_one_line(repository, tmp_path, location, message):
    with pytest.raises(UserError, match=message) as error:
        list(source(location.format(root=tmp_path), cache=tmp_path / "cache").units())
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert "secret" not in str(source(location).identity())


def refused(location: Path | str) -> str:
    """Why a revision is no commit."""
    with pytest.raises(UserError) as error:
        list(source(location).units())
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    start, end = " no commit ", "; give a repository and a revision that it has"
    assert message.endswith(end)
    return message[message.index(start) + len(start) : -len(end)]


def test_the_names_of_a_repository_are_its_branches_and_tags(repository):
    git(repository, "tag", "v1")
    git(repository, "update-ref", "refs/remotes/origin/dev", "HEAD")
    git(repository, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/dev")
    git(repository, "symbolic-ref", "refs/heads/loop", "refs/heads/loop")
    write(repository / ".git" / "refs" / "heads" / "\x1b[31m", git(repository, "rev-parse", "HEAD").encode())
    for revision in ("none", "none~1", "1" * 40, "abc"):
        names = "\ufffd[31m, main, origin/dev, v1"
        assert refused(f"{repository}#{revision}") == f"{revision!r}: it has the branches and tags {names}"


def test_what_is_missing_behind_a_name_is_told(repository):
    first = git(repository, "rev-parse", "HEAD")
    for number in (1, 2):
        git(repository, "commit", "--quiet", "--allow-empty", "--message", str(number))
    second, last = git(repository, "rev-parse", "HEAD~1"), git(repository, "rev-parse", "HEAD")
    assert refused(f"{repository}#main~3") == f"'main~3': Commit {first} has no parents"
    (repository / ".git" / "objects" / second[:2] / second[2:]).unlink()
    assert refused(f"{repository}#main~1") == f"'main~1': {second} is missing"
    lost = repository / ".git" / "objects" / last[:2] / last[2:]
    lost.chmod(0o600)
    lost.write_bytes(b"no object")
    for revision in ("main", "HEAD", "main~1", "refs/heads/main"):
        assert refused(f"{repository}#{revision}").startswith(f"{revision!r}: object is damaged: error Error -3 ")
    lost.unlink()
    for revision in ("main", "HEAD", "heads/main"):
        assert refused(f"{repository}#{revision}") == f"{revision!r}: {last} is missing"
    write(repository / ".git" / "refs" / "tags" / "odd", b"\x1b[31m\n" * 500)
    assert refused(f"{repository}#odd").startswith("'odd': ")


def test_an_empty_repository_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "--quiet")
    with pytest.raises(UserError, match="no commit 'HEAD': it has no branches and no tags"):
        list(source(tmp_path / "empty").units())
    with pytest.raises(UserError, match=r"file://.*/empty: it has no commits; check the address"):
        list(source((tmp_path / "empty").as_uri(), cache=tmp_path / "cache").units())
    # Among many it is a unit that says so, and the others are read.
    git_repository(tmp_path / "full", ALPHA)
    units = {Path(unit.name).name: unit for unit in source(tmp_path / "*").units()}
    with pytest.raises(DamagedSource, match="no commit 'HEAD'"):
        list(units["empty#HEAD"].read(LIMITS))
    assert len(list(units["full#HEAD"].read(LIMITS))) == 1


def test_a_commit_without_files(tmp_path):
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "--quiet")
    git(tmp_path / "empty", "commit", "--quiet", "--allow-empty", "--message", "nothing")
    assert contents(source(tmp_path / "empty")) == {"empty": {}}


def test_a_missing_file_is_counted(repository):
    blob = next(path for path in objects(repository, "blob") if path.stem)
    blob.unlink()
    assert len(contents(source(repository))["alpha"]) == len(ALPHA) - 1
    assert counted(source(repository)) == {"unreadable": 1}


@pytest.mark.parametrize("damage", ["missing", "empty", "zeros"])
def test_a_broken_file_is_counted(repository, damage):
    blob = objects(repository, "blob")[0]
    content = blob.read_bytes()
    blob.unlink()
    if damage != "missing":
        blob.write_bytes(b"" if damage == "empty" else bytes(len(content)))
    assert counted(source(repository)) == {"unreadable": 1}


def test_an_object_with_the_content_of_another_is_counted(repository):
    one, other, *_ = objects(repository, "blob")
    content = other.read_bytes()
    one.unlink()
    one.write_bytes(content)
    assert counted(source(repository)) == {"unreadable": 1}


@pytest.mark.parametrize("kind", ["tree", "commit"])
def test_a_missing_folder_is_one_line(repository, kind):
    (unit,) = source(repository).units()
    for path in objects(repository, kind):
        path.unlink()
    with pytest.raises(DamagedSource, match=r"^object [0-9a-f]{40} is missing or broken") as error:
        read_all(unit)
    assert "\n" not in str(error.value)


def test_a_folder_named_billions_of_times_is_refused(repository):
    tree = git(repository, "rev-parse", "HEAD^{tree}")
    for _ in range(12):
        entries = "".join(f"040000 tree {tree}\t{number}\n" for number in range(10))
        done = subprocess.run(
            ["git", "mktree"], cwd=repository, input=entries.encode(), capture_output=True, check=True
        )
        tree = done.stdout.decode().strip()
    commit = git(repository, "commit-tree", tree, "-m", "bomb")
    (unit,) = source(f"{repository}#{commit}").units()
    (read,) = unit.read(LIMITS)
    with pytest.raises(DamagedSource, match="more than 500 entries"):
        list(read.files)


def test_too_many_bytes_are_refused(repository):
    (unit,) = source(repository).units()
    (read,) = unit.read(replace(LIMITS, max_unpacked_bytes=10))
    with pytest.raises(DamagedSource, match="more than 10 bytes"):
        list(read.files)


def test_names_that_leave_the_repository_are_counted(repository):
    blob = git(repository, "rev-parse", "HEAD:README.md")
    raw = b"".join(
        b"100644 " + name + b"\0" + bytes.fromhex(blob) for name in (b"..", b".", b"a/b.py", b"/etc/passwd", b"ok.py")
    )
    tree = written(repository, "hash-object", "-t", "tree", "-w", "--stdin", "--literally", content=raw)
    commit = git(repository, "commit-tree", tree, "-m", "odd")
    found = source(f"{repository}#{commit}")
    assert contents(found) == {"alpha": {"ok.py": ALPHA["README.md"]}}
    assert counted(found)["outside"] == 4


def test_configuration_and_hooks_are_never_read(repository, tmp_path):
    # Reading a pipe would block for ever; git reads it.
    os.mkfifo(tmp_path / "pipe")
    trap = f"touch {tmp_path}/trace"
    write(
        repository / ".git" / "config",
        f"[core]\n\trepositoryformatversion = 0\n\tfsmonitor = {trap}\n\tsshCommand = {trap}\n\tpager = {trap}\n"
        f"\thooksPath = {tmp_path}\n[include]\n\tpath = {tmp_path}/pipe\n".encode(),
    )
    for hook in ("post-checkout", "reference-transaction", "pre-auto-gc"):
        write(repository / ".git" / "hooks" / hook, f"#!/bin/sh\n{trap}\n".encode()).chmod(0o755)
    os.mkfifo(repository / ".git" / "refs" / "heads" / "pipe")
    assert contents(source(repository)) == {"alpha": ALPHA}
    assert not (tmp_path / "trace").exists()


def test_objects_elsewhere_are_not_read(repository, tmp_path):
    git(tmp_path, "clone", "--quiet", "--shared", str(repository), "shared")
    with pytest.raises(UserError, match="borrows objects of another repository"):
        list(source(tmp_path / "shared").units())
    linked = shutil.copytree(repository, tmp_path / "linked")
    shutil.rmtree(linked / ".git" / "objects" / "pack")
    (linked / ".git" / "objects" / "pack").symlink_to(repository / ".git" / "objects" / "pack")
    with pytest.raises(UserError, match="is a link"):
        list(source(linked).units())
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    with pytest.raises(UserError, match=r"\.git is no folder"):
        list(source(tmp_path / "tree").units())


@pytest.fixture
def ssh(tmp_path, monkeypatch) -> Path:
    """Notes what an ssh is started with, in place of one."""
    noted = tmp_path / "noted"
    program = write(
        tmp_path / "bin" / "ssh",
        f'#!/bin/sh\necho "$(ps -o sid= -p $$) $*" > {noted}\n'
        "echo 'nobody@host: Permission denied (publickey,password).' >&2\nexit 255\n".encode(),
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name in ("GIT_SSH", "GIT_SSH_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    return noted


@pytest.mark.parametrize("chosen", ["", "variable", "setting", "not-ours"])
@pytest.mark.parametrize("url", ["ssh://nobody@host/owner/name", "nobody@host:owner/name"])
def test_ssh_asks_for_nothing(ssh, tmp_path, monkeypatch, url, chosen):
    if chosen == "variable":
        monkeypatch.setenv("GIT_SSH_COMMAND", "ssh -v")
    if chosen == "setting":
        setting = write(tmp_path / "gitconfig", b"[core]\n\tsshCommand = ssh -v\n")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(setting))
    if chosen == "not-ours":
        # A repository in which the command happens to be given.
        git(git_repository(tmp_path / "here", ALPHA), "config", "core.sshCommand", "ssh -v")
        monkeypatch.chdir(tmp_path / "here")
        chosen = ""
    with pytest.raises(UserError, match=r"Permission denied \(publickey,password\)\. fatal: .*check the address"):
        list(source(url, cache=tmp_path / "cache").units())
    session, *arguments = ssh.read_text().split()
    assert int(session) != os.getsid(0)
    assert ("BatchMode=yes" in arguments) == (not chosen)
    assert ("-v" in arguments) == bool(chosen)


@pytest.mark.parametrize("transport", ["http", "git", "ssh"])
def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch, transport):
    monkeypatch.setattr(git_clones, "_SILENCE_SECONDS", 0.5)
    noted = tmp_path / "noted"
    program = write(tmp_path / "ssh", f"#!/bin/sh\necho $$ > {noted}\nexec sleep 60\n".encode())
    program.chmod(0o755)
    monkeypatch.setenv("GIT_SSH", str(program))
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"{transport}://127.0.0.1:{server.getsockname()[1]}/owner/name"
        with pytest.raises(
            UserError, match=r"/owner/name: the server sent nothing for 0\.5 seconds; check the address"
        ):
            list(source(url, cache=tmp_path / "cache").units())
    assert time.monotonic() - start < 20
    if transport == "ssh":
        wait_for(lambda: not is_running(int(noted.read_text())))


def test_a_server_that_sends_little_by_little_is_not_given_up(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(git_clones, "_SILENCE_SECONDS", 0.8)
    monkeypatch.setattr(git_clones, "_POLL_SECONDS", 0.1)
    program = write(
        tmp_path / "ssh",
        b"#!/bin/sh\nfor i in 1 2 3 4 5; do echo $i >&2; sleep 0.3; done\nexec git-upload-pack " + bytes(repository),
    )
    program.chmod(0o755)
    monkeypatch.setenv("GIT_SSH", str(program))
    monkeypatch.setenv("PATH", f"{git(repository, '--exec-path').strip()}:{os.environ['PATH']}")
    assert contents(source("ssh://host/owner/name", cache=tmp_path / "cache"))["owner/name"] == ALPHA


@pytest.mark.parametrize("user_info", ["me:hunter2", "hunter2", "hunter2:", "m%65:hunter2%40"])
def test_credentials_are_sent_and_not_in_the_list_of_processes(repository, tmp_path, monkeypatch, user_info):
    # What the user has in the same variables, and a helper of theirs that knows another password.
    for name, value in [("COUNT", "1"), ("KEY_0", "credential.helper"), ("VALUE_0", "!echo password=other; :")]:
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    sent = unquote(user_info) if ":" in user_info else f"{user_info}:other"
    git(repository, "clone", "--quiet", "--bare", ".", str(tmp_path / "served" / "owner" / "name"))
    with git_server(tmp_path / "served") as server:
        server.password = f"Basic {b64encode(sent.encode()).decode()}"
        url = f"{server.url}/owner/name".replace("//", f"//{user_info}@", 1)
        assert contents(source(url, cache=tmp_path / "cache"))["owner/name"] == ALPHA
        assert any("fetch" in command for command in server.commands)
        assert not [command for command in server.commands if "hunter2" in command]
        # The clone of one token is that of the next.
        asked = len(server.paths)
        assert contents(source(url.replace("hunter2", "hunter3"), cache=tmp_path / "cache"))["owner/name"] == ALPHA
        assert len(server.paths) == asked
        server.password = "Basic other"
        with pytest.raises(UserError, match=r"Authentication failed") as error:
            list(source(url, cache=tmp_path / "cache", refresh=True).units())
        assert "hunter2" not in str(error.value)


def test_credentials_are_not_sent_to_another_server(tmp_path):
    with git_server(tmp_path) as server, git_server(tmp_path) as other:
        server.moved_to, other.password = other.url, "Basic other"
        url = f"{server.url}/owner/name".replace("//", "//user:hunter2@", 1)
        with pytest.raises(UserError, match="Authentication failed"):
            list(source(url, cache=tmp_path / "cache").units())
        sent = f"Basic {b64encode(b'user:hunter2').decode()}"
        assert other.sent_passwords
        assert sent not in other.sent_passwords


@pytest.mark.parametrize(
    "url", ["https://u:hunter2@host/owner/name?hunter2", "https://u:hunter2#@host/owner/name", "https://u%0a@host/n/m"]
)
def test_urls_that_git_does_not_take_are_one_line(tmp_path, url):
    with pytest.raises(UserError, match=r"GitRepositories: https://host/.*: (a query found|its user or pass)") as error:
        list(source(url, cache=tmp_path / "cache").units())
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["ext::sh -c touch% trace", "--upload-pack=touch trace", "-u:x"])
def test_a_url_is_no_command(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        list(source(url, cache=tmp_path / "cache").units())
    assert not (tmp_path / "trace").exists()
