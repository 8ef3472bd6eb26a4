"""The command line."""

from tests.runs import cli  # noqa: F401
