"""What all figures share: colors, style, names in one line, files that appear whole."""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from runtime.files import write_atomically

BLUE, RED = "#0072B2", "#D55E00"  # of the color-blind-safe palette of Okabe and Ito
STYLE = {"text.parse_math": False, "figure.constrained_layout.use": True}  # a source may be $x$


def save_figure(path: str | os.PathLike, figure: Figure) -> None:
  """Saves a matplotlib figure as PNG, in a folder that is made if need be, and closes it."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120, bbox_inches="tight"))
  plt.close(figure)


def short(name: str, limit: int = 24) -> str:
  """A name in one line of at most `limit` characters: its beginning and its end."""
  name = " ".join(name.split())
  end = limit // 3
  return name if len(name) <= limit else f"{name[: limit - end - 1]}\u2026{name[-end:]}"
