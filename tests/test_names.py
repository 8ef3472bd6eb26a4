"""Names have one meaning in the package, and a file is no longer than one reads at a sitting."""

import ast
from collections import defaultdict

from tests.test_imports import MODULES, trees

LONGEST = 400  # lines of a file


def test_no_two_public_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_no_file_is_long() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: n for module, n in lines.items() if n > LONGEST} == {}
