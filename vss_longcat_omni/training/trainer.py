"""Hugging Face's Trainer with this model's batches, loss, metrics and saved files.

Follows dataset/collator.py; train_ds.py builds it. The Trainer's own loop, callbacks, trackers and
DeepSpeed set-up stay as they are.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import Trainer

from vss_longcat_omni.dataset.collator import collate, count_targets
from vss_longcat_omni.dataset.sampler import MicroBatchSampler, group_by_length, pack
from vss_longcat_omni.media.cmvn import CMVN_NAME
from vss_longcat_omni.media.fbank import CONFIG_NAME
from vss_longcat_omni.model.loss import LossSums, combine
from vss_longcat_omni.model.saving import TRAINED_MODULES, save_config, save_weights
from vss_longcat_omni.training.metrics import TERMS, describe, stack_sums
from vss_longcat_omni.training.signals import (
    StopOnSignal,
    leave_signals_to_the_trainer,
    sum_over_processes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import TrainerCallback

    from vss_longcat_omni.dataset.examples import VssDataset
    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments


class OmniTrainer(Trainer):
    """Trains; `run` says how samples form micro-batches, `model_folder` is what it starts from.

    A step's loss is scaled once: by the divisors of `get_batch_samples`, which the model divides
    its sums by. Nothing else multiplies or divides it.
    """

    loss_is_scaled_for_ga = True  # so that Trainer leaves out its own division by micro-batches

    def __init__(
        self,
        model: nn.Module,
        args: OmniTrainingArguments,
        run: RunArguments,
        *,
        model_folder: Path,
        train_dataset: VssDataset,
        eval_dataset: VssDataset | None = None,
        tokenizer: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.run, self.model_folder = run, model_folder
        stop = StopOnSignal()
        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType]
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
            callbacks=[stop, *(callbacks or [])],
        )
        self.stop = stop
        self._reset_sums()

    def _reset_sums(self) -> None:
        """Begin the sums of what this process trains on up to the next log."""
        self.sums = torch.zeros(3, len(TERMS), dtype=torch.float64)  # losses, counts, right ones
        self.num_tokens = 0
        self.sums_since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        dataset: Any = self.train_dataset
        return self._loader(dataset, seed=self.args.data_seed or self.args.seed)

    def _loader(self, dataset: VssDataset, *, seed: int) -> DataLoader:
        """Load this process's micro-batches, without accelerate, which would divide them again."""
        if self.run.packing:
            batches = pack(dataset.lengths, self.run.max_tokens, seed=seed)
        else:
            size = self.args.per_device_train_batch_size
            batches = group_by_length(dataset.lengths, size, seed=seed)
        sampler = MicroBatchSampler(
            batches, num_processes=self.args.world_size, rank=self.args.process_index, seed=seed
        )
        return EpochLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=False,
            worker_init_fn=leave_signals_to_the_trainer,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Return a step's micro-batches, and (3,) what each term of their losses is divided by: its
        targets in the whole step, of all processes, shared among these, whose gradients are
        averaged."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = sum((count_targets(batch) for batch in batches), start=torch.zeros(len(TERMS)))
        return batches, sum_over_processes(counts.to(device)) / self.args.world_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return what this micro-batch adds to the step's loss, divided by `num_items_in_batch`.

        Raises:
            FloatingPointError: in every process, when the loss of one is no number.
        """
        outputs = model(**inputs, num_targets=num_items_in_batch)
        is_bad = (~torch.isfinite(outputs.loss.detach())).float()
        if sum_over_processes(is_bad).item():
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is not a finite number. The last "
                "checkpoint is untouched; lower learning_rate, or look for a broken sample."
            )
        self.sums += stack_sums(outputs)
        self.num_tokens += len(inputs["input_ids"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._metrics()
        super().log(logs, start_time)

    def _metrics(self) -> dict[str, float]:
        """Compute each term's loss and accuracy and tokens a second; all processes take part."""
        seconds = time.perf_counter() - self.sums_since
        rate = torch.tensor([self.num_tokens / seconds], dtype=torch.float64)
        flat = torch.cat([self.sums.flatten(), rate]).to(self.args.device)
        *sums, tokens_per_sec = sum_over_processes(flat).tolist()
        self._reset_sums()
        metrics = describe(torch.tensor(sums).view(3, -1)) | {"tokens_per_sec": tokens_per_sec}
        if torch.cuda.is_available():
            metrics["peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute each term's loss over the whole set, each sample once, whatever the processes."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        loader: Any = self._loader(dataset, seed=self.args.seed)
        num_batches = len(loader.batch_sampler.batches)
        sums = torch.zeros(3, len(TERMS), dtype=torch.float64)
        model: Any = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        for step, batch in enumerate(loader):
            with torch.no_grad():
                outputs = model(**self._prepare_inputs(batch))
            if step * self.args.world_size + self.args.process_index < num_batches:  # no repeat
                sums += stack_sums(outputs)
        sums = sum_over_processes(sums.to(self.args.device)).cpu()
        found = describe(sums)
        found["loss"] = combine(LossSums(*sums), sums[1], self.run.loss_weights).item()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save LoRA's adapter in PEFT's format, what else is trained in a file of its own; at the
        end of a training of the whole model, a folder in the released layout."""
        folder = Path(str(output_dir or self.args.output_dir))
        is_end = folder == Path(str(self.args.output_dir))
        if self.run.tuning == "full" and is_end:
            if self.args.should_save:
                self._save_whole(folder, state_dict)
            return
        super()._save(output_dir, state_dict)
        if self.run.tuning == "lora" and self.args.should_save:
            model: Any = self.model
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            beside = {
                name.removeprefix("base_model.model."): (state_dict or trained)[name].detach().cpu()
                for name in trained
                if ".lora_" not in name
            }
            if beside:
                save_file(beside, folder / TRAINED_MODULES)

    def _save_whole(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Save what `load_weights` reads, with tokenizer and filter-bank settings."""
        model: Any = self.model
        save_config(model.config, folder)
        save_weights(state_dict or model.state_dict(), folder)
        tokenizer: Any = self.processing_class
        tokenizer.save_pretrained(folder)
        for name in (CONFIG_NAME, CMVN_NAME):
            shutil.copyfile(self.model_folder / "audio" / name, folder / "audio" / name)
        torch.save(self.args, folder / "training_args.bin")


class EpochLoader(DataLoader):
    """Tells its sampler the epoch, as accelerate's loaders do."""

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
