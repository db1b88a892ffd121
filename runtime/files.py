"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNFINISHED = ".writing-"  # prefix of a file that a kill left behind


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
  """Calls `write(binary file)`; the file then takes its name in one step."""
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED, delete=False) as file:
    write(file)
    file.flush()
    os.fsync(file.fileno())
  os.chmod(file.name, 0o644)
  os.replace(file.name, path)


def write_text(path: Path, text: str) -> None:
  write_atomically(path, lambda file: file.write(text.encode()))
