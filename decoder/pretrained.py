"""A trained model is a folder that other tools read: `save_pretrained` writes one, `load` gives model and tokenizer.

    config.json                 what the model is; of Llama and GPT-2 forms as transformers has it
    model.safetensors           its weights, or several files and model.safetensors.index.json
    tokenizer.json              of the `tokenizers` library; target_tokenizer.json where the target has its own
    generation_config.json      how it decodes, by transformers' names; tokenizer_config.json, chat_template.jinja
    README.md                   the model card

No pickle is read or written: a folder from a stranger can hold wrong numbers but no code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tileformer
from tileformer.decoder.adapters import add_bottlenecks
from tileformer.decoder.generation.options import Options
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import PathLike, quote, read_json, shorten, to_json, write

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
TOKENIZER, TARGET, RULES, TEMPLATE = (
    "tokenizer.json",
    "target_tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
INDEX, CARD = "model.safetensors.index.json", "README.md"
OURS = "tileformer"  # model_type of a form that transformers does not know
SHARD = 5 * 10**9  # bytes of a weight file


class Form(NamedTuple):
    """How a model stands in a folder of other libraries: `name_maps` has the functions."""

    model: Any
    config_from: Callable[[Mapping[str, Any]], Any]
    config_to: Callable[[Any], dict[str, Any]]
    weights_from: Callable[..., Iterator[tuple[str, Tensor]]]
    weights_to: Callable[..., Iterator[tuple[str, Tensor]]]


FORMS: dict[str, Form] = {}  # by the model_type of config.json
KINDS: dict[str, type[Saved]] = {}  # the models that a folder may hold, by the name of their class
OPTIONS = (  # of `Options`, what a generation_config.json may say
    "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams", "length_penalty", "repetition_penalty",
    "no_repeat_ngram_size", "min_new_tokens",
)  # fmt: skip


class Writing(NamedTuple):
    """How a folder's model is let write: the options, new tokens at most (None: what it has room for), whether a prompt
    begins with bos, how an answer is shown (of input, prompt and text), and what an input looks like: a pattern, and in
    words."""

    options: Options = Options()
    max_new_tokens: int | None = None
    add_bos: bool = False
    line: str = "{text}"
    pattern: str = ""
    expected: str = ""


class Saved:
    """What a model needs to be saved as a folder: ``config``, one of the dataclasses ``configs``."""

    configs: tuple[Any, ...] = ()
    config: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("tileformer.decoder") and "configs" in cls.__dict__:
            KINDS[cls.__name__] = cls

    def save_pretrained(self, folder: PathLike, **options: Any) -> Path:
        """See `save_pretrained`."""
        model: Any = self
        return save_pretrained(model, folder, **options)

    @classmethod
    def from_pretrained(cls, folder: PathLike, **options: Any) -> Any:
        """The model that `load` gives, without its tokenizer. TypeError where the folder holds another kind."""
        model, _ = load(folder, **options)
        if not isinstance(model, cls):
            raise TypeError(f"{folder}: a {type(model).__name__}, expected a {cls.__name__}")
        return model

    def described(self) -> dict[str, Any]:
        """What config.json says of it."""
        adapters = {"adapters": self.adapters} if hasattr(self, "adapters") else {}
        return asdict(self.config) | adapters

    @classmethod
    def blank(cls, config: Mapping[str, Any]) -> Any:
        """The model that ``config`` describes. ValueError, TypeError or KeyError where it does not."""
        model: Any = cls(_config(config, cls.configs))  # type: ignore[call-arg]
        if config.get("adapters"):
            add_bottlenecks(model, config["adapters"])
        return model


def model_of(config: Any) -> Any:
    """The model that writes, all weights at random, which one of our configurations describes."""
    for kind in KINDS.values():
        if type(config) in kind.configs and getattr(kind, "conditioned", None) == bool(getattr(config, "src_vocab", 0)):
            return kind(config)  # type: ignore[call-arg]
    raise TypeError(f"no model is made of a {type(config).__name__}; there is: {', '.join(KINDS)}")


def save_pretrained(
    model: nn.Module,
    folder: PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    target_tokenizer: Tokenizer | None = None,
    writing: Writing | None = None,
    classes: Iterable[str] = (),
    card: str = "",
    shard: int = SHARD,
) -> Path:
    """Write ``model`` as a folder that `load` reads, and gives its path. config.json, which makes it one, comes last.

    model: a Seq2Seq, a DecoderLM, a recurrent one, or a Classifier of one, whose ``classes`` are named. writing: how
    its `generate` decodes. card: Markdown behind the card's head. shard: bytes of a weight file at most.

    Raises TypeError for another model; ValueError without safetensors, or for a vocabulary of another size; OSError.

    Example:
        >>> model = DecoderLM(DecoderLMConfig(vocab=20, d_model=32, nhead=4))
        >>> save_pretrained(model, "runs/small")  # doctest: +SKIP
        >>> model, tokenizer = load("runs/small")  # doctest: +SKIP
    """
    kind, folder = type(model).__name__, Path(folder)
    if not isinstance(model, Saved) or KINDS.get(kind) is not type(model):
        raise TypeError(f"a folder holds one of {', '.join(KINDS)}, got a {kind}")
    names = dict(enumerate(classes))
    config = {"architectures": [kind], "model_type": OURS, "tileformer_version": tileformer.__version__}
    config |= model.described() | ({"id2label": names} if names else {})
    form = FORMS.get(str(config.get("family")))
    if form is not None and type(model) is form.model and "adapters" not in config:
        try:
            config = form.config_to(model.config)
        except ValueError:  # a shape that no family has is written as ours
            form = None
    else:
        form = None
    if names and len(names) != config.get("num_classes"):
        raise ValueError(f"a {kind} of {config.get('num_classes', 'no')} classes got {len(names)} names")
    for made, size in zip((tokenizer, target_tokenizer), _sizes(model), strict=False):
        if made is not None and made.size > size:
            raise ValueError(f"a tokenizer of {made.size:,} ids does not fit a model of {size:,}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    own = dict(_own(model)) if form is None else dict(form.weights_to(model.config, model.state_dict()))
    _write_weights(folder, own, shard)
    for name, made in ((TOKENIZER, tokenizer), (TARGET, target_tokenizer)):
        if made is not None:
            made.save(folder / name)
    ids = {f"{name}_token_id": getattr(model, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    if getattr(model.config, "pad_id", 0) is None:  # an id of its own, which others do not have
        del ids["pad_token_id"]
    if getattr(model, "eos_id", None) is not None:
        write(folder / GENERATION, to_json(_generation(writing or Writing()) | ids, indent=1) + "\n")
    if tokenizer is not None:
        write(folder / RULES, to_json(_rules(tokenizer, writing or Writing()), indent=1, ensure_ascii=False) + "\n")
        if tokenizer.chat_template:
            write(folder / TEMPLATE, tokenizer.chat_template)
    write(folder / CARD, f"---\nlibrary_name: tileformer\ntags: [{kind}]\n---\n\n{card.strip() or f'# A {kind}'}\n")
    write(folder / CONFIG, to_json(config | {"dtype": dtype}, indent=1) + "\n")
    return folder


def load(
    folder: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, Tokenizer | None]:
    """The model of a folder, in eval mode, and its tokenizer, or None; ``tokenizer.target`` is the one that reads what
    the model writes. Weights are mapped from the file: nothing is held twice. ``dtype``: another than the file's.

    Raises ValueError in one line for a folder that is none, damaged, or of a model that we do not have.

    Example:
        >>> model, tokenizer = load("runs/g2p")  # doctest: +SKIP
        >>> ids = generate(model, torch.tensor([tokenizer.encode("hello")]))  # doctest: +SKIP
        >>> tokenizer.target.decode(ids[0])  # doctest: +SKIP
        'HH AH L OW'
    """
    folder = Path(folder)
    config = _read_config(folder)
    model, tensors = _blank(folder, config, dtype)
    assign(folder, model, tensors, dtype, torch.device(device))
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: PathLike) -> Tokenizer | None:
    """The tokenizer of a folder, with its target's and its template; None where it has none. ValueError: damaged."""
    folder = Path(folder)
    if not (folder / TOKENIZER).exists():
        return None
    rules = read_json(folder / RULES) if (folder / RULES).exists() else {}
    named = {name: rules.get(f"{name}_token") for name in ("pad", "bos", "eos", "unk")}
    texts = {name: x.get("content") if isinstance(x, dict) else x for name, x in named.items()}
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    for name, text in texts.items():
        if isinstance(text, str) and (known := tokenizer.id_of(text)) is not None:
            setattr(tokenizer, f"{name}_id", known)
    template = rules.get("chat_template")
    if (folder / TEMPLATE).exists():
        template = (folder / TEMPLATE).read_text("utf-8")
    tokenizer.chat_template = template if isinstance(template, str) else None
    if (folder / TARGET).exists():
        tokenizer.target = Tokenizer.load(folder / TARGET)
    return tokenizer


