"""How large a model is and what a row of it costs, from its configuration alone: no weight is read, nothing computed.

The model is built on torch's meta device. Its forward pass then runs on fake tensors, which have a shape, a type and a
device and no content: hooks tell what autograd keeps for the backward pass, torch's counter the operations. So the
passes of a GPU, in its mixed precision, are measured on any machine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainbox.container import base_model, distributed, sharding
from trainbox.container.report import emit
from trainbox.container.task import Task
from trainbox.errors import ConfigError, TrainboxError
from trainbox.spec.asking import PICTURES
from trainbox.spec.gpus import find_gpu
from trainbox.spec.planning import Facts, Rows, short
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, box, write_json

TEXT_TOKENS = {"FluxPipeline": 512, "ZImagePipeline": 128}
"""Tokens of a prompt as its denoiser sees it; CLIP's are 77."""
HEADED = ("text-classification", "token-classification", "image-classification")
"""Tasks whose head is new: it is trained in full beside an adapter."""

Pass = Callable[[int], Any]
"""A forward pass of so many rows."""
Shape = dict[str, Any]
"""Fields of Facts that follow from the inputs."""


def write(task: Task) -> None:
    """`size`: the facts to /output/size.json."""
    facts = measure(task)
    write_json(box(BOX_OUTPUT) / "size.json", facts.model_dump(mode="json"))
    emit("note", text=f"{facts.architecture}: {facts.parameters:,} parameters, {facts.trained:,} trained")


def tell(task: Task) -> tuple[Facts, Rows]:
    """Tell the facts before a training: to the harness, which knows prices and data, or in plain lines."""
    facts = measure(task)
    spec, there = task.spec, None
    if torch.cuda.is_available():
        with contextlib.suppress(ConfigError):
            there = find_gpu(torch.cuda.get_device_name(), "GPU")
    rows = Rows(spec.data.rows.get("train", 1), spec.data.rows.get("validation", 0))
    lines = short(facts, spec.recipe, rows, there, there=there is not None, count=distributed.size())
    text = "\n".join(line.replace("!", "warning: ", 1) if line.startswith("!") else line for line in lines)
    emit("facts", text=text, facts=facts.model_dump(mode="json"))
    return facts, rows


def measure(task: Any, device: str = "cuda", compute: torch.dtype = torch.bfloat16) -> Facts:
    """What a plan reckons with. Raises ConfigError where the model cannot be built.

    `device` need not be there; `compute` is the type that it multiplies in.
    """
    recipe = task.recipe
    task.recipe = _plain(recipe)
    try:
        with _quiet(), torch.device("meta"):
            model, forward, shape = (_denoiser if recipe.kind == PICTURES else _single)(task, compute)
        facts = {"model": recipe.model.name, **_parameters(model), **shape}
        try:
            return Facts(**facts, **_activations(model, forward, device, compute))
        except Exception as error:  # such as experts, whose rows depend on their content
            return Facts(**facts, **_by_rule(model, facts, first_line(error)))
    except TrainboxError:
        raise
    except Exception as error:
        fault = f"its configuration cannot be sized: {first_line(error)}"
        remedy = "its config.json must be one that transformers (or diffusers) wrote for this kind of model"
        raise ConfigError(fault, place=recipe.model.name, remedy=remedy) from error
    finally:
        task.recipe = recipe


def _plain(recipe: Any) -> Any:
    """The recipe less what needs weights or does not change sizes."""
    lora = recipe.lora.model_copy(update={"init_lora_weights": "default"})
    training = recipe.training.model_copy(update={"gradient_checkpointing": False})
    return recipe.model_copy(update={"lora": lora, "training": training})


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Building a model says nothing."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# Models on the meta device, and rows of their largest size


def _single(task: Any, compute: torch.dtype) -> tuple[Any, Pass, Shape]:
    """A text or image model with its adapter."""
    from transformers import AutoConfig

    recipe, folder = task.recipe, str(box(BOX_MODEL))
    trusted = {"trust_remote_code": recipe.model.trust_remote_code}
    labels = {"num_labels": len(task.spec.data.labels)} if len(task.spec.data.labels) > 1 else {}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **trusted, **labels)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if recipe.task in HEADED and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if recipe.model.attn_implementation == "eager":
        config._attn_implementation = "eager"
    weights = torch.float32 if recipe.peft.method == "full" else compute
    weights = base_model.DTYPES.get(recipe.model.dtype, weights)
    model = task.auto_class.from_config(config, dtype=weights, **trusted)
    model.new_modules = _heads(model) if recipe.task in HEADED else []
    adapted = base_model.adapt(recipe, model, task.adapter_type)
    if recipe.peft.method != "full":
        _as_float(adapted)
    return adapted.train(), *_row(task, adapted, config)


