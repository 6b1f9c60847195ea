"""Tokenizers: text to ids and back, by the `tokenizers` library, in one file of JSON.

    characters   one id a character                              Chinese; small data
    bpe          byte-pair encoding learned on the corpus        any language; larger data
    words        words of Chinese as rjieba segments them        models of words

Ids 0 to 3 are padding, begin, end and unknown. Spaces are kept: text whose parts are all known decodes to itself.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tileformer.training.extras import library

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
        self._segment = library("rjieba").cut if kind == "words" else None

    @classmethod
    def train(
        cls, texts: Iterable[str], kind: str = "characters", vocabulary: int = 8000, minimum: int = 2
    ) -> "Tokenizer":
        """Learn at most `vocabulary` ids, the special ones too, of what `texts` say at least `minimum` times.

        The same texts give the same ids, the most frequent first. "bpe": at most three quarters of the ids are single
        characters, and no id crosses a space, a digit or punctuation. Raises ValueError for an unknown kind, sizes that
        leave no room, texts in which nothing is frequent enough, and a library that is not installed.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if vocabulary <= len(SPECIAL) or minimum < 1:
            sizes = f"vocabulary {vocabulary} and minimum {minimum}"
            raise ValueError(f"vocabulary must be above {len(SPECIAL)} and minimum at least 1, got {sizes}")
        tokenizers = library("tokenizers")
        shared = dict(vocab_size=vocabulary, min_frequency=minimum, special_tokens=SPECIAL, show_progress=False)
        split, space = tokenizers.pre_tokenizers.Split, ("\u2581", "never")
        trainer = tokenizers.trainers.WordLevelTrainer(**shared)
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token=SPECIAL[cls.unk_id]))
        made.decoder = tokenizers.decoders.Fuse()
        if kind == "characters":
            made.pre_tokenizer = split(tokenizers.Regex(r"[\s\S]"), "isolated")
        elif kind == "bpe":
            trainer = tokenizers.trainers.BpeTrainer(**shared, limit_alphabet=(vocabulary - len(SPECIAL)) * 3 // 4)
            made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[cls.unk_id]))
            alone = split(tokenizers.Regex(r"[\p{P}\p{S}\p{N}]"), "isolated")
            made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
                [alone, tokenizers.pre_tokenizers.Metaspace(*space)]
            )
            made.decoder = tokenizers.decoders.Metaspace(*space)
        cut = library("rjieba").cut if kind == "words" else lambda text: text
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one file, which is never seen half-written."""
        path = Path(path)
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(json.dumps(self._content(), ensure_ascii=False, indent=1) + "\n", "utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """What `save` wrote. ValueError when the file is damaged or another program's; OSError when it is not there."""
        tokenizers = library("tokenizers")
        try:
            content = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged or truncated; expected JSON ({error})") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT or content.get("kind") not in KINDS:
            raise ValueError(f"{path}: expected format {FORMAT!r}, found {found!r}; write it by Tokenizer.save")
        try:
            return cls(content["kind"], tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"])))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: damaged; the tokenizers library says: {error}") from None

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.kind, "tokenizer": json.loads(self._made.to_str())}
