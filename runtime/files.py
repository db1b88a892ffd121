"""Files and figures that appear whole or not at all."""

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


def save_figure(path: str | os.PathLike, figure: Any) -> None:
  """Saves a matplotlib figure as PNG, in a folder that is made if need be, and closes it."""
  import matplotlib.pyplot as plt

  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120, bbox_inches="tight"))
  plt.close(figure)


def short(name: str, limit: int = 24) -> str:
  """A name in one line of at most `limit` characters: its beginning and its end."""
  name = " ".join(name.split())
  end = limit // 3
  return name if len(name) <= limit else f"{name[: limit - end - 1]}\u2026{name[-end:]}"
