"""``qwen2-npu merge-qkv``: q, k and v of every layer in one tensor on disk, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2_npu.cli import options

if TYPE_CHECKING:
    from qwen2_npu.checkpoint.folder_plan import FolderPlan


@click.command("merge-qkv")
@options.model_path_option(required=True, help="Checkpoint folder to read. It is not changed.")
@click.option("--output-path", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder to write.")
@click.option("--tp-size", type=click.IntRange(1), metavar="N", help="Ranks to merge for.  [default: 1]")
@click.option("--unmerge", is_flag=True, help="Restore the original checkpoint of a merged folder.")
@options.assume_tp_option()
@click.option("--dry-run", is_flag=True, help="Show the files and their sizes, and write nothing.")
def command(
    model_path: Path, output_path: Path, tp_size: int | None, unmerge: bool, assume_tp: int | None, dry_run: bool
) -> None:
    """Merge q, k and v of every layer into one tensor, interleaved for tensor-parallel ranks; or undo that.

    Merged folders are for this project: transformers and other programs do not read them. --unmerge restores the
    original bit for bit. Merging is not needed to run fused_qkv: ordinary folders are fused while they are loaded.

    A command that was interrupted goes on where it stopped when it is run again.
    """
    if assume_tp is not None and not unmerge:
        raise click.UsageError("--assume-tp needs --unmerge: it says how a folder was merged; to merge, give --tp-size")
    from rich.console import Console

    options.import_first("qwen2_npu.checkpoint.merging")
    options.quiet_transformers()
    from qwen2_npu.checkpoint import merging
    from qwen2_npu.checkpoint.merge_plan import plan_merge, plan_unmerge

    plan = (
        plan_unmerge(model_path, output_path, assume_tp=assume_tp, tp_size=tp_size)
        if unmerge
        else plan_merge(model_path, output_path, tp_size=tp_size or 1)
    )
    if dry_run:
        merging.check(plan)
        show(plan)
        click.echo(f"Free on that disk: {size(merging.free_bytes(plan.output))}. Nothing was written.")
        return
    with options.progress(Console(), "checking") as progress:
        merging.run(plan, progress)
    if plan.left_out:
        click.echo(f"Not copied: {', '.join(plan.left_out)}")
    click.echo(f"Written and compared with {plan.source}: {plan.output}, {len(plan.files)} files, {size(plan.size)}")


def show(plan: FolderPlan) -> None:
    """Files, bytes, and what each rank reads."""
    width = max(len(file.name) for file in plan.shards)
    for file in plan.shards:
        click.echo(f"{file.name:<{width}}  {size(file.size)}")
    others = (*plan.others, *plan.last)
    click.echo(f"{len(others)} other files: {size(sum(file.size for file in others))}")
    click.echo(f"To be written to {plan.output}: {len(plan.files)} files, {size(plan.size)}")
    for read in sorted(set(plan.read_by_rank)):
        ranks = [rank for rank, each in enumerate(plan.read_by_rank) if each == read]
        said = f"Each of {len(ranks)} ranks" if len(ranks) > 1 else f"Rank {ranks[0]}"
        click.echo(f"{said} reads {size(read)} of weights")
    if plan.left_out:
        click.echo(f"Not copied: {', '.join(plan.left_out)}")


def size(count: int) -> str:
    """A number of bytes in words."""
    unit, factor = next((each for each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= each[1]), ("bytes", 1.0))
    return f"{count / factor:.1f} {unit}" if factor > 1 else f"{count} {unit}"
