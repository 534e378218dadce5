"""Where documents come from: one file per source."""

from muse_lightning.data.sources.folders import Folders
from muse_lightning.data.sources.python_packages import PythonPackages

__all__ = ["Folders", "PythonPackages"]
