"""Fixtures of runs and of the command line."""

from tests.runs import cache_once, cli, ctrl_c, in_tmp_path, trained  # noqa: F401
