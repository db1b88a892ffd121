"""A command's settings: frozen dataclasses whose fields are flags. Mistakes end in one line.

  @dataclasses.dataclass(frozen=True)
  class Config:
    steps: int = option(80, "updates", at_least=1)
    mode: str = option("fast", "how it runs", choices=("fast", "exact"))

  cli.run(lambda: main(cli.read(Config)), Config)

A field declares its default, help, choices and bounds in one place.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from absl import app, flags, logging

Settings = TypeVar("Settings")
HELP = {"-h", "-help", "--help", "--helpshort", "--helpfull"}


class UserError(ValueError):
  """A user's mistake: printed as one line that names cause and fix."""


def check(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def one_line(error: BaseException) -> str:
  return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def user_error(
  kinds: type[Exception] | tuple[type[Exception], ...], problem: str, fix: str = ""
) -> Iterator[None]:
  """Raises errors of these kinds as a UserError: `problem (the error in one line): fix`."""
  try:
    yield
  except kinds as error:
    advice = f": {fix}" if fix else ""
    raise UserError(f"{problem} ({one_line(error)}){advice}") from error


def option(
  default: Any,
  help: str,
  *,
  choices: Iterable[str] = (),
  at_least: float | None = None,
  below: float | None = None,
  section: str = "",
) -> Any:
  """A dataclass field that is a flag. Choices and bounds hold for each entry of a list; `section`
  starts a new group of the help."""
  rules = dict(choices=tuple(choices), at_least=at_least, below=below)
  return dataclasses.field(default=default, metadata=dict(help=help, section=section, **rules))


def check_fields(config: Any) -> None:
  """Raises UserError where a field is not among its choices or out of its bounds."""
  for field in dataclasses.fields(config):
    value, rules = getattr(config, field.name), field.metadata
    flag = f"--{field.name}={_shown(value)}"
    for x in value if isinstance(value, tuple) else (value,):
      if x is None or not rules:
        continue
      choices, at_least, below = rules["choices"], rules["at_least"], rules["below"]
      check(not choices or x in choices, f"{flag} is unknown: choose one of {', '.join(choices)}")
      check(at_least is None or x >= at_least, f"{flag} must be at least {at_least}")
      check(below is None or x < below, f"{flag} must be below {below}")


def read(settings: type[Settings], defaults: Mapping[str, Any] = {}) -> Settings:
  """Settings from flags, which override `defaults`, which override the defaults of the class."""
  return from_values(settings, {**defaults, **given(settings)})


def given(settings: type) -> dict[str, Any]:
  """The values of the flags that the command line gives."""
  values = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(settings)}
  return {name: value for name, value in values.items() if value is not None}


def from_values(settings: type[Settings], values: Mapping[str, Any]) -> Settings:
  """Builds settings from values of flags or JSON, where tuples are lists.

  Raises:
    UserError: an unknown name, a list of numbers that has something else, or `check_fields`.
  """
  types = {f.name: str(f.type) for f in dataclasses.fields(settings)}
  unknown = [name for name in values if name not in types]
  check(not unknown, f"unknown settings {', '.join(unknown)}: written by another version?")

  def value(name, v):
    if not isinstance(v, list):
      return v
    kind = next((k for k in (float, int) if f"tuple[{k.__name__}" in types[name]), str)
    with user_error(ValueError, f"--{name}={_shown(v)} is not a list of numbers"):
      return tuple(map(kind, v))

  config = settings(**{name: value(name, v) for name, v in values.items()})
  check_fields(config)
  return config


def run(main: Callable[[], None], *settings: type) -> None:
  """Runs a command with the flags of these dataclasses. A UserError exits with status 2."""
  if HELP & set(sys.argv[1:]):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may be `head`
    print(help_text(sys.modules["__main__"].__doc__ or "", settings), flush=True)
    os._exit(0)  # Python takes 0.2 s to take JAX's modules down
  for each in settings:
    _define_flags(each)

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)  # silences Orbax's step logs and JAX's backend probing
    try:
      check(len(argv) == 1, f"unexpected argument {argv[1:]}: flags look like --name=value")
      main()
    except UserError as error:
      _exit(error)

  app.run(guarded, flags_parser=_parse)


def help_text(description: str, settings: Iterable[type]) -> str:
  """The command's docstring, then every flag in the order and the sections of the source."""
  lines = [description.strip(), "", "Flags (--name=value; lists take commas; --noname is false):"]
  for each in settings:
    for field in dataclasses.fields(each):
      rules = field.metadata
      if rules["section"]:
        lines += ["", rules["section"]]
      text = rules["help"]
      if rules["choices"]:
        text += f" ({', '.join(rules['choices'])})"
      if field.default not in (None, (), ""):
        text += f" [default:\u00a0{_shown(field.default)}]"  # kept on one line
      wrapped = [line.replace("\u00a0", " ") for line in textwrap.wrap(text, 72)]
      name = f"  --{field.name}"
      first = f"{name:26}" if len(name) < 26 else f"{name}\n{'':26}"
      lines.append(first + f"\n{'':26}".join(wrapped))
  return "\n".join(lines)


def _define_flags(settings: type) -> None:
  """A flag for each field, of its type. The flag's default is None, so that `given` can tell which
  flags the command line has."""
  names = {"tuple": "list", "bool": "boolean", "int": "integer", "float": "float", "str": "string"}
  for field in dataclasses.fields(settings):  # a type may be `int`, `int | None`, `tuple[int, ...]`
    kind = next(names[name] for name in names if name in str(field.type))
    getattr(flags, f"DEFINE_{kind}")(field.name, None, field.metadata["help"])


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _exit(f"{error} (--help lists all flags)")


def _exit(error):
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)


def _shown(value):
  return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