def load_writing(folder: PathLike) -> Writing:
    """How the model of a folder is to write. ValueError where its files say what makes no sense."""
    folder = Path(folder)
    said = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    rules = read_json(folder / RULES) if (folder / RULES).exists() else {}
    given = {name: said[name] for name in OPTIONS if said.get(name) is not None}
    if not said.get("do_sample"):
        given = {
            name: value
            for name, value in given.items()
            if name not in ("temperature", "top_k", "top_p", "min_p", "typical_p")
        }
    elif "temperature" not in given:
        given["temperature"] = 1.0
    if given.get("top_k") == 0:  # transformers' word for none
        del given["top_k"]
    try:
        options = Options(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / GENERATION}: {shorten(error)}") from None
    ours = said.get(OURS) or {}
    shown = {name: str(ours[name]) for name in ("line", "pattern", "expected") if name in ours}
    return Writing(options, said.get("max_new_tokens"), bool(rules.get("add_bos_token")), **shown)


def is_folder(path: PathLike) -> bool:
    """Whether a path is a folder of a model."""
    return (Path(path) / CONFIG).is_file()


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, each once: a tied one by its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def _sizes(model: Any) -> tuple[int, ...]:
    """The vocabularies that a model reads first and then, if they are two, writes."""
    config = model.config.general()
    return (config.src_vocab, config.vocab) if config.src_vocab else (config.vocab,)


