"""``from_pretrained`` and ``save_pretrained``: transformers' names over this project's own reader and writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen2Config

from qwen2_npu import checkpoint
from qwen2_npu.compat import set_torch_dtype
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import Optimizations

if TYPE_CHECKING:
    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM


class CheckpointIO:
    """Mixed into Qwen2ForCausalLM."""

    @classmethod
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: torch.device | str | None = None,
        optimizations: Optimizations | None = None,
        weights_file: str | None = None,
        config: Qwen2Config | None = None,
        low_cpu_mem_usage: bool = True,
        trust_remote_code: bool = False,
    ) -> Qwen2ForCausalLM:
        """Load an ordinary Hugging Face folder, fusing weights while they are read: never two copies of one in memory.

        Args:
            pretrained_model_name_or_path: a local folder; nothing is downloaded.
            dtype: of the weights in memory; "auto" or None: as stored. ``torch_dtype`` is its older name.
            device: where to; ``device_map`` is accepted with one device. Default cpu.
            weights_file: a file of the folder in another format than safetensors (pytorch_model.bin), by name only.
            config: instead of the folder's config.json.
            low_cpu_mem_usage: accepted; loading always is.
            trust_remote_code: accepted; no remote code is ever run.

        Raises:
            CheckpointError: what is wrong with the folder, naming file and tensor.
        """
        if device_map == "auto":
            device_map = None
        if isinstance(device_map, dict):
            raise UnsupportedError(
                f"device_map={device_map!r}: pass one device, device='npu:0'; see tensor parallelism for more"
            )
        source = checkpoint.open_checkpoint(pretrained_model_name_or_path, config=config, weights_file=weights_file)
        model: Any = checkpoint.build(
            lambda: cls(source.config, optimizations),
            source,
            dtype=checkpoint.parse_dtype(dtype if dtype is not None else torch_dtype),
            device=torch.device(device or device_map or "cpu"),
        )
        generation_config = source.generation_config()
        if generation_config is not None:
            model.generation_config = generation_config
        model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        loaded: Qwen2ForCausalLM = model
        return loaded

    @classmethod
    def from_state_dict(
        cls: Any,
        config: Qwen2Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        optimizations: Optimizations | None = None,
    ) -> Qwen2ForCausalLM:
        """The model with the weights of a stock state dict (names of the stock class).

        Raises:
            CheckpointError: missing, unexpected or mis-shaped tensors.
        """
        model: Qwen2ForCausalLM = checkpoint.build(
            lambda: cls(config, optimizations),
            checkpoint.StateDictSource(config, state_dict),
            dtype=dtype,
            device=torch.device(device or "cpu"),
        )
        return model

    def save_pretrained(
        self: Any, save_directory: str | Path, *, max_shard_size: int | str = "5GB", safe_serialization: bool = True
    ) -> None:
        """Write the ordinary Hugging Face layout, tensors bit-identical to what was loaded (in the dtype held).

        Every file is written beside its place and moved there when complete: a failure leaves what was there before.

        Raises:
            CheckpointError: the folder cannot be written (disk full, no permission).
        """
        if not safe_serialization:
            raise UnsupportedError(
                "safe_serialization=False would write pickle; checkpoints are written as safetensors only"
            )
        set_torch_dtype(self.config, self.dtype)
        checkpoint.save(self, Path(save_directory), max_shard_size=max_shard_size)

    def stock_state_dict(self: Any) -> dict[str, torch.Tensor]:
        """The weights under the stock class's names: fused ones as views of their parts, tied ones once."""
        return checkpoint.stock_state_dict(self)
