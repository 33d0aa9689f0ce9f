"""A trained transformer and the parts it came with -> the folder that `export.py` describes.

`train.py` calls it when the training ends, the command `export.py` with a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.training.parallel import Engine

logger = logging.getLogger("longcat_video_fft")

LAYOUTS = ("both", "diffusers", "official")
COMPANIONS = ("vae", "text_encoder", "tokenizer")
MODULE = "longcat_video_transformer"  # of the code in transformer/


def export_checkpoint(
    checkpoint: str, config: TrainConfig, folder: Path, *, layout: str, use_ema: bool
) -> None:
    """Reads one checkpoint of a training, of whatever number of devices, into host memory as bf16
    (27 GB for the released config), and writes the export.

    Raises:
        ValueError: no such checkpoint, another model's, one without averages, or no companions.
    """
    from longcat_video_fft.training.checkpoint import find_checkpoint

    source = find_checkpoint(checkpoint, Path(config.output_dir))
    if source is None:
        raise ValueError(f"checkpoint={checkpoint}: {config.output_dir} holds no finished one.")
    companions = find_companions(config, folder)
    model = read_checkpoint(source, use_ema=use_ema)
    logger.info("read %s%s", source, ", the averaged weights" if use_ema else "")
    write_export(model, config, folder, companions, layout=layout, is_main=True)


def read_checkpoint(source: Path, *, use_ema: bool) -> Any:
    """Reads the transformer of a checkpoint into host memory, in bf16, by this process alone."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    from longcat_video_fft.model.loading import verify_loaded
    from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
    from longcat_video_fft.training.checkpoint import read_trainer_state

    identity = read_trainer_state(source)["identity"]
    if use_ema and not identity["has_ema"]:
        raise ValueError(f"{source}: holds no averaged weights (ema_decay was null). Omit --ema.")
    with torch.device("meta"):
        model: Any = LongCatVideoTransformer3DModel.from_config(identity["transformer"])
    model.to(torch.bfloat16).to_empty(device="cpu")
    params = {name: param.detach() for name, param in model.named_parameters()}
    state = {"ema": {"averages": params}} if use_ema else {"model": params}
    load(state, checkpoint_id=source / "state", no_dist=True)  # in place, whatever the dtype there
    verify_loaded(model)
    return model


def export_model(engine: Engine, config: TrainConfig, folder: Path, layout: str = "both") -> None:
    """Writes the export of a model in training; all processes call it. The averaged weights are
    taken where there are any."""
    from longcat_video_fft.training.distributed import is_main_process

    average = engine.ema.swapped(engine.module) if engine.ema else contextlib.nullcontext()
    with average:
        write_export(
            engine.module,
            config,
            folder,
            find_companions(config, folder),
            layout=layout,
            is_main=is_main_process(),
        )


def find_companions(config: TrainConfig, folder: Path) -> Path:
    """Returns the folder of the model that is trained, with all that an export to `folder` takes
    from it.

    Raises:
        ValueError: a part is missing, or the export would overwrite that model.
    """
    from longcat_video_fft.options.hub import resolve_artifact

    root = resolve_artifact(
        config.model,
        field="pretrained_model_name_or_path",
        allow_patterns=(*(f"{name}/*" for name in COMPANIONS), "scheduler/*"),
    )
    missing = [name for name in COMPANIONS if not (root / name).is_dir()]
    if missing:
        raise ValueError(
            f"pretrained_model_name_or_path={config.model}: {root} has no {', '.join(missing)}. It "
            f"must be laid out as the released LongCat-Video: {', '.join(COMPANIONS)}, dit."
        )
    if folder.exists() and folder.samefile(root):
        raise ValueError(f"{folder}: holds the model that the training begins from; give another.")
    return root


