"""What the site of the documentation is made of: pages where they lie in the repository, so that links need no change.

Usage: mkdocs build --strict, which mkdocs.yml lets load this file; `make docs` does it and then checks the links.

Each Markdown file of the folders in SECTIONS is a page at its own path, and so is another that one of them links to. A
file of another kind that is linked to becomes a page with its text, a folder one with its list; data and pictures are
served as they are.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "Guides": (
        "docs/training.md",
        "docs/tensorboard.md",
        "docs/data.md",
        "docs/datasets",
        "docs/pretrained.md",
        "docs/transformers.md",
        "docs/evaluation.md",
        "docs",
    ),
    "Method": ("docs/attention.md", "docs/kernels.md"),
    "Reliability": ("docs/reliability.md", "docs/faults.md", "docs/fuzzing.md", "SECURITY.md"),
    "Recipes": ("recipes",),
    "Results": ("benchmarks/README.md", "benchmarks/NOTES.md", "benchmarks/results"),
    "Project": ("CONTRIBUTING.md", "CHANGELOG.md"),
}
"""Section -> its pages in order; a folder stands for what in it no other entry names."""
HOME = "README.md"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".txt": "text", "": "text"}
"""What is shown as a page of its own, by suffix."""
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def sections() -> dict[str, list[str]]:
    """The pages of each section, as paths from the root; README.md comes before them all."""
    named = {entry for entries in SECTIONS.values() for entry in entries if entry.endswith(".md")} | {HOME}
    result = {}
    for title, entries in SECTIONS.items():
        pages: list[str] = []
        for entry in entries:
            found = [ROOT / entry] if entry.endswith(".md") else sorted((ROOT / entry).rglob("*.md"))
            paths = [path.relative_to(ROOT).as_posix() for path in found]
            pages += [path for path in paths if path == entry or path not in named]
            named |= set(paths)
        result[title] = pages
    return result


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation."""
    config.nav = [{"Home": HOME}, *({title: pages} for title, pages in sections().items())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace mkdocs' own list, of which a page's path begins below docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = [HOME, *(page for entries in sections().values() for page in entries)]
    for page in pages:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    for target in sorted({target for page in pages for target in _targets(page)}):
        path = ROOT / target
        if path.is_dir():
            names = sorted(
                each.name for each in path.iterdir() if each.is_file() and each.suffix in {".md", *LANGUAGES}
            )
            lines = [f"* [{name}]({name})" for name in names]
            files.append(File.generated(config, f"{target}/index.md", content="\n".join([f"# {target}", "", *lines])))
            for name in names:
                _append_source(files, config, f"{target}/{name}")
        elif path.suffix in LANGUAGES:
            _append_source(files, config, target)
        elif target not in pages:
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links to what became a page lead there."""
    folder = Path(page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path = (ROOT / folder / target).resolve()
        if path.is_dir():
            target = f"{target.rstrip('/')}/index.md"
        elif path.is_file() and path.suffix in LANGUAGES:
            target = f"{target}.md"
        return f"{before}{target}{after}"

    return LINK.sub(lead, markdown)


def _targets(page: str) -> Iterator[str]:
    """Files and folders that a page links to, as paths from the root."""
    for _, target, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent / target
        if "://" not in target and path.exists():
            yield path.resolve().relative_to(ROOT).as_posix()


def _append_source(files: Files, config: MkDocsConfig, target: str) -> None:
    name = f"{target}.md"
    if Path(target).suffix not in LANGUAGES or files.get_file_from_path(name) is not None:
        return
    text = (ROOT / target).read_text(encoding="utf-8")
    # A fence longer than any inside.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    content = f"# {target}\n\n{fence}{LANGUAGES[Path(target).suffix]}\n{text}\n{fence}\n"
    files.append(File.generated(config, name, content=content))
