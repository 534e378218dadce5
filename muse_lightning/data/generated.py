"""What nobody of a repository wrote by hand: copies of other projects, what a program wrote, minified files."""

import re

# Folders that by convention hold other projects, and files that tools copy into a repository. The conventions are
# those of Linguist (lib/linguist/vendor.yml, https://github.com/github-linguist/linguist), which The Stack v2 went by
# (Lozhkov et al. 2024, arXiv 2402.19173, 2.1), less what it says of documentation, tests and rare libraries.
_VENDORED_FOLDERS = frozenset(
    {
        "vendor", "vendors", "vendored", "Vendor", "_vendor", "_vendored", "third_party", "third-party", "thirdparty",
        "ThirdParty", "3rd_party", "3rd-party", "3rdparty", "third_parties", "extern", "externals", "external",
        "External", "node_modules", "bower_components", "jspm_packages", "Godeps", "Pods", "Carthage", "site-packages",
        "dist-packages", "__pypackages__", ".venv", "venv", "virtualenv", ".tox", ".nox", ".yarn", ".gradle",
    }
)  # fmt: skip
_VENDORED_NAMES = frozenset(
    {
        "gradlew", "gradlew.bat", "mvnw", "mvnw.cmd", "config.guess", "config.sub", "install-sh", "ltmain.sh",
        "depcomp", "aclocal.m4", "libtool.m4", "ltoptions.m4", "ltsugar.m4", "ltversion.m4", "lt~obsolete.m4",
        "cpplint.py", "versioneer.py", "ez_setup.py",
    }
)  # fmt: skip
# jquery.js, jquery-3.7.1.slim.js, bootstrap.bundle.css: the libraries that are copied most.
_COPIED_LIBRARY = re.compile(
    r"(?:jquery|bootstrap|modernizr|d3|angular|react|underscore|lodash|html5shiv)"
    r"(?:[-.](?:v?\d[\d.]*|slim|bundle|custom|esm|umd|dom|ui|core|debug))*\.(?:js|css)"
)

_GENERATED_NAMES = frozenset(
    {
        "package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "bun.lock", "poetry.lock",
        "uv.lock", "pdm.lock", "pipfile.lock", "cargo.lock", "go.sum", "composer.lock", "gemfile.lock", "flake.lock",
        "gopkg.lock", "mix.lock", "pubspec.lock", "packages.lock.json", ".terraform.lock.hcl", ".pnp.cjs", ".pnp.js",
    }
)  # fmt: skip
_GENERATED_ENDINGS = (
    "_pb2.py", "_pb2_grpc.py", "_pb2.pyi", ".pb.go", ".pb.cc", ".pb.h", ".g.dart", ".freezed.dart", ".designer.cs",
    ".designer.vb", ".feature.cs", ".js.map", ".css.map", ".d.ts.map",
)  # fmt: skip
_MINIFIED_ENDINGS = (".min.js", "-min.js", ".min.css", "-min.css", ".min.mjs", ".bundle.js", ".min.html")

# In the first lines, anything like it: the words of The Stack v2 (as above) and Linguist's lib/linguist/generated.rb.
_SAYS_GENERATED = re.compile(
    rb"\bauto-?generated\b|\bautomatically generated\b|\bgenerated automatically\b|\bmachine generated\b|"
    rb"\bgenerated (?:by|from|with|using|code|file)\b|\bfile (?:is|was) generated\b|"
    rb"\b(?:do not|don't) (?:edit|modify)\b"
)
_FIRST_LINES = 5
_FIRST_BYTES = 1000
# Further down, behind a licence header, only what tools agreed on: https://go.dev/s/generatedcode and @generated.
_MARKED_GENERATED = re.compile(rb"@generated\b|^[^\w\n]*code generated\b[^\n]*\bdo not edit\b", re.MULTILINE)
_HEADER_BYTES = 4000


def is_vendored(path: str) -> bool:
    """Whether a path says that the file was copied from another project."""
    *folders, name = path.split("/")
    if name in _VENDORED_NAMES or not _VENDORED_FOLDERS.isdisjoint(folders):
        return True
    return _COPIED_LIBRARY.fullmatch(name) is not None


def has_generated_name(path: str) -> bool:
    """Whether a program writes files of this name: lock files, compiled protocol buffers, source maps and the like."""
    name = path.rpartition("/")[2].lower()
    return name in _GENERATED_NAMES or name.endswith(_GENERATED_ENDINGS)


def has_minified_name(path: str) -> bool:
    """Whether the name says that white space was taken out."""
    return path.lower().endswith(_MINIFIED_ENDINGS)


def says_generated(content: bytes) -> bool:
    """Whether the file says at its head that a program wrote it."""
    head = content[:_HEADER_BYTES].lower()
    if b"generated" not in head and b"edit" not in head and b"modify" not in head:
        return False
    first = b"\n".join(head[:_FIRST_BYTES].split(b"\n", _FIRST_LINES)[:_FIRST_LINES])
    return bool(_SAYS_GENERATED.search(first) or _MARKED_GENERATED.search(head))
