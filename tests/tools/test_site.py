"""The site of the documentation: every page is in it, links inside it lead somewhere, and a broken one fails it."""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("benchmarks", "docs", "kernels", "muse_lightning", "recipes", "tests/data/activations", "tools", "launch")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "mkdocs.yml")

pytestmark = pytest.mark.slow


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "site"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is made of, copied."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def site(checkout: Path) -> Path:
    """The site, built once."""
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    return checkout / "site"


class Html(HTMLParser):
    """What a page links to, and what in it may be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect them."""
        found = dict(attrs)
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = Html(site / "index.html").targets
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"), ROOT / "recipes/README.md"]
    assert len(pages) > 30
    for page in [*pages, *(ROOT / name for name in FILES if name.endswith(".md"))]:
        address = page.relative_to(ROOT).with_suffix(".html").as_posix().replace("README.html", "index.html")
        assert address in home, page


def test_every_link_inside_leads_somewhere(site: Path) -> None:
    pages = {path: Html(path) for path in site.rglob("*.html") if path.name != "404.html"}
    followed = 0
    for path, page in pages.items():
        for target in page.targets:
            address, anchor = urldefrag(target)
            if urlsplit(address).scheme:
                continue
            file = (path.parent / unquote(address)).resolve() if address else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path}: {target}"
            assert file not in pages or unquote(anchor) in pages[file].anchors, f"{path}: {target}"
            followed += 1
    assert followed > 2000


def test_what_is_no_page_is_shown_as_one(site: Path) -> None:
    recipe = (site / "recipes/demo.yaml.html").read_text(encoding="utf-8")
    assert "From nothing to a trained model in minutes" in recipe
    assert 'href="recipes/demo.yaml.html"' in (site / "index.html").read_text(encoding="utf-8")
    (table,) = (site / "benchmarks/results").glob("index.html")
    assert "2026-11-29_h200_bench-attention.html" in table.read_text(encoding="utf-8")


def test_a_broken_link_fails_the_build(checkout: Path, site: Path) -> None:
    page = checkout / "docs/training.md"
    broken = ("missing.md", "reliability.md#no-such-part", "../recipes/missing.yaml")
    page.write_text(page.read_text(encoding="utf-8") + "".join(f"\n[here]({target})\n" for target in broken))
    done = build(checkout)
    assert done.returncode != 0
    for target in broken:
        assert target.partition("#")[2] in done.stderr
        assert target.partition("#")[0] in done.stderr
