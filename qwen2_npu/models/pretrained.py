"""``from_pretrained`` and ``save_pretrained``: transformers' names over this project's own reader and writer."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, Qwen2Config

from qwen2_npu.checkpoint import quantized, sources, weights
from qwen2_npu.checkpoint.adapter import FLOAT_FIRST, AdaptedSource, base_and_adapter
from qwen2_npu.checkpoint.configuration import read_config, read_generation_config
from qwen2_npu.checkpoint.experts import one_by_one
from qwen2_npu.checkpoint.folders import locked
from qwen2_npu.checkpoint.naming import as_stock
from qwen2_npu.checkpoint.shards import ADAPTER_FILE
from qwen2_npu.compat import CONFIGURATIONS, set_torch_dtype, torch_dtype_of
from qwen2_npu.devices import usable
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.agreement import agree, fingerprint
from qwen2_npu.parallel.collectives import current

ACCELERATOR_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""transformers' ways to spread a model over its accelerators. Here it goes to one: the current, or else the CPU."""


class Refused(NamedTuple):
    """A keyword of transformers that has no effect here: the way out, and the values that ask for none."""

    way_out: str
    harmless: tuple[Any, ...] = (None, False, "")


LOADING_HARMLESS = (
    *("cache_dir", "force_download", "local_files_only", "mirror", "proxies", "resume_download", "revision", "token"),
    *("tqdm_class", "trust_remote_code", "use_auth_token", "_commit_hash", "_from_auto", "_from_pipeline"),
    *("disable_mmap", "low_cpu_mem_usage", "offload_buffers", "offload_folder", "offload_state_dict", "weights_only"),
    *("adapter_kwargs", "adapter_name", "allow_all_kernels", "use_flash_attention_2", "_fast_init"),
)
"""About downloads, remote code, and how the stock class reads and computes: there is nothing of it here."""

SAVING_HARMLESS = ("save_peft_format", "save_original_format", "token", "use_auth_token")

_NO_QUANTISATION = Refused(
    "load the checkpoint in bf16, fp16 or fp32, or write one of 8-bit weights with `qwen2-npu quantize` and load that"
)
_ONE_DEVICE = Refused(
    "one process uses one device; choose it with device='npu:0', or start a process per card (docs/parallel.md)"
)
_NO_OTHER_FORMAT = Refused("only PyTorch weights are read; convert them with transformers")
_NO_KERNELS = Refused("which operators compute is chosen by optimizations=Optimizations(...)")

LOADING_REFUSED: dict[str, Refused] = {
    "attn_implementation": Refused(
        _NO_KERNELS.way_out, harmless=(None, "eager", "sdpa", "flash_attention_2", "flash_attention_3")
    ),
    "experts_implementation": _NO_KERNELS,
    "use_kernels": _NO_KERNELS,
    "kernel_config": _NO_KERNELS,
    "fusion_config": _NO_KERNELS,
    "quantization_config": _NO_QUANTISATION,
    "load_in_8bit": _NO_QUANTISATION,
    "load_in_4bit": _NO_QUANTISATION,
    "max_memory": _ONE_DEVICE,
    "tp_plan": Refused("how a model is cut follows from tp_size"),
    "device_mesh": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "from_tf": _NO_OTHER_FORMAT,
    "from_flax": _NO_OTHER_FORMAT,
    "gguf_file": _NO_OTHER_FORMAT,
    "use_safetensors": Refused("name the pickled file: weights_file='pytorch_model.bin'", harmless=(None, True)),
    "variant": Refused("name the file: weights_file='model.VARIANT.safetensors'"),
    "_adapter_model_path": Refused("a LoRA adapter is merged with adapter=FOLDER_OF_THE_ADAPTER"),
    "key_mapping": Refused("rename the tensors and pass them to from_state_dict"),
    "state_dict": Refused("pass it to from_state_dict"),
    "ignore_mismatched_sizes": Refused("a tensor that does not fit is an error here; correct the checkpoint"),
    "output_loading_info": Refused("tensors that are missing or do not fit are errors here, so there is none to give"),
}

SAVING_REFUSED: dict[str, Refused] = {
    "safe_serialization": Refused("that would write pickle; checkpoints are written as safetensors only", (None, True)),
    "push_to_hub": Refused("nothing is uploaded; save to a folder and upload it with `hf upload`"),
    "state_dict": Refused("the model's own weights are saved; make a model of others with from_state_dict"),
    "save_function": Refused("leave it out; checkpoints are written as safetensors only"),
    "variant": Refused("leave it out and choose another folder"),
    "distributed_checkpoint": Refused("leave it out; a model of tp_size=1 writes the whole checkpoint"),
}


