"""``qwen2-npu quantize``: a checkpoint with 8-bit weights of one in floating-point numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from qwen2_npu.cli import options
from qwen2_npu.cli.merge_qkv import show, size

SCHEMES = {
    "w8a16": "8-bit weights; activations stay as they are",
    "w8a8": "8-bit weights and, while the model runs, activations quantised per token",
}


@click.command("quantize")
@options.model_path_option(required=True, help="Checkpoint folder to read. It is not changed.")
@click.option("--output-path", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder to write.")
@click.option(
    "--scheme",
    type=click.Choice(tuple(SCHEMES)),
    required=True,
    help="; ".join(f"{name}: {text}" for name, text in SCHEMES.items()) + ".",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="NAME",
    help="Linear layers to keep as they are, beside lm_head: a name or a part of names (down_proj, layers.0), or a "
    "pattern ('re:.*o_proj'). May be given several times.",
)
@click.option("--dry-run", is_flag=True, help="Show the files and their sizes, and write nothing.")
def command(model_path: Path, output_path: Path, scheme: str, ignore: tuple[str, ...], dry_run: bool) -> None:
    """Write a checkpoint with 8-bit weights: one symmetric scale per output channel, no data needed.

    The folder is in the format of compressed-tensors, which vLLM and transformers read, too. Embedding, norms, biases
    and lm_head stay as they are. from_pretrained runs the folder in 8 bits (docs/quantization.md).

    A command that was interrupted goes on where it stopped when it is run again.
    """
    from rich.console import Console

    options.import_first("qwen2_npu.checkpoint.quantizing")
    options.quiet_transformers()
    from qwen2_npu.checkpoint import merging
    from qwen2_npu.checkpoint.quantizing import plan_quantize

    plan = plan_quantize(model_path, output_path, scheme=scheme, ignore=ignore)
    folder = plan.folder
    if dry_run:
        merging.check(folder)
        show(folder)
    else:
        with options.progress(Console(), "checking") as progress:
            merging.run(folder, progress)
        if folder.left_out:
            click.echo(f"Not copied: {', '.join(folder.left_out)}")
    click.echo(f"{scheme}: {len(plan.quantised)} linear layers in 8 bits; kept as they are: {_counted(plan.kept)}")
    click.echo(f"Weights: {size(plan.before)} before, {size(plan.after)} after ({plan.after / plan.before:.0%})")
    if dry_run:
        click.echo(f"Free on that disk: {size(merging.free_bytes(folder.output))}. Nothing was written.")
        return
    click.echo(
        f"Written and compared with {folder.source}: {folder.output}, {len(folder.files)} files, {size(folder.size)}"
    )


def _counted(modules: Sequence[str]) -> str:
    """Kinds of modules, and how many there are of each."""
    kinds = Counter(module.rsplit(".", 1)[-1] for module in modules)
    return ", ".join(kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.items())
