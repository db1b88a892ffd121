"""A job's settings: a frozen dataclass whose fields are flags, and mistakes told in one line."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import app, flags, logging

Config = TypeVar("Config")


class UserError(ValueError):
  """A mistake of the user's: printed as one line, cause and mend."""


def check(condition: bool, message: str):
  if not condition:
    raise UserError(message)


def option(default: Any, help: str):
  """A field that is a flag too."""
  return dataclasses.field(default=default, metadata={"help": help})


def define_flags(config_class: type) -> None:
  """A flag for each field: of its type (lists for tuples), without a default of its own."""
  defines = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  for field in dataclasses.fields(config_class):
    help = f"{field.metadata['help']} [{field.default}]"
    if "tuple" in str(field.type):
      flags.DEFINE_list(field.name, None, help)
    else:
      kind = next(k for k in defines if k.__name__ in str(field.type))
      defines[kind](field.name, None, help)


def config_from_flags(config_class: type[Config], defaults: Mapping[str, Any] = {}) -> Config:
  """The configuration that the flags give, over `defaults`, over those of the class."""
  names = [f.name for f in dataclasses.fields(config_class)]
  given = {name: flags.FLAGS[name].value for name in names}
  given = {name: value for name, value in given.items() if value is not None}
  return make_config(config_class, {**defaults, **given})


def make_config(config_class: type[Config], values: Mapping[str, Any]) -> Config:
  """A configuration of values from flags or JSON, where tuples are lists.

  Raises:
    UserError: a number in a list of numbers cannot be read as one.
  """
  fields = {f.name: str(f.type) for f in dataclasses.fields(config_class)}

  def value(name, v):
    if not isinstance(v, list):
      return v
    kind = next((k for k in (float, int) if f"tuple[{k.__name__}" in fields[name]), str)
    try:
      return tuple(kind(x) for x in v)
    except ValueError:
      raise UserError(f"--{name}={','.join(map(str, v))} is not a list of numbers") from None

  return config_class(**{name: value(name, v) for name, v in values.items()})


def run(main: Callable[[], None]) -> None:
  """Runs a job under absl: a mistake of the user's ends it with one line and status 2."""

  def guarded(argv):
    # Orbax tells each of its steps otherwise, JAX which backends it looked for.
    logging.set_verbosity(logging.WARNING)
    try:
      check(len(argv) == 1, f"unexpected argument {argv[1:]}: flags look like --name=value")
      main()
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(2)

  app.run(guarded)
