"""The dataset that tests of data share."""

from tests.data.conftest import prepared  # noqa: F401
