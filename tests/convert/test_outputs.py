"""Output files on disks that take only a part of what is written."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource, sys
from pathlib import Path
from dist_export.convert.outputs import OutputFile
from dist_export.errors import ExportError
path = Path(sys.argv[1])
OutputFile.create(path, b"header", 0)
output = OutputFile(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    output.write_at(6, memoryview(bytes(range(250)) * 8))
except ExportError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(path.stat().st_size, output.num_bytes_written)
output.write_at(6, memoryview(bytes(range(250)) * 8))
output.finish()
print(output.num_bytes_written)
"""


def test_a_write_that_is_cut_short_goes_on_until_the_disk_says_why(tmp_path: Path) -> None:
    """The kernel writes what still fits and says how much; only the next write fails."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{tmp_path}/file: cannot write: File too large\n1000 0\n2000\n"
    assert (tmp_path / "file").read_bytes() == b"header" + bytes(range(250)) * 8