class CheckpointIO:
    """Mixed into the models.

    Attributes:
        head: the names of the parameters that a model has beyond the network.
    """

    head: tuple[str, ...] = ()

    @classmethod
    def of_kind(cls: Any, config: Any) -> Any:
        """This class, or the one for mixtures of experts where ``config`` describes one.

        Raises:
            UnsupportedError: there is none with this head.
        """
        if isinstance(config, cls.config_class):
            return cls
        from qwen2_npu.models.qwen2_moe import Qwen2MoeForCausalLM

        if not issubclass(Qwen2MoeForCausalLM, cls):
            raise UnsupportedError(
                f"{cls.__name__} of a mixture of experts (model_type={config.model_type!r}) is not served: load it "
                "with Qwen2ForCausalLM, whose get_decoder() gives the hidden states"
            )
        return Qwen2MoeForCausalLM

    @classmethod
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: torch.device | str | int | Mapping[str, Any] | None = None,
        optimizations: Optimizations | None = None,
        weights_file: str | None = None,
        adapter: str | Path | bool | None = None,
        config: Qwen2Config | str | Path | None = None,
        generation_config: GenerationConfig | None = None,
        subfolder: str = "",
        tp_size: int | None = None,
        tp_rank: int | None = None,
        assume_tp: int | None = None,
        **others: Any,
    ) -> Any:
        """Load an ordinary Hugging Face folder, fusing weights while they are read: never two copies of one in memory.

        A folder that ``qwen2-npu merge-qkv`` wrote is loaded as well, by one process or by as many as it is merged for.
        One that ``qwen2-npu quantize`` or llm-compressor wrote runs in 8 bits unless ``optimizations`` says otherwise
        (docs/quantization.md).

        Args:
            pretrained_model_name_or_path: a local folder; nothing is downloaded.
            dtype: of the weights in memory; "auto" or None: what config.json says, or else as stored. ``torch_dtype``
                is its older name.
            device: where to, one device. Default: torch's, which is the CPU unless ``torch.set_default_device`` or
                ``with torch.device`` says another. ``device_map`` names it, too; "auto" is the accelerator, if any.
            weights_file: weights in another file than the usual safetensors ones, or the index of several; pickled
                weights (pytorch_model.bin) are read by name only.
            adapter: the folder of a LoRA adapter, as peft saves it, to merge into the weights. Where the model's own
                folder holds one: that folder again, or False to leave it out.
            config: instead of the folder's config.json; or the folder of another one.
            generation_config: instead of the folder's generation_config.json.
            subfolder: of the folder, where the checkpoint lies.
            tp_size: ranks that share the model, each holding its part; only that part is read. None for those of the
                process group, or one where there is none.
            tp_rank: which of them; None for that of this process.
            assume_tp: for a folder merged by the upstream guide's script, which records nothing: its ``tp_size``.
            others: fields of the configuration that take another value, ``use_cache=False`` (``num_hidden_layers=2``:
                the first two layers); and the remaining keywords of transformers, as far as they ask for nothing that
                there is not: see the tables of this module.

        Raises:
            CheckpointError: what is wrong with the folder, naming file and tensor.
            UnsupportedError: an adapter to 8-bit weights; a keyword, with its value, that would have to be ignored.
            TypeError: a keyword that is neither transformers' nor a field of the configuration.
        """
        changes = effective("from_pretrained", others, LOADING_HARMLESS, LOADING_REFUSED)
        if not isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            raise UnsupportedError(
                f"pretrained_model_name_or_path={pretrained_model_name_or_path!r}: pass a local folder; weights in "
                "memory are taken by from_state_dict"
            )
        folder = Path(pretrained_model_name_or_path, subfolder or "").expanduser()
        folder, lora = base_and_adapter(folder, adapter)
        target = one_device(device, device_map)
        ranks = current(tp_size, tp_rank, target)
        with locked(folder, shared=True):  # all files of one checkpoint, whoever is saving another
            settings = _configuration(folder if config is None else config, changes)
            source: sources.Source = sources.open_checkpoint(
                folder,
                config=settings,
                weights_file=weights_file,
                assume_tp=assume_tp,
                tp_size=ranks.size,
                beside_adapter=True,
            )
            # Fewer layers may be asked for. In a folder, layers that its config.json does not have are an error.
            if "num_hidden_layers" in changes or isinstance(config, Qwen2Config):
                source = sources.FirstLayers(source, settings.num_hidden_layers)
            generation_config = generation_config or read_generation_config(folder, settings.vocab_size)
            files = {} if ranks.group is None else fingerprint(folder)
        if lora is not None:
            source = AdaptedSource(source, lora)
            if ranks.group is not None:
                files |= {f"the adapter's {name}": mark for name, mark in fingerprint(lora).items()}
        if ranks.group is not None:  # outside of the lock: ranks wait here for one another
            agree(files, way_out=f"copy one checkpoint to all nodes ({folder})")
        kind = cls.of_kind(source.config)
        model: Any = weights.build(
            lambda: kind(source.config, optimizations, ranks),
            source,
            dtype=sources.parse_dtype(dtype if dtype is not None else torch_dtype) or torch_dtype_of(settings),
            device=target,
            head=cls.head,
        )
        if generation_config is not None and cls.can_generate():
            model.generation_config = generation_config
        model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        return model

    @classmethod
    def from_state_dict(
        cls: Any,
        config: Qwen2Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        optimizations: Optimizations | None = None,
        tp_size: int | None = None,
        tp_rank: int | None = None,
    ) -> Any:
        """The model with the weights of a stock state dict (names of the stock class); see :meth:`from_pretrained`.

        Weights that are 8-bit integers by ``config.quantization_config`` are that in ``state_dict``: under the names
        of a file, or as ``stock_state_dict`` gives them.

        Raises:
            CheckpointError: missing, unexpected or mis-shaped tensors, or integers that ``config`` does not speak of.
        """
        target = one_device(device, None)
        ranks = current(tp_size, tp_rank, target)
        source = quantized.present(as_stock(sources.StateDictSource(config, one_by_one(state_dict))))
        kind = cls.of_kind(config)
        model: Any = weights.build(
            lambda: kind(source.config, optimizations, ranks),
            source,
            dtype=dtype,
            device=target,
            head=cls.head,
        )
        return model

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        **others: Any,
    ) -> None:
        """Write the ordinary Hugging Face layout, tensors bit-identical to what was loaded (in the dtype held).

        The folder loads as the checkpoint that was there or as the new one, whenever the process is killed or fails:
        see :mod:`qwen2_npu.checkpoint.saving`.

        Args:
            is_main_process: False where another process writes the same model: nothing is written then.
            others: the remaining keywords of transformers, as far as they ask for nothing that there is not.

        Raises:
            CheckpointError: the folder cannot be written (disk full, no permission).
            UnsupportedError: a keyword, with its value, that would have to be ignored.
            TypeError: a keyword that is not transformers'.
        """
        unknown = effective("save_pretrained", others, SAVING_HARMLESS, SAVING_REFUSED)
        if unknown:
            raise TypeError(f"save_pretrained() takes no argument {', '.join(unknown)}")
        self._check_whole("save_pretrained")
        if Path(save_directory, ADAPTER_FILE).exists():
            raise CheckpointError(
                f"{save_directory} holds an adapter ({ADAPTER_FILE}), which would be applied to the saved weights "
                "when they are loaded; choose another folder"
            )
        if not is_main_process:
            return
        set_torch_dtype(self.config, self.dtype)
        weights.save(self, Path(save_directory), max_shard_size=max_shard_size)

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """``torch.nn.Module.load_state_dict``, for what :meth:`state_dict` of a model with the same switches gave.

        Raises:
            UnsupportedError: ``state_dict`` has weights of the stock model that are fused here.
        """
        own = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        layout = weights.stock_layout(self)
        if (stock := next((name for name in state_dict if name in layout and name not in own), None)) is not None:
            raise UnsupportedError(
                f"load_state_dict(): {stock} is a weight of the stock model, and here it is rows of "
                f"{layout[stock].parameter}: make the model with Qwen2ForCausalLM.from_state_dict(config, state_dict)"
            )
        module: Any = super()
        return module.load_state_dict(state_dict, *args, **kwargs)

    def stock_state_dict(self: Any) -> dict[str, torch.Tensor]:
        """The weights under the stock class's names: fused ones as views of their parts, tied ones once; 8-bit ones as
        ``X.weight`` and ``X.weight_scale``.

        Raises:
            UnsupportedError: the model is one part of several, or holds an adapter of peft.
        """
        self._check_whole("stock_state_dict")
        return weights.stock_state_dict(self)

    # ---- peft ----------------------------------------------------------------------------------------------------
    def _no_adapter(self: Any) -> Any:
        """What ``peft_config`` is until peft sets it. peft asks for it before it puts in the first adapter.

        Raises:
            UnsupportedError: the products that adapters are for do not stand in this model one by one.
            AttributeError: they do.
        """
        self._check_adaptable("peft")
        raise AttributeError("peft_config")

    peft_config: Any = cached_property(_no_adapter)
    """Not a property, which could not be set; nothing is cached, since :meth:`_no_adapter` never returns."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for a model without fused products on one rank."""
        self._check_adaptable("load_adapter()")
        return super().load_adapter(*args, **kwargs)  # type: ignore[misc]

    def add_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for a model without fused products on one rank."""
        self._check_adaptable("add_adapter()")
        return super().add_adapter(*args, **kwargs)  # type: ignore[misc]

    def _check_adaptable(self: Any, what: str) -> None:
        if self.optimizations.scheme is not None:
            raise UnsupportedError(f"{what}: the weights of this model are 8-bit integers; {FLOAT_FIRST}")
        if self.optimizations.fused_qkv or self.optimizations.fused_gate_up or self.ranks.shard.size > 1:
            raise UnsupportedError(
                f"{what}: q, k, v, gate and up are fused or cut in this model, so that an adapter would reach only "
                "some of its products; load it merged with from_pretrained(FOLDER, adapter=FOLDER_OF_THE_ADAPTER), or "
                "use optimizations=Optimizations.none() on one rank"
            )

    def _check_whole(self: Any, function: str) -> None:
        if any(type(module).__module__.startswith("peft.") for module in self.modules()):
            raise UnsupportedError(
                f"{function}(): peft has put an adapter into this model; save the adapter with the PeftModel's "
                "save_pretrained, or take merge_and_unload()'s result"
            )
        shard = self.ranks.shard
        if shard.size > 1:
            raise UnsupportedError(
                f"{function}(): this is part {shard.rank} of {shard.size} of a model; load it with tp_size=1 to have "
                "all of it"
            )


def effective(
    function: str, given: Mapping[str, Any], harmless: Collection[str], refused: Mapping[str, Refused]
) -> dict[str, Any]:
    """The keywords in ``given`` that neither table knows.

    Raises:
        UnsupportedError: one is refused with the value it has.
    """
    for name, value in given.items():
        if name in refused and value not in refused[name].harmless:
            shown = " ".join(reprlib.repr(value).split())
            raise UnsupportedError(f"{function}({name}={shown}): {refused[name].way_out}")
    return {name: value for name, value in given.items() if name not in harmless and name not in refused}


def one_device(device: torch.device | str | int | None, device_map: Any) -> torch.device:
    """The one device that ``device`` and ``device_map`` stand for; torch's default device where neither is given.

    Raises:
        UnsupportedError: there are several, or it is not usable here.
    """
    if isinstance(device_map, str) and device_map in ACCELERATOR_MAPS:
        device_map = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    mapped = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    named = {str(each): each for each in (device, *mapped) if each is not None}
    if len(named) > 1:
        raise UnsupportedError(f"device={device!r}, device_map={device_map!r}: {_ONE_DEVICE.way_out}")
    if not named:
        default = torch.get_default_device()
        return usable(default, given_as=f"torch's default device is {str(default)!r}")
    return usable(next(iter(named.values())))


def _configuration(given: Qwen2Config | str | Path, changes: Mapping[str, Any]) -> Qwen2Config:
    """A configuration, or that of a folder with ``changes``, as transformers takes them.

    Raises:
        CheckpointError: the folder has none that is served.
        UnsupportedError: ``given`` is a configuration of another class.
        TypeError: a change of a field that there is not, or of a configuration that the caller has in hand.
    """
    if isinstance(given, (str, Path)):
        config = read_config(Path(given).expanduser(), **changes)
        unknown = [name for name in changes if not hasattr(config, name)]
        reason = "it is neither a keyword of transformers nor a field of config.json"
    elif isinstance(given, tuple(CONFIGURATIONS.values())):
        config, unknown = given, list(changes)
        reason = "with config= a Qwen2Config, set its fields in that"
    else:
        raise UnsupportedError(f"config={type(given).__name__}: pass a Qwen2Config, or a folder with a config.json")
    if unknown:
        raise TypeError(f"from_pretrained() takes no argument {', '.join(unknown)}: {reason}")
    return config
