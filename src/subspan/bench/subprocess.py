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
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from subspan.errors import SubspanError

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
# What the libraries print goes to stderr; stdout carries one line for every value.
CODE = """
import sys
out, sys.stdout = sys.stdout, sys.stderr
import json, {m} as m
print(json.dumps(m.{f}(*json.loads(sys.argv[1]))), file=out)
"""
TURNS = """
import sys
out, sys.stdout = sys.stdout, sys.stderr
import json, {m} as m
for value in m.{f}(*json.loads(sys.argv[1])):
    print(json.dumps(value), file=out, flush=True)
    if not sys.stdin.readline():
        break
"""


def run_in_process(function: Callable[..., Any], *arguments: Any, memory_of: str) -> Any:
    """Return what a function of a module's top level returns in a new process.

    Its arguments and its result are such as JSON has. If it fails, the error has the last line that
    it said, and says whose memory (``memory_of``) was measured.
    """
    code = CODE.format(m=function.__module__, f=function.__name__)
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR)
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit {result.returncode}"]
        raise SubspanError(f"the memory of {memory_of} could not be measured: {last[0]}")
    return json.loads(result.stdout)


class SteppedProcess:
    """A process that runs a generator and waits after each value, so that several take turns.

    The generator is of a module's top level; its arguments and values are such as JSON has. Of
    glibc's malloc the process has the environment variables ``allocator``, and none of this one's.
    Leaving the ``with`` block ends it.
    """

    def __init__(
        self, function: Callable[..., Iterator[Any]], *arguments: Any, allocator: Mapping[str, str]
    ) -> None:
        code = TURNS.format(m=function.__module__, f=function.__name__)
        around = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on leaving)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            env=around | dict(allocator),
        )
        self.started = False

    def turn(self) -> Any:
        """Let the generator run to its next value, and return that.

        Raises:
            SubspanError: if the process fails, with the last line that it said.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.started:
            try:
                self.process.stdin.write("\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended: the next line says how
        self.started = True
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self._output.seek(0)
        last = self._output.read().strip().splitlines()[-1:] or [f"exit {code}"]
        raise SubspanError(last[0].removeprefix("subspan.errors.SubspanError: "))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._output.close()
