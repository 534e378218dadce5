"""Where documents come from: one file per source."""

from muse_lightning.data.sources.archives import Archives
from muse_lightning.data.sources.downloads import Download
from muse_lightning.data.sources.folders import Folders
from muse_lightning.data.sources.git_repositories import GitRepositories
from muse_lightning.data.sources.pypi_packages import PyPIPackages
from muse_lightning.data.sources.python_packages import PythonPackages
from muse_lightning.data.sources.tables import Tables
from muse_lightning.data.sources.text_documents import TextDocuments

__all__ = [
    "Archives",
    "Download",
    "Folders",
    "GitRepositories",
    "PyPIPackages",
    "PythonPackages",
    "Tables",
    "TextDocuments",
]
