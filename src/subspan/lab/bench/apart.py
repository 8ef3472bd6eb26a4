"""Memory is measured in processes of their own: what another candidate left does not count.

Nor does what was freed. glibc keeps freed blocks of up to 32 MB for later, in pieces; in these
processes it gives back whatever is larger than 64 KiB at once, so that a peak is of what was alive.
With its defaults the small networks of a comparison look larger: five layers of 5,120 at rank 80
take 106 MB instead of 61, the dense ones 947 instead of 885.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from subspan.errors import SubspanError

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
CODE = "import json, sys, {m} as m; print(json.dumps(m.{f}(*json.loads(sys.argv[1]))))"


def apart(function: Callable[..., Any], *arguments: Any, of: str) -> Any:
    """What a function returns in a new process.

    Args:
        function: of a module's top level; arguments and result are such as JSON has.
        arguments: its own.
        of: whose memory, for the message if it fails.

    Raises:
        SubspanError: if it fails, with the last line that it said.
    """
    code = CODE.format(m=function.__module__, f=function.__name__)
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR)
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit {result.returncode}"]
        raise SubspanError(f"the memory of {of} could not be measured: {last[0]}")
    return json.loads(result.stdout)