def write_export(
    module: Any,
    config: TrainConfig,
    folder: Path,
    companions: Path,
    *,
    layout: str,
    is_main: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the export. All processes call it, since they gather the weights together; the main
    one writes.

    Each part is written atomically, and model_index.json last.

    Raises:
        ValueError: the disk is full.
    """
    import torch

    from longcat_video_fft.model.loading import save_transformer
    from longcat_video_fft.options.hub import check_free_disk

    wanted = {"diffusers": ["transformer"], "official": ["dit"], "both": ["transformer", "dit"]}
    folders = [folder / name for name in wanted[layout]]
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").unlink(missing_ok=True)
        if folder.stat().st_dev != companions.stat().st_dev:  # nothing can be linked
            size = sum(p.stat().st_size for n in COMPANIONS for p in (companions / n).rglob("*"))
            check_free_disk(folder, size, what="The export's VAE and text encoder")
    save_transformer(module, folders[0], dtype=dtype or torch.bfloat16, is_main=is_main)
    if not is_main:
        return
    for other in folders[1:]:
        copy_folder(folders[0], other)
    for name in COMPANIONS:
        copy_folder(companions / name, folder / name)
    write_scheduler(folder / "scheduler", companions / "scheduler", shift=config.flow_shift)
    if layout != "official":
        write_code(folder)
        write_index(folder, config)


def copy_folder(source: Path, target: Path) -> None:
    """Replaces a folder atomically; links files where both share a disk, else copies them."""
    if target.exists() and target.samefile(source):
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def link_or_copy(source: str, target: str) -> None:
    real = os.path.realpath(source)  # the hub's cache holds links
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)


def write_scheduler(folder: Path, source: Path, *, shift: float) -> None:
    """Writes the official scheduler, with the shift that the training's timesteps had."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler as Scheduler,
    )

    options: Any = Scheduler.load_config(source) if source.is_dir() else {}
    scheduler: Any = Scheduler.from_config(options, shift=shift)
    scheduler.save_pretrained(folder)


def write_code(folder: Path) -> None:
    """Writes pipeline.py, and the transformer's code in one file, as diffusers wants it: of a
    component's folder it copies one module from disk and fetches one from the hub."""
    here = Path(__file__).parents[1] / "model"
    shutil.copyfile(here / "pipeline.py", folder / "pipeline.py")
    code = join_modules(here / "transformer.py", [here / "attention.py", here / "layers.py"])
    (folder / "transformer" / f"{MODULE}.py").write_text(code, encoding="utf-8")


def join_modules(module: Path, used: list[Path]) -> str:
    """Returns the source of a module with those that it imports from this folder put in its place.

    Raises:
        ValueError: it imports another module of this folder.
    """
    import ast

    package = __name__.partition(".")[0]
    names = {f"{package}.model.{path.stem}" for path in used}
    bodies = []
    for path in [*used, module]:
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        tree = ast.parse(source)
        for node in tree.body:
            is_import = isinstance(node, ast.ImportFrom)
            if is_import and node.module in {*names, "__future__"}:  # pyright: ignore
                lines[node.lineno - 1 : node.end_lineno] = [""] * (
                    (node.end_lineno or node.lineno) - node.lineno + 1
                )
        bodies.append("\n".join(lines).strip())
        left = [n for n in ast.walk(ast.parse(bodies[-1])) if isinstance(n, ast.ImportFrom)]
        others = [n.module for n in left if n.module and n.module.partition(".")[0] == package]
        if others:
            raise ValueError(f"{path}: imports {others[0]}, which does not ship with an export.")
    return "from __future__ import annotations\n\n" + "\n\n\n".join(bodies) + "\n"


def write_index(folder: Path, config: TrainConfig) -> None:
    """Writes model_index.json: which class of which library each part is."""
    import transformers
    from diffusers import __version__ as diffusers_version
    from transformers import AutoTokenizer

    tokenizer = type(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    name = tokenizer.__name__
    index = {
        "_class_name": ["pipeline", "LongCatVideoPipeline"],
        "_diffusers_version": diffusers_version,
        "max_sequence_length": config.max_text_tokens,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": [
            "transformers",
            name if hasattr(transformers, name) else "PreTrainedTokenizerFast",
        ],
        "transformer": [MODULE, "LongCatVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    partial = folder / "model_index.json.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "model_index.json")
