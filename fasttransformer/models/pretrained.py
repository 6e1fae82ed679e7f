"""What every model here has: a tokenizer, its way to a packed batch, and saving.

A saved model is a folder of three files: ``model.safetensors``, ``config.json`` and
``tokenizer.json``. Each is written beside its place and moved there, so a crash leaves the old file
or the new one; ``config.json`` comes last.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..ops._front import FLOATS
from .config import CheckedOptions, TransformerConfig
from .packing import PackedBatch, pack, pack_padded
from .tokenizer import FILE as TOKENIZER_FILE
from .tokenizer import Tokenizer, write_atomically
from .transformers_call import Checkpointed

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
M = TypeVar("M", bound="TextModel")
#: What a model takes as texts: strings, or token ids in lists or a padded tensor.
Texts = Any


class _Place(NamedTuple):
    """Where a parameter stands: ``module.name``, in the model at ``path``."""

    module: nn.Module
    name: str
    path: str


def _places(part: nn.Module, names: dict[nn.Module, str]) -> Iterator[tuple[_Place, nn.Parameter]]:
    """The places in ``part`` of its own parameters and of its modules', with names in the model."""
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                path = f"{names[module]}.{name}" if names[module] else name
                yield _Place(module, name, path), parameter


class TextModel(Checkpointed, nn.Module):
    """Base of the models: not to be made itself, but ``TextModel.from_pretrained(directory)`` gives
    whichever model was saved there."""

    #: class name → class, for from_pretrained
    _classes: ClassVar[dict[str, type[TextModel]]] = {}
    #: what :meth:`configs` holds
    _config_class: ClassVar[type[CheckedOptions]] = TransformerConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TextModel._classes[cls.__name__] = cls

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer: Tokenizer | None = None
        # FSDP2 gives a model a class of its own later.
        self._class_name = type(self).__name__

    # ---- what a model says about itself -------------------------------------------------------

    def configs(self) -> dict[str, Any]:
        """The configs that the model is built from again, by name."""
        raise NotImplementedError

    @classmethod
    def from_configs(cls: type[M], configs: dict[str, Any]) -> M:
        """A new model, as :meth:`configs` describes it."""
        raise NotImplementedError

    def tied(self) -> list[tuple[nn.Module, nn.Module]]:
        """(owner, other) for modules whose ``weight`` is one parameter."""
        return []

    def _tie(self) -> None:
        """Makes them one, when the model is built."""
        for owner, other in self.tied():
            other.weight = owner.weight

    def _second_places(self) -> list[tuple[_Place, _Place]]:
        """(another place, the owner's) of each tied parameter, wherever in the tied modules it
        stands: an adapter put around one of them has it a floor deeper."""
        names = {module: name for name, module in self.named_modules()}
        found = []
        for owner, other in self.tied():
            owned = {id(parameter): place for place, parameter in _places(owner, names)}
            for place, parameter in _places(other, names):
                if id(parameter) in owned:
                    found.append((place, owned[id(parameter)]))
        return found

    def _second_names(self) -> dict[str, str]:
        """The second name of each tied parameter → its first."""
        return {other.path: owner.path for other, owner in self._second_places()}

    @contextlib.contextmanager
    def _staying_tied(self) -> Iterator[None]:
        """Around what may put new parameters into each place of a tied one."""
        places = self._second_places()
        yield
        for other, owner in places:
            setattr(other.module, other.name, getattr(owner.module, owner.name))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self._staying_tied():
            return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._staying_tied():
            return super().load_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As of :class:`torch.nn.Module`, but a tied parameter is there once."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self._second_names():
            state.pop(prefix + name, None)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for second, first in self._second_names().items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + second, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ---- text ---------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of texts; until one is set, :meth:`Tokenizer.default`."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.default(self._vocab_size())
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None and tokenizer.vocab_size > self._vocab_size():
            raise ValueError(
                f"{type(self).__name__}: the tokenizer has a vocabulary of {tokenizer.vocab_size}, "
                f"but the model has one of {self._vocab_size()}"
            )
        self._tokenizer = tokenizer

    def _vocab_size(self) -> int:
        return min(config.vocab_size for config in self.configs().values())

    def packed(
        self,
        name: str,
        texts: Texts,
        config: TransformerConfig,
        *,
        bos: bool = False,
        eos: bool = True,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> PackedBatch:
        """Strings, lists of ids or a padded tensor of ids as a packed batch on the model's device.

        Strings get ``<s>`` and ``</s>`` as asked; ids are taken as they are.

        Raises:
            TypeError: something else.
            ValueError: an empty batch; shapes that don't fit.
        """
        if isinstance(texts, PackedBatch):
            return texts
        if isinstance(texts, str):
            texts = [texts]
        if isinstance(texts, Tensor):
            if texts.dim() == 1:
                texts = texts[None]
            if texts.shape[0] == 0:
                raise ValueError(f"{type(self).__name__}: {name} is an empty batch")
            return pack_padded(
                name, texts.to(self.device), lengths=lengths, attention_mask=attention_mask,
                pad_id=config.pad_id,
            )  # fmt: skip
        if not isinstance(texts, Sequence):
            raise TypeError(
                f"{type(self).__name__}: {name} must be strings, lists of ids or a tensor of ids, "
                f"got {type(texts).__name__}"
            )
        if len(texts) == 0:
            raise ValueError(f"{type(self).__name__}: {name} is an empty batch")
        if all(isinstance(text, str) for text in texts):
            return pack(self._encoded(texts, config, bos, eos), self.device)
        for text in texts:
            if isinstance(text, str) or not isinstance(text, (Sequence, Tensor)):
                raise TypeError(
                    f"{type(self).__name__}: {name} must hold strings alone or lists of ids alone; "
                    f"it holds a {type(text).__name__}"
                )
        rows = [text.tolist() if isinstance(text, Tensor) else list(text) for text in texts]
        return pack(rows, self.device)

    def _encoded(
        self, texts: Sequence[str], config: TransformerConfig, bos: bool, eos: bool
    ) -> list[list[int]]:
        tokenizer = self.tokenizer
        own = (config.pad_id, config.bos_id, config.eos_id)
        if own != (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id):
            raise ValueError(
                f"{type(self).__name__}: its pad_id, bos_id and eos_id are {own}, which are not "
                "the tokenizer's (0, 1, 2), so it takes ids only"
            )
        return tokenizer.encode(texts, bos=bos, eos=eos, max_length=config.max_length)

    # ---- files --------------------------------------------------------------------------------

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes weights, configs and tokenizer into ``directory``, which is made if need be.

        A tied parameter is written once. ``state_dict`` is in place of the model's own, where its
        weights are spread over several processes.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: weight.detach().contiguous() for name, weight in state.items()}
        write_atomically(folder / WEIGHTS_FILE, _safetensors().save(state, {"format": "pt"}))
        if self._tokenizer is not None:
            self._tokenizer.save(folder)
        else:
            (folder / TOKENIZER_FILE).unlink(missing_ok=True)
        description = {
            "class": self._class_name,
            "configs": {name: config.to_dict() for name, config in self.configs().items()},
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / CONFIG_FILE, text.encode())

    @classmethod
    def from_pretrained(
        cls: type[M],
        directory: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> M:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            directory: the folder.
            device, dtype: where to and as what; as saved unless given.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: another model's folder; a file that is broken; weights that don't fit the
                config or are no floats, or a tokenizer that doesn't fit the vocabulary, with both
                sizes.
        """
        folder = Path(directory)
        with _refusing(f"{cls.__name__}: {folder / CONFIG_FILE} is not a config of this package"):
            description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            name, written = description["class"], description["configs"]
            found = TextModel._classes.get(name)
        if found is None or not issubclass(found, cls):
            raise ValueError(f"{cls.__name__}: {folder} holds a {name}")
        library = _safetensors()
        with _refusing(f"{cls.__name__}: {folder / WEIGHTS_FILE} is not a safetensors file"):
            state = library.load((folder / WEIGHTS_FILE).read_bytes())
        with _refusing(f"{cls.__name__}: {folder / CONFIG_FILE} is not a config of a {name}"):
            kind = found._config_class
            configs: Any = {part: kind.from_dict(config) for part, config in written.items()}
            layers = sum(getattr(config, "num_layers", 0) for config in configs.values())
            if layers > len(state):
                raise ValueError(
                    f"{cls.__name__}: {folder / CONFIG_FILE} makes {layers} layers, but "
                    f"{folder / WEIGHTS_FILE} has {len(state)} weights in all"
                )
            # Sizes are compared before there is memory for them.
            with torch.device("meta"):
                model: Any = found.from_configs(configs)
        model._load(state, folder)
        if (folder / TOKENIZER_FILE).exists():
            model.tokenizer = Tokenizer.load(folder)
        return model.to(device=device, dtype=dtype).eval()

    def _load(self, state: dict[str, Tensor], folder: Path) -> None:
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"{type(self).__name__}: {folder / WEIGHTS_FILE} does not fit its config: it lacks "
                f"{missing or 'nothing'} and has {unknown or 'nothing'} beyond it"
            )
        for name, parameter in own.items():
            saved = state[name]
            if saved.shape == parameter.shape:
                continue
            table = name.endswith(("embedding.weight", "lm_head.weight"))
            what = "a vocabulary of {}" if table else "shape {}"
            sizes = [
                what.format(x.shape[0] if table else tuple(x.shape)) for x in (saved, parameter)
            ]
            raise ValueError(
                f"{type(self).__name__}: {name} in {folder / WEIGHTS_FILE} has {sizes[0]}, but "
                f"its config makes it {sizes[1]}"
            )
        for name, weight in state.items():
            if weight.dtype not in FLOATS:
                raise ValueError(
                    f"{type(self).__name__}: {name} in {folder / WEIGHTS_FILE} has dtype "
                    f"{weight.dtype}; weights are of {', '.join(map(str, FLOATS))}"
                )
        self.to_empty(device="cpu")
        dtypes = {weight.dtype for weight in state.values()}
        if len(dtypes) == 1:
            self.to(dtypes.pop())
        self.load_state_dict(state)


@contextlib.contextmanager
def _refusing(message: str) -> Iterator[None]:
    """What files of any content may raise, as a ValueError; what is one already stays."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"{message}: {type(error).__name__}: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading models needs the safetensors library: "
            "pip install 'fasttransformer[text]'"
        ) from error
    return safetensors.torch
