"""Fine-tunes LongCat-Flash-Omni on folders of video, question and spoken answer.

    deepspeed --num_gpus=8 train_ds.py --model_name_or_path DIR --data_dir data

run in this folder, on one node or several (run_deepspeed.sh). Without DeepSpeed, for small models:
`python train_ds.py --deepspeed "" ...`. `--help` lists every option; README.md explains them.

Read next: options/run_arguments.py, dataset/folders.py, dataset/prepare.py, dataset/template.py,
model/omni.py, training/trainer.py.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: this folder's `evaluate.py`, its rooms and others
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # must not shadow packages so named

from vss_longcat_omni.dataset.conversation import MediaItem, Segment, TextItem, Turn, VoiceItem
from vss_longcat_omni.dataset.folders import find_split
from vss_longcat_omni.options.run_arguments import check_argv

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("vss_longcat_omni")


def preprocess_function(
    folder: Path,
    media: MediaItem,
    transcript: str | None,
    codes: Tensor,
    *,
    system_prompt: str = "",
) -> list[Turn]:
    """Return the conversation that a sample is trained on. Edit this to say something else.

    The last turn is the answer; generate.py asks with those before it.

    Args:
        folder: of the sample, where files of your own may lie.
        media: the video and the question's sound, interleaved as the model was trained.
        transcript: what the answer says; None with --transcripts none.
        codes: (N, 4) of the answer's speech.
    """
    turns = [Turn("system", (TextItem(system_prompt),))] if system_prompt else []
    turns.append(Turn("user", (media,)))
    turns.append(Turn("voice assistant", (VoiceItem((Segment(transcript, codes),)),)))
    return turns


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    own_options = check_argv(argv)
    if own_options is not None:  # else --help, which needs no data
        find_split(Path(own_options.data_dir))
    run(argv)


def run(argv: list[str]) -> None:
    """Run as the command line says, in the order data flows; every process calls it.

    Raises:
        ValueError, FileNotFoundError: an option, a file or a folder that cannot be used.
    """
    # Seconds, for torch and transformers: they wait until our own options are known to be sound.
    from transformers import set_seed

    from vss_longcat_omni.dataset.build import build_datasets
    from vss_longcat_omni.model.build import build_model
    from vss_longcat_omni.model.loading import CheckpointReader, load_config, load_weights
    from vss_longcat_omni.options.hub import resolve_artifact
    from vss_longcat_omni.options.training_arguments import parse_arguments
    from vss_longcat_omni.plan.__main__ import check_fits
    from vss_longcat_omni.training.checkpoint import find_checkpoint
    from vss_longcat_omni.training.signals import (
        notice_locks,
        notice_optimizer_offload,
        stop_early,
    )
    from vss_longcat_omni.training.trainer import OmniTrainer

    options, training = parse_arguments(argv)
    signal.signal(signal.SIGUSR1, stop_early)
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING)
    set_seed(training.seed)
    notice_optimizer_offload()
    if training.deepspeed and training.should_log:
        notice_locks()
    check_fits(options, training)  # the released model: before 1.1 TB are downloaded
    folder = resolve_artifact(options.model_name_or_path, field="model_name_or_path")
    config = load_config(folder)
    check_fits(options, training, config)

    # Data.
    datasets = build_datasets(
        options,
        training,
        folder,
        preprocess_function,
        vision_config=config.vision_config,
        audio_vocab_size=config.audio_vocab_size,
    )
    if options.prepare_only:
        return
    resume_from = training.resume_from_checkpoint
    if resume_from:
        resume_from = str(find_checkpoint(Path(str(training.output_dir)), resume_from))

    # Model.
    def load(model: nn.Module) -> None:
        load_weights(model, CheckpointReader(folder), show_progress=training.should_log)

    model = build_model(options, training, config, datasets["training"].tokens, load)

    # Training.
    trainer = OmniTrainer(
        model,
        training,
        options,
        model_folder=folder,
        train_dataset=datasets["training"],
        eval_dataset=datasets.get("test"),
        tokenizer=datasets["training"].tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    if trainer.stop.has_stopped:
        logger.warning("stopped; continue with --resume_from_checkpoint latest")
        return
    # On all processes: they gather the adapters together. It uploads them too, where that is asked.
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
