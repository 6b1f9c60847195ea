"""Tokenizers: text to ids and back, by the `tokenizers` library, in one file of JSON.

    characters   one id a character                              Chinese; small data
    bpe          byte-pair encoding learned on the corpus        any language; larger data
    words        words of Chinese as rjieba segments them        models of words

Ids 0 to 3 are padding, begin, end and unknown. Spaces are kept: text whose parts are all known decodes to itself.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tileformer.extras import optional_import
from tileformer.training.files import PathLike, quote, read_json, shorten, write

KINDS = ("characters", "bpe", "words")
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
FORMAT = "tileformer tokenizer 1"


class Tokenizer:
    """Text to ids, by `train` or `load`. What it makes of a text never holds padding, begin or end.

    size: number of ids; kind: one of KINDS; fingerprint: sha256 of the vocabulary and the rules.
    """

    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self, kind: str, made: Any) -> None:
        made.encode_special_tokens = True  # a text that says "<eos>" is text: begin and end come from the recipe
        self.kind, self.size, self._made = kind, made.get_vocab_size(), made
        self._segment = optional_import("rjieba").cut if kind == "words" else None

    @classmethod
    def train(cls, texts: Iterable[str], kind: str = KINDS[0], vocabulary: int = 8000, minimum: int = 2) -> "Tokenizer":
        """Learn at most `vocabulary` ids, the special ones too, of what `texts` say at least `minimum` times.

        The same texts give the same ids, the most frequent first. "bpe": at most three quarters of the ids are single
        characters, and no id crosses a space, a digit or punctuation. Raises ValueError for an unknown kind, sizes that
        leave no room, texts in which nothing is frequent enough, and a library that is not installed.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {quote(kind, 200)}")
        if vocabulary <= len(SPECIAL) or minimum < 1:
            sizes = f"vocabulary {vocabulary} and minimum {minimum}"
            raise ValueError(f"vocabulary must be above {len(SPECIAL)} and minimum at least 1, got {sizes}")
        tokenizers = optional_import("tokenizers")
        shared = dict(vocab_size=vocabulary, min_frequency=minimum, special_tokens=SPECIAL, show_progress=False)
        trainer = tokenizers.trainers.WordLevelTrainer(**shared)
        if kind == "bpe":
            trainer = tokenizers.trainers.BpeTrainer(**shared, limit_alphabet=(vocabulary - len(SPECIAL)) * 3 // 4)
        made = _blank(kind)
        cut = optional_import("rjieba").cut if kind == "words" else lambda text: text
        made.train_from_iterator((cut(text) for text in texts), trainer)
        if made.get_vocab_size() <= len(SPECIAL):
            raise ValueError(f"the texts hold nothing {minimum} times; give more texts or a lower minimum")
        return cls(kind, made)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of a text, at most the first `max_length`; without begin and end."""
        return self.encode_all([text], max_length)[0]

    def encode_all(self, texts: Iterable[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of every text, in order, each as `encode` gives them."""
        units = [self._segment(text) for text in texts] if self._segment else list(texts)
        made = self._made.encode_batch_fast(units, is_pretokenized=self.kind == "words", add_special_tokens=False)
        return [one.ids[:max_length] for one in made]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: padding, begin and end left out, unknown as <unk>. ValueError: an id that is none."""
        ids = [int(number) for number in ids]
        if wrong := [number for number in ids if not 0 <= number < self.size]:
            raise ValueError(f"ids of this tokenizer are 0 to {self.size - 1:,}, got {wrong[0]:,}")
        known = [number for number in ids if number >= self.unk_id]
        return self._made.decode(known, skip_special_tokens=False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def save(self, path: PathLike) -> None:
        """Write all of it to one file, which is never seen half-written."""
        write(Path(path), json.dumps(self._content(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: PathLike) -> "Tokenizer":
        """What `save` wrote. ValueError when the file is damaged or another program's; OSError when it is not there."""
        content = read_json(path)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT or content.get("kind") not in KINDS:
            shown = quote(found)
            raise ValueError(f"{path}: expected format {FORMAT!r}, found {shown}; write it by Tokenizer.save")
        if wrong := _wrong_vocabulary(content.get("tokenizer")):
            raise ValueError(f"{path}: damaged; {wrong}")
        kind, tokenizers = content["kind"], optional_import("tokenizers")
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
            known = _rules(made) == _rules(_blank(kind))
        except BaseException as error:  # the library raises nothing narrower, and a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise ValueError(f"{path}: damaged; the tokenizers library says: {shorten(error)}") from None
        tokenizer = cls(kind, made)
        if not known:
            raise ValueError(f"{path}: damaged; its rules are not those of a tokenizer of {kind}")
        return tokenizer

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.kind, "tokenizer": json.loads(self._made.to_str())}


def _blank(kind: str) -> Any:
    """The rules of a kind, without a vocabulary."""
    tokenizers = optional_import("tokenizers")
    split, space = tokenizers.pre_tokenizers.Split, ("\u2581", "never")
    unknown = SPECIAL[Tokenizer.unk_id]
    if kind == "bpe":
        made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown))
        alone = split(tokenizers.Regex(r"[\p{P}\p{S}\p{N}]"), "isolated")
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([alone, tokenizers.pre_tokenizers.Metaspace(*space)])
        made.decoder = tokenizers.decoders.Metaspace(*space)
        return made
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token=unknown))
    made.decoder = tokenizers.decoders.Fuse()
    if kind == "characters":
        made.pre_tokenizer = split(tokenizers.Regex(r"[\s\S]"), "isolated")
    return made


def _rules(made: Any) -> dict[str, Any]:
    """All that a tokenizer does but its vocabulary."""
    content = json.loads(made.to_str())
    del content["added_tokens"]
    content["model"] = {name: value for name, value in content["model"].items() if name not in ("vocab", "merges")}
    return content


def _wrong_vocabulary(content: Any) -> str:
    """What is wrong with the ids in a file: they are 0 to size - 1, each once, and the special ones are the first."""
    if not isinstance(content, dict):
        return "expected 'tokenizer' as an object"
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return ""  # the library says what is missing
    if not all(type(number) is int for number in vocabulary.values()):
        return "an id is no whole number"
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return f"expected each id from 0 to {len(vocabulary) - 1:,} once"
    added = content.get("added_tokens")
    named = [(one.get("id"), one.get("content")) if isinstance(one, dict) else None for one in added or ()]
    if [vocabulary.get(name) for name in SPECIAL] != list(range(len(SPECIAL))) or named != list(enumerate(SPECIAL)):
        return f"expected {', '.join(SPECIAL)} as the ids 0 to {len(SPECIAL) - 1}"
    return ""