def _heads(model: Any) -> list[str]:
    own = ((name, module) for name, module in model.named_children() if name != model.base_model_prefix)
    return [name for name, module in own if any(True for _ in module.parameters())]


def _as_float(model: Any) -> None:
    """As `begin_adapter` does."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _row(task: Any, model: Any, config: Any) -> tuple[Pass, Shape]:
    """A row of the task's largest size: what computes it, and its shape."""
    recipe = task.recipe
    if recipe.kind == "image-classification":
        height, width = _sides(config)
        channels = getattr(config, "num_channels", 3)
        forward = lambda rows: model(pixel_values=torch.zeros(rows, channels, height, width))  # noqa: E731
        return forward, {"tokens": 1, "unit": "images"}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = recipe.data.max_length + getattr(getattr(recipe, "grpo", None), "max_completion_length", 0)
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    shape: Shape = {"tokens": length}
    if config.is_encoder_decoder:
        target = recipe.data.max_target_length if recipe.task == "seq2seq" else length
        shape |= {"vocabulary": text.vocab_size, "logits": target} if recipe.task == "seq2seq" else {}
        return lambda rows: model(input_ids=_ids(rows, length), decoder_input_ids=_ids(rows, target)), shape
    if recipe.task in ("sft", "preference", "grpo", "masked-lm"):
        answers = _answers(recipe)
        shape |= {"tokens": answers * length, "vocabulary": text.vocab_size, "logits": answers * length}
        shape |= {"cache": _cache(text)}
        return lambda rows: model(input_ids=_ids(answers * rows, length)), shape
    return lambda rows: model(input_ids=_ids(rows, length)), shape


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.ones(rows, length, dtype=torch.long)


def _sides(config: Any) -> tuple[int, int]:
    """Height and width of an image, in pixels; 224 where the model takes any."""
    side = getattr(config, "image_size", None) or 224
    return (int(side[0]), int(side[1])) if isinstance(side, list | tuple) else (int(side), int(side))


def _answers(recipe: Any) -> int:
    """Sequences of a row: the better and the worse answer."""
    return 2 if recipe.task == "preference" and recipe.preference.method != "kto" else 1


def _cache(text: Any) -> int:
    """Bytes of keys and values that a token leaves while text is generated."""
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(4 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width)


def _denoiser(task: Any, compute: torch.dtype) -> tuple[Any, Pass, Shape]:
    """A diffusion model's denoiser with its adapter, its images' latents and captions given."""
    import diffusers

    from trainbox.container.diffusion import Adapted

    folder, family, recipe = box(BOX_MODEL), task.family, task.recipe
    index = _read(folder / "model_index.json")
    cls = getattr(diffusers, index[family.denoiser][1])
    denoiser = cls.from_config(cls.load_config(str(folder / family.denoiser))).to(compute).requires_grad_(False)
    others = _other_parts(folder, index, family.denoiser)
    trained = family.text_encoders if recipe.diffusion.train_text_encoders else ()
    encoders = {name: others[name].to(compute).requires_grad_(False) for name in trained}
    model = task._adapt(Adapted(family, denoiser, encoders, compute))
    _as_float(model)
    channels, side = _latents(folder, max(recipe.data.resolutions))
    tokens = TEXT_TOKENS.get(family.pipeline.__name__, 77)

    def forward(rows: int) -> Any:
        level = torch.zeros(rows, dtype=torch.long if family.denoiser == "unet" else torch.float32)
        return model(torch.zeros(rows, channels, side, side), level, _conditions(denoiser.config, rows, tokens))

    count = sum(p.numel() for name, part in others.items() if name not in trained for p in part.parameters())
    return model, forward, {"tokens": 1, "unit": "images", "other_parts": count}


def _latents(folder: Path, pixels: int) -> tuple[int, int]:
    """Channels and side of an image's latents."""
    vae = _read(folder / "vae" / "config.json")
    return vae.get("latent_channels", 4), pixels // 2 ** (len(vae.get("block_out_channels", (1,))) - 1)


