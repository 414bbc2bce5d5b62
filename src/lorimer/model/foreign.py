"""Any other architecture that transformers has code for, as a decoder: slower, with the same adapters and
loss.

transformers gets a config and tensors, and no path: it reads no file and asks no network, nothing is
unpickled, and code that lies in a model's folder is never looked for. It is imported when such a base is
loaded, and at no other time.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lorimer.bases.open import IGNORED, BaseFiles
from lorimer.config import QuantConfig
from lorimer.errors import BaseError, UserError
from lorimer.model.config import check_sizes
from lorimer.model.foreign_decoder import ForeignDecoder, NotCausal, foreign_decoder
from lorimer.model.foreign_known import check_known, slower
from lorimer.model.load import Place
from lorimer.model.tensors import NOT_WEIGHTS, listed
from lorimer.quant.gguf_blocks import stored
from lorimer.quant.part import NotFinite

WHOLE = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def load_foreign(base: BaseFiles, place: Place, quant: QuantConfig, why: str) -> ForeignDecoder:
    """The base as a decoder, computed by transformers on this device, in this type.

    `why` says why lorimer's own decoder does not compute it. Raises BaseError for an architecture that
    transformers does not know or cannot run, tensors that do not fit the config, or where transformers is
    not installed, and UserError for settings that only lorimer's own decoder has.
    """
    _check_quant(base, quant)
    config, kind = _classes(base, why)
    model = _filled(base, config, kind, place)
    text = slower(base.config, why)
    try:
        decoder = foreign_decoder(model, base.config, place.device, place.dtype, quant, text)
    except NotCausal as error:
        raise BaseError(
            f"the architecture `{base.config['model_type']}` lets a token see what follows it, so it "
            "cannot be trained to go on",
            path=base.path,
        ) from error
    except NotFinite as error:
        raise BaseError(
            "a weight holds NaN or infinity, which cannot be quantised", path=base.path
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _cannot(base, f"cannot compute it: {_line(error)}") from error
    base.release()
    return decoder


def shape_of(base: BaseFiles, why: str, dtype: torch.dtype) -> ForeignDecoder:
    """The decoder of a base's config with all its shapes and no numbers. Raises BaseError."""
    config, kind = _classes(base, why)
    try:
        with quiet(), torch.device("meta"):
            model = kind(config).to(dtype).eval().requires_grad_(False)
        place = torch.device("meta"), dtype
        return foreign_decoder(model, base.config, *place, QuantConfig(), slower(base.config, why))
    except Exception as error:
        raise _cannot(base, f"cannot build it from this config: {_line(error)}") from error


def _check_quant(base: BaseFiles, quant: QuantConfig) -> None:
    named = base.config.get("model_type")
    only = "quant: keep" if quant.kind == "keep" else "quant.embeddings" if quant.embeddings else None
    if only:
        raise UserError(
            f"`{only}` is for lorimer's own decoder, and `{named}` runs through transformers",
            fix="Leave it out; `quant: nf4` quantises the linear layers here too.",
            path=base.path,
        )
    if base.config.get("quantization_config"):
        raise BaseError(
            f"the base is quantised, and `{named}` runs through transformers here, which is given plain "
            "weights",
            fix="Use the original in 16 or 32 bits; `quant: nf4` quantises its linear layers.",
            path=base.path,
        )


def _classes(base: BaseFiles, why: str) -> tuple[Any, Any]:
    """transformers' config of this base, and its class for causal language models."""
    check_known(base.config, why, path=base.path, brings_code=base.brings_code)
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        # Some configs write 0 for no window.
        check_sizes(base.config | {"sliding_window": base.config.get("sliding_window") or None})
        # Modules print and warn while they are built.
        with quiet():
            config = CONFIG_MAPPING[base.config["model_type"]](**_plain(base.config))
            return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception as error:  # what a config's class raises is not agreed upon
        raise BaseError(
            f"the model's config cannot be used: {_line(error)}",
            fix="Check config.json against the model's original.",
            path=base.path,
        ) from error


def _plain(config: Any) -> Any:
    """The config without what names code, or chooses other code than the library's."""
    if isinstance(config, dict):
        if config.keys() == {"__float__"}:  # how transformers writes infinity
            return float(config["__float__"])
        return {key: _plain(value) for key, value in config.items() if key not in LEFT_OUT}
    return [_plain(value) for value in config] if isinstance(config, list) else config


# Beside code: types, which the run chooses, and kernels that would be fetched.
LEFT_OUT = (*IGNORED, "dtype", "torch_dtype", "quantization_config", "attn_implementation", "use_kernels")


def _filled(base: BaseFiles, config: Any, kind: Any, place: Place) -> Any:
    """transformers' model with the base's tensors: exactly those that it wants."""
    tensors = {name: _tensor(base, name) for name in base.tensors}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=place.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # as above
        raise _cannot(base, f"cannot build it from this config: {_line(error)}") from error
    _check_fit(base, found)
    for parameter in model.parameters():
        # Not the file's own memory: that may change while a run goes on.
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(place.device, copy=True)
    return model.to(place.device).eval()


def _tensor(base: BaseFiles, name: str) -> torch.Tensor:
    """A tensor as it lies in the file: weights, and masks or tables of ids that some models keep."""
    entry, raw = base.tensors[name], base.raw(name)
    if entry.dtype in WHOLE:
        return torch.from_numpy(raw).view(WHOLE[entry.dtype]).view(entry.shape)
    return stored(raw, entry.dtype, entry.shape)


def _check_fit(base: BaseFiles, found: Mapping[str, Any]) -> None:
    """Raise BaseError for tensors that are missing, of another shape, or have no place."""
    fix = "The config and the weights do not belong together, or a file of the base was not copied."
    for name, given, wanted in sorted(found["mismatched_keys"], key=str):
        raise BaseError(
            f"the weight `{name}` has the shape {list(given)} (wanted: {list(wanted)})",
            fix=fix,
            path=base.path,
        )
    if missing := sorted(found["missing_keys"]):
        verb = "is" if len(missing) == 1 else "are"
        raise BaseError(f"{listed(missing)} {verb} missing", fix=fix, path=base.path)
    extra = [name for name in sorted(found["unexpected_keys"]) if name.endswith((".weight", ".bias"))]
    if extra := [name for name in extra if not name.endswith(NOT_WEIGHTS)]:
        raise BaseError(
            f"the architecture `{base.config['model_type']}` as the config describes it has no place for "
            f"{listed(extra)}",
            fix=fix,
            path=base.path,
        )
    if errors := found.get("error_msgs"):
        raise BaseError(f"the weights do not fit: {_line(errors[0])}", fix=fix, path=base.path)


def _cannot(base: BaseFiles, what: str) -> BaseError:
    version, named = importlib.metadata.version("transformers"), base.config.get("model_type")
    return BaseError(
        f"the architecture `{named}` does not run here: transformers {version} {what}",
        fix="Check config.json against the model's original; another version may know it.",
        path=base.path,
    )


def _line(error: object) -> str:
    """An error of a library as one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says and fetches nothing while it builds a model; what is wrong is found here."""
    import warnings

    import huggingface_hub.constants as hub
    from transformers.utils import logging as library

    logging: Any = library  # its functions have no types
    level, bar, offline = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.HF_HUB_OFFLINE
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
