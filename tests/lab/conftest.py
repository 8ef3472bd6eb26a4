"""Fixtures of the laboratory's tests."""

from tests.lab.runs import cache_once, cli, ctrl_c, in_tmp_path, trained  # noqa: F401
