"""Tokenizers: text to ids and back, by the `tokenizers` library, in the file of JSON that it and transformers read.

    characters   one id a character                              Chinese; small data
    bpe          byte-pair encoding learned on the corpus        any language; larger data
    words        words of Chinese as rjieba segments them        models of words
    symbols      names in a list, such as letters or phones      what a recipe defines
    other        any file of the library                         pretrained models

Of the first three, ids 0 to 3 are padding, begin, end and unknown. Spaces are kept: text whose parts are all known
decodes to itself.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tileformer.extras import optional_import
from tileformer.files import PathLike, quote, read_json, shorten, write

KINDS = ("characters", "bpe", "words")
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
FORMAT = "tileformer tokenizer 1"  # of files that held the library's own beside a kind
# What other tokenizers call their special ones, the likeliest first.
NAMES = {
    "pad_id": ("<pad>", "[PAD]", "<|endoftext|>"),
    "bos_id": ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>", "<|im_start|>", "<|endoftext|>"),
    "eos_id": ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
    "unk_id": ("<unk>", "[UNK]"),
}


class Tokenizer:
    """Text to ids, by `train`, `of_symbols` or `load`. What it makes of a text never holds a special id.

    size: number of ids, up to the greatest; kind: see above; fingerprint: sha256 of the vocabulary and the rules.
    pad_id, bos_id, eos_id, unk_id: None where there is none. chat_template: Jinja, of a model that talks.
    """

    pad_id: Any
    bos_id: Any
    eos_id: Any
    unk_id: Any
    chat_template: str | None = None
    add_bos = False  # whether a text of its model begins with bos
    target: "Tokenizer"  # what reads the ids that the model writes; itself, unless they are another vocabulary's

    def __init__(self, kind: str, made: Any, **special: int | None) -> None:
        made.encode_special_tokens = True  # a text that says "<eos>" is text: begin and end come from the recipe
        self.kind, self.size, self._made = kind, 1 + max(made.get_vocab().values(), default=-1), made
        for name, texts in NAMES.items():
            known = (made.token_to_id(text) for text in texts)
            setattr(self, name, special[name] if name in special else next((i for i in known if i is not None), None))
        self._segment, self.target = optional_import("rjieba").cut if kind == "words" else None, self

    @classmethod
    def of_symbols(cls, names: Sequence[str], reserved: int = 3, *, spaced: bool, rules: Any = None) -> "Tokenizer":
        """Ids of ``names`` from ``reserved`` on, behind padding, begin, end and perhaps unknown; no other text is read.

        spaced: a space stands between two names; else each character is a name, or a longer one that is listed. rules:
        a normaliser of the library."""
        tokenizers = optional_import("tokenizers")
        listed = {name: number for number, name in enumerate((*SPECIAL[:reserved], *names))}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(listed))
        made.add_special_tokens(SPECIAL[:reserved])
        longer = "|".join(name for name in names if len(name) > 1)
        split = tokenizers.Regex(f"{longer}|[\\s\\S]" if longer else r"[\s\S]")
        made.pre_tokenizer = tokenizers.pre_tokenizers.Split(split, "isolated")
        made.decoder = tokenizers.decoders.Fuse()
        if spaced:
            made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.WhitespaceSplit(), None
        if rules is not None:
            made.normalizer = rules
        return cls("symbols", made)

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

    def encode_all(
        self, texts: Iterable[str], max_length: int | None = None, *, special: bool = False
    ) -> list[list[int]]:
        """Ids of every text, in order, each as `encode` gives them; ``special``: texts of a template, in which the name
        of a special id is that id. ValueError for a text with a part that has no id, where there is no unknown one."""
        texts = list(texts)
        units = [self._segment(text) for text in texts] if self._segment else texts
        self._made.encode_special_tokens = not special
        try:
            made = self._made.encode_batch_fast(units, is_pretokenized=self.kind == "words", add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            odd = next((text for text in texts if self._unknown(text)), "")
            named = ", ".join(map(repr, self._unknown(odd)[:5])) or shorten(error)
            raise ValueError(f"{quote(odd, 40)}: cannot read {named}: the model never learned it") from None
        finally:
            self._made.encode_special_tokens = True
        return [one.ids[:max_length] for one in made]

    def _unknown(self, text: str) -> list[str]:
        """The parts of a text that no id stands for."""
        if self._made.normalizer is not None:
            text = self._made.normalizer.normalize_str(text)
        parts = self._made.pre_tokenizer.pre_tokenize_str(text) if self._made.pre_tokenizer else [(text, None)]
        return list(dict.fromkeys(part for part, _ in parts if self._made.token_to_id(part) is None))

    def id_of(self, text: str) -> int | None:
        """The id of a token's text."""
        return self._made.token_to_id(text)

    def text_of(self, number: int | None) -> str | None:
        """The text of an id's token."""
        return None if number is None else self._made.id_to_token(number)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special ones left out, but unknown, <unk>. ValueError: an id that is none."""
        ids = [int(number) for number in ids]
        if wrong := [number for number in ids if not 0 <= number < self.size]:
            raise ValueError(f"ids of this tokenizer are 0 to {self.size - 1:,}, got {wrong[0]:,}")
        if self.kind in KINDS:
            return self._made.decode([number for number in ids if number >= self.unk_id], skip_special_tokens=False)
        return self._made.decode(ids)

    @property
    def fingerprint(self) -> str:
        content = {"format": FORMAT, "kind": self.kind, "tokenizer": json.loads(self._made.to_str())}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: PathLike) -> None:
        """Write it to one file, which is never seen half-written."""
        write(Path(path), json.dumps(json.loads(self._made.to_str()), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: PathLike, **special: int | None) -> "Tokenizer":
        """What `save` wrote, today or before, or a tokenizer.json of any model; ``special``: pad_id, bos_id, eos_id,
        unk_id, where they are known. ValueError when the file is damaged; OSError when it is not there."""
        content = read_json(path)
        if not isinstance(content, dict) or not ("model" in content or content.get("format") == FORMAT):
            found = content.get("format") if isinstance(content, dict) else content
            raise ValueError(f"{path}: expected a tokenizer.json of the tokenizers library, found {quote(found)}")
        kind = content.get("kind") if "format" in content else None
        if "format" in content and kind not in KINDS:
            raise ValueError(f"{path}: damaged; expected a kind of {', '.join(KINDS)}, found {quote(kind)}")
        content, tokenizers = content if kind is None else content.get("tokenizer"), optional_import("tokenizers")
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(content))
            fits = next((name for name in KINDS if _rules(made) == _rules(_blank(name))), None)
        except BaseException as error:  # the library raises nothing narrower, and a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            wrong = _wrong_vocabulary(content) if kind else ""
            raise ValueError(f"{path}: damaged; {wrong or f'the tokenizers library says: {shorten(error)}'}") from None
        if (kind or fits) and (wrong := _wrong_vocabulary(content)):
            raise ValueError(f"{path}: damaged; {wrong}")
        if kind and kind != fits:
            raise ValueError(f"{path}: damaged; its rules are not those of a tokenizer of {kind}")
        made.no_truncation()
        made.no_padding()
        return cls(fits or "other", made, **special)


def _blank(kind: str) -> Any:
    """The rules of a kind, without a vocabulary."""
    tokenizers = optional_import("tokenizers")
    split, space = tokenizers.pre_tokenizers.Split, ("\u2581", "never")
    unknown = SPECIAL[3]
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
