"""Text to tokens: UTF-8 bytes, or a tokenizer.json."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

from runtime.cli import user_error


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Bytes: 0-255 are the UTF-8 bytes, 256 is padding, 257 starts a document.

  A tokenizer.json: its start or end-of-text token starts a document, or an added entry if it has
  neither; padding reuses that entry (`Batch.segments` marks it).
  """

  vocab_size: int
  bos: int
  pad: int
  fingerprint: str
  model: tokenizers.Tokenizer | None = None  # None: bytes

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Each text as int32 tokens, the start token first. A lone surrogate becomes '?'."""
    raw = [text.encode("utf-8", "replace") for text in texts]
    if self.model is None:
      tokens = [np.frombuffer(b"\0" + text, np.uint8).astype(np.int32) for text in raw]
    else:
      encoded = self.model.encode_batch_fast([x.decode() for x in raw], add_special_tokens=False)
      tokens = [np.array([0, *each.ids], np.int32) for each in encoded]
    for each in tokens:
      each[0] = self.bos
    return tokens

  def decode(self, tokens: Iterable[int]) -> str:
    plain = [int(token) for token in tokens if token not in (self.bos, self.pad)]
    if self.model is None:
      return bytes(plain).decode("utf-8", "replace")
    return self.model.decode(plain, skip_special_tokens=False)


def load_tokenizer(name: str) -> Tokenizer:
  """`bytes`, the tokenizer.json at a path (or in a folder), or a name on the Hugging Face hub."""
  if name == "bytes":
    return Tokenizer(vocab_size=258, bos=257, pad=256, fingerprint="bytes")
  path = Path(name).expanduser()
  path = path / "tokenizer.json" if path.is_dir() else path
  fix = "give 'bytes', a tokenizer.json, or a name on the Hugging Face hub (needs the network)"
  with user_error(Exception, f"tokenizer {name!r} cannot be loaded", fix):
    if path.exists() or path.suffix == ".json":  # a mistyped path is no name on the hub
      model = tokenizers.Tokenizer.from_file(str(path))
    else:
      model = tokenizers.Tokenizer.from_pretrained(name)
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True  # "<s>" inside a text is text
  vocabulary = model.get_vocab(with_added_tokens=True)
  size = max(vocabulary.values()) + 1
  names = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>", "[CLS]", "</s>", "<eos>")
  bos = next((vocabulary[name] for name in names if name in vocabulary), size)
  fingerprint = hashlib.blake2b(model.to_str().encode(), digest_size=8).hexdigest()
  return Tokenizer(max(size, bos + 1), bos, bos, fingerprint, model)