def _write_weights(folder: Path, tensors: dict[str, Tensor], shard: int) -> None:
    save = optional_import("safetensors.torch").save_file
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if files[-1] and size > shard:
            files.append({})
            size = tensor.nbytes
        files[-1][name] = tensor.contiguous() if tensor.is_contiguous() else tensor.contiguous()
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    names = [WEIGHTS] if len(files) == 1 else [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]  # fmt: skip
    for name, content in zip(names, files, strict=True):
        try:
            save(content, str(folder / name), {"format": "pt"})
        except Exception as error:
            if "SafetensorError" not in type(error).__name__:
                raise
            raise OSError(f"{folder / name}: {shorten(error)}") from None
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(folder / name, 0o666 & ~umask)  # safetensors makes it the owner's alone
    if len(files) > 1:
        where = {key: name for name, content in zip(names, files, strict=True) for key in content}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write(folder / INDEX, to_json({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n")


def _generation(writing: Writing) -> dict[str, Any]:
    defaults = Options()
    said = {name: getattr(writing.options, name) for name in OPTIONS}
    said = {name: value for name, value in said.items() if value != getattr(defaults, name)}
    if writing.max_new_tokens is not None:
        said["max_new_tokens"] = writing.max_new_tokens
    ours = {name: getattr(writing, name) for name in ("line", "pattern", "expected")}
    ours = {name: value for name, value in ours.items() if value != Writing._field_defaults[name]}
    return {"do_sample": writing.options.samples, **said, **({OURS: ours} if ours else {})}


def _rules(tokenizer: Tokenizer, writing: Writing) -> dict[str, Any]:
    special = {
        f"{name}_token": tokenizer.text_of(getattr(tokenizer, f"{name}_id")) for name in ("pad", "bos", "eos", "unk")
    }
    special = {name: text for name, text in special.items() if text is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": writing.add_bos, **special}


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        found = "it is a file" if folder.is_file() else "it has none" if folder.is_dir() else "it does not exist"
        raise ValueError(f"{folder}: expected the folder of a model, with {CONFIG}; {found}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / CONFIG}: expected an object with a model_type, found {quote(config)}")
    return config


def _blank(folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """The model of a configuration on the meta device, and its tensors by our names, read one by one."""
    where = folder / CONFIG
    read, names = _weights(folder)

    def get(name: str) -> Tensor:
        x = read(name)  # what is computed of it is computed in the dtype that was asked for
        return x if dtype is None or not x.is_floating_point() else x.to(dtype)

    if (form := FORMS.get(config["model_type"])) is not None:
        try:
            made = form.config_from(config)
            with torch.device("meta"):
                return form.model(made), form.weights_from(made, get, names)
        except ValueError as error:
            raise ValueError(f"{where}: {shorten(error)}") from None
    if config["model_type"] != OURS:
        known = ", ".join((OURS, *FORMS))
        raise ValueError(f"{where}: model_type {quote(config['model_type'])} is none that we have: {known}")
    kind = (config.get("architectures") or [None])[0]
    if kind not in KINDS:
        raise ValueError(f"{where}: expected architectures of {', '.join(KINDS)}, found {quote(kind)}")
    with torch.device("meta"):
        try:
            blank = KINDS[kind].blank(config)
            labels = config.get("id2label") or {}
            blank.classes = [str(labels[str(i)]) for i in range(len(labels))]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            lacks = "it lacks " if isinstance(error, KeyError) else ""
            raise ValueError(f"{where}: {lacks}{shorten(error)}") from None
    return blank, ((name, get(name)) for name in names)


def _config(config: Mapping[str, Any], kinds: tuple[Any, ...]) -> Any:
    """The dataclass of which ``config`` holds all that has no default. ValueError for a value of another type."""
    for kind in kinds:
        known = {field.name: field for field in fields(kind)}
        needed = {name for name, field in known.items() if field.default is field.default_factory}
        if not needed <= config.keys():
            continue
        made = kind(**{name: value for name, value in config.items() if name in known})
        for name, value in vars(made).items():
            usual = known[name].default
            if isinstance(usual, int | float | str) and not isinstance(value, type(usual) | int | type(None)):
                raise ValueError(f"expected {name} as a {type(usual).__name__}, found {quote(value)}")
        return made
    raise KeyError(min(needed - config.keys()))


def _weights(folder: Path) -> tuple[Callable[[str], Tensor], list[str]]:
    """What reads a tensor of a folder by its name, and all names."""
    safe_open = optional_import("safetensors").safe_open
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{folder / INDEX}: expected a weight_map of names to files")
        files = sorted(set(where.values()))
        if odd := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX}: {quote(odd[0])} leads out of the folder")
        if lost := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder / lost[0]}: missing, {len(lost)} of the {len(files)} weight files that {INDEX} names"
            )
    places: dict[str, str] = {}
    for name in files:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; expected the model's weights")
        try:
            with safe_open(str(file), framework="pt") as content:
                places |= dict.fromkeys(content.keys(), str(file))
        except Exception as error:
            raise ValueError(f"{file}: damaged, or not in the safetensors format ({shorten(error)})") from None

    def get(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as content:  # each for itself, so that what is joined is let go
            return content.get_tensor(name)

    return get, list(places)


def assign(
    folder: Path,
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Put tensors in the place of a blank model's parameters and buffers; tied ones stay tied."""
    own = model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    for name, tensor in tensors:
        if (mine := own.get(name)) is None:
            raise ValueError(f"{folder}: the weights hold {quote(name, 100)}, which a {type(model).__name__} has not")
        if mine.shape != tensor.shape:
            raise ValueError(f"{folder}: {name} is {tuple(tensor.shape)}, the configuration says {tuple(mine.shape)}")
        if mine.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{folder}: {name} is {tensor.dtype}, expected {mine.dtype}")
        found[id(mine)] = tensor.to(device, dtype if mine.is_floating_point() else None)
    if lost := [name for name, mine in own.items() if id(mine) not in found]:
        raise ValueError(f"{folder}: the weights lack {lost[0]}" + (f" and {len(lost) - 1} more" if lost[1:] else ""))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, mine in module._parameters.items():
            if mine is not None:
                if id(mine) not in made:
                    made[id(mine)] = nn.Parameter(
                        found[id(mine)], mine.requires_grad and found[id(mine)].is_floating_point()
                    )
                module._parameters[name] = made[id(mine)]
        for name, mine in module._buffers.items():
            if mine is not None and id(mine) in found:
                module._buffers[name] = found[id(mine)]
