"""Fine-tunes LongCat-Flash-Omni on folders of video, question and spoken answer.

    deepspeed --num_gpus=8 train_ds.py --model_name_or_path DIR --data_dir data

run in this folder, on one node or several (run_deepspeed.sh). Without DeepSpeed, for small models:
`python train_ds.py --deepspeed "" ...`. `--help` lists every option; README.md explains them.
What happens then is in run.py.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vss_longcat_omni.dataset.conversation import MediaItem, Segment, TextItem, Turn, VoiceItem
from vss_longcat_omni.options.run_arguments import check_words

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def preprocess_function(
    folder: Path,
    media: MediaItem,
    transcript: str | None,
    codes: Tensor,
    *,
    system_prompt: str = "",
) -> list[Turn]:
    """The conversation that a sample is trained on. Edit this to say something else.

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
    words = sys.argv[1:] if argv is None else argv
    check_words(words)
    from vss_longcat_omni.run import train  # seconds, for torch and transformers

    train(words, preprocess_function)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