def _conditions(config: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    width = next(
        config[key] for key in ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim") if config.get(key)
    )
    found = {"text": torch.zeros(rows, tokens, width)}
    if config.get("pooled_projection_dim"):
        found["pooled"] = torch.zeros(rows, config["pooled_projection_dim"])
    if config.get("projection_class_embeddings_input_dim"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        found |= {"pooled": torch.zeros(rows, pooled), "time_ids": torch.zeros(rows, 6)}
    return found


def _other_parts(folder: Path, index: dict[str, Any], denoiser: str) -> dict[str, Any]:
    """VAE and text encoders."""
    import diffusers
    import transformers

    found = {}
    for part, kind in index.items():
        if part == denoiser or not isinstance(kind, list) or not (folder / part / "config.json").exists():
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(kind[0])
        if cls := getattr(library, str(kind[1]), None):
            path = str(folder / part)
            found[part] = (
                cls.from_config(cls.load_config(path))
                if library is diffusers
                else cls(cls.config_class.from_pretrained(path))
            )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be sized: {path.name} cannot be read: {error}", place=str(path)) from None
    return dict(found)


# What it holds


def _parameters(model: Any) -> Shape:
    """Counts: all, trained, and those in linear layers that qlora would quantise."""
    inner = getattr(model, "denoiser", None) or base_model.without_adapter(model)
    sizes = [
        module.weight.numel() for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and not _is_kept(name)
    ]  # fmt: skip
    return {
        "architecture": type(inner).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "quantisable": sum(sizes),
        "largest_matrix": max(sizes, default=0),
        "gathered": _gathered(inner),
    }


def _gathered(model: Any) -> int:
    """Parameters outside the layers, and of two layers: one is computed while the next one is gathered."""
    if not isinstance(model, PreTrainedModel):
        return 0
    layers = [_size(module) for _, module in sharding.layers(model)]
    return _size(model) - sum(layers) + 2 * max(layers, default=0)


def _size(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _is_kept(name: str) -> bool:
    """Heads and outputs stay as they are in a 4-bit base, and adapters are none of it."""
    return "lora_" in name or bool({*name.split(".")} & {*base_model.HEADS, "modules_to_save"})


# What a row keeps and costs


def _activations(model: Any, forward: Pass, device: str, compute: torch.dtype) -> Shape:
    """Bytes kept for the backward pass and operations forward, of a row; one and two tell what is the same for all."""
    with FakeTensorMode(), torch.device(device), _mixed(device, compute):
        _make_fake(model, device)
        watched = _Kept(model)
        with _fused_attention(watched):
            one, two = watched.of(forward, 1), watched.of(forward, 2)
    row = {name: two[name] - one[name] for name in one}
    return {
        "saved": row["saved"],
        "saved_checkpointed": row["saved_checkpointed"],
        "recomputed": row["recomputed"],
        "fixed": one["saved"] - row["saved"],
        "layers": watched.layers,
        "flops": row["flops"],
        "convolutions": row["convolutions"],
        "basis": "one row's forward pass on fake tensors",
    }


def _make_fake(model: Any, device: str) -> None:
    """Give every parameter and buffer the device. Those that are tied stay so."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
            if tensor is not None:
                module._parameters[name] = made[id(tensor)]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    for name, prompt in getattr(model, "prompt_tokens", {}).items():  # of prefix-tuning
        model.prompt_tokens[name] = torch.empty(prompt.shape, dtype=prompt.dtype, device=device)


@contextlib.contextmanager
def _mixed(device: str, compute: torch.dtype) -> Iterator[None]:
    """Autocast; torch's own context refuses a device that is not there."""
    if compute == torch.float32:
        yield
        return
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, compute)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """Attention as a GPU's fused kernel does it: it keeps its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """An output of the right shape; in memory, a token's heads lie side by side."""
        *batch, heads, length, _ = query.shape
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Never asked for."""
        raise NotImplementedError


@contextlib.contextmanager
def _fused_attention(watched: _Kept) -> Iterator[None]:
    # What torch chooses depends on the machine: without a GPU, the formula that keeps a number for each two tokens.
    own = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, is_causal: bool = False, **__: Any
    ) -> Any:
        pairs = query.shape[:-1].numel() * key.shape[-2] / (2 if is_causal else 1)
        watched.flops += int(2 * pairs * (query.shape[-1] + value.shape[-1]))
        return _Attention.apply(query, key, value, attn_mask)

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


Storages = dict[Any, int]
"""Bytes by the memory that they lie in."""


class _Kept(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations, and what autograd keeps of a forward pass, the model's own weights left out.

    Of layers that are alike the first is walked, the others count the same.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._weights = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        _intercept(model, self._recomputed)

    def _begin(self) -> None:
        self.flops = self.convolutions = self.layers = self._largest = 0
        self._outside: Storages = {}
        self._inputs: Storages = {}
        self._inside: Storages = {}
        self._alike: dict[Any, tuple[Storages, list[Any], tuple[int, int], Any]] = {}
        self._alive: list[Any] = []  # else another tensor would come to lie in the same place

    def of(self, forward: Pass, rows: int) -> dict[str, int]:
        """Bytes, all of it and with gradient checkpointing, those of the largest layer; and operations."""
        self._begin()
        with self, self._into(self._outside):
            out = forward(rows)
        del out
        return {
            "saved": sum({**self._outside, **self._inside}.values()),
            "saved_checkpointed": sum({**self._outside, **self._inputs}.values()),
            "recomputed": self._largest,
            "flops": self.flops,
            "convolutions": self.convolutions,
        }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operations of products and convolutions, as torch's own counter does."""
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            if function._overloadpacket is torch.ops.aten.convolution:
                self.convolutions += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _recomputed(self, function: Any, *args: Any, **named: Any) -> Any:
        """In place of torch's checkpoint: the same pass, its inputs and what it keeps counted apart."""
        inputs = list(_tensors([args, named, getattr(function, "keywords", {})]))
        for tensor in inputs:
            self._keep(self._inputs, tensor)
        kind = _kind(function, inputs)
        self.layers += 1
        if kind not in self._alike:
            before, store = (self.flops, self.convolutions), dict[Any, int]()
            with self._into(store):
                out = function(*args, **named)
            new = (self.flops - before[0], self.convolutions - before[1])
            self._alike[kind] = store, inputs, new, out
            self._inside |= store
        else:
            store, first, flops, out = self._alike[kind]
            places = {_storage(old): _storage(new) for old, new in zip(first, inputs, strict=True)}
            self._inside |= {places.get(key, (self.layers, key)): size for key, size in store.items()}
            self.flops, self.convolutions = self.flops + flops[0], self.convolutions + flops[1]
            out = _another(out)
        own = {_storage(tensor) for tensor in self._alike[kind][1]}
        self._largest = max(self._largest, sum(size for key, size in store.items() if key not in own))
        return out

    def _into(self, store: Storages) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._keep(store, tensor), lambda tensor: tensor)

    def _keep(self, store: Storages, tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in self._weights:
            store[_storage(tensor)] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor)
        return tensor


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _kind(function: Any, inputs: list[torch.Tensor]) -> Any:
    """The same for layers of the same structure with inputs of the same shapes."""
    bound = [function, *getattr(function, "args", ()), getattr(function, "__self__", None)]
    module = next((each for each in bound if isinstance(each, torch.nn.Module)), None)
    if module is None:  # a function that does not say what it calls
        return object()
    trained = [(parameter.shape, parameter.requires_grad) for parameter in module.parameters()]
    return str(module), str(trained), str([(each.shape, each.dtype, each.requires_grad) for each in inputs])


def _another(value: Any) -> Any:
    """The like of what a layer gave."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value).requires_grad_(value.requires_grad).clone()
    if isinstance(value, list | tuple):
        return type(value)(_another(each) for each in value)
    return value


def _intercept(model: Any, checkpoint: Callable[..., Any]) -> None:
    """Turn gradient checkpointing on, as the trainer does, with another function to do it."""
    if hasattr(model, "denoiser"):
        model.denoiser.enable_gradient_checkpointing(checkpoint)
        return
    base = base_model.without_adapter(model)
    if not getattr(base, "supports_gradient_checkpointing", False):
        return
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if base is not model:
        base.enable_input_require_grads()
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = checkpoint


def _by_rule(model: Any, facts: Shape, why: str) -> Shape:
    """34 bytes a token and hidden number of a layer (https://arxiv.org/abs/2205.05198), 2 operations a weight."""
    config = base_model.without_adapter(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, hidden = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if missing := [name for name, value in (("num_hidden_layers", layers), ("hidden_size", hidden)) if not value]:
        fault = f"cannot be sized: its configuration has no {', '.join(missing)}, and without weights it fails: {why}"
        raise ConfigError(fault, place="model.name")
    used = facts["parameters"]
    if experts := getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        apart = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        used += apart * getattr(text, "num_experts_per_tok", experts) // experts - apart
    one = 34 * facts["tokens"] * hidden
    return {
        "saved": one * layers,
        "saved_checkpointed": 2 * facts["tokens"] * hidden * layers,
        "recomputed": one,
        "fixed": 0,
        "layers": layers,
        "flops": 2 * used * facts["tokens"],
        "basis": f"by rule: its forward pass needs real rows ({why.partition(':')[0]})",
    }
