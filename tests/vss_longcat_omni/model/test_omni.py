"""The whole model: fusion, packing, the loss of both streams, a batch without pictures or sound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, make_example, randomize, tiny_config
from vss_longcat_omni.dataset.collator import collate, count_targets
from vss_longcat_omni.dataset.special_tokens import IGNORE_INDEX
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.options.run_arguments import LossWeights

WEIGHTS = LossWeights(text=1.5, audio=0.25, semantic=0.1)


@pytest.fixture
def model() -> LongcatOmniForCausalLM:
    config = tiny_config(vision_config=VISION, audio_config=AUDIO)
    model = LongcatOmniForCausalLM(config, WEIGHTS)
    randomize(model)
    return model.train()


def gradients(model: LongcatOmniForCausalLM) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_all_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, grad in found.items():
        scale = wanted[name].abs().max().clamp(min=1e-6)
        assert ((grad - wanted[name]).abs().max() / scale) < 1e-4, name


def test_one_batch_of_four_equals_four_of_one(model: LongcatOmniForCausalLM) -> None:
    """Each term divided by the count of the whole step, whatever the micro-batches."""
    examples = [make_example(seed, num_text=2 + seed, num_frames=4 + 2 * seed) for seed in range(4)]
    together = collate(examples)
    counts = count_targets(together)
    whole = model(**together, num_targets=counts)
    whole.loss.backward()
    wanted = gradients(model)
    parts = [model(**collate([example]), num_targets=counts) for example in examples]
    loss, losses, found_counts = (
        torch.stack([part[key] for part in parts]).sum(dim=0)
        for key in ("loss", "losses", "counts")
    )
    loss.backward()
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(losses, whole.losses)
    assert torch.equal(found_counts, counts)
    assert_all_close(gradients(model), wanted)


def test_the_loss_by_hand(model: LongcatOmniForCausalLM) -> None:
    """Cascade and shift written out, position by position."""
    example = make_example(1, num_text=3, num_frames=4)
    batch = collate([example])
    output = model(**batch)
    with torch.no_grad():
        embeds = model.embed(
            example.input_ids, example.audio_ids, batch["pictures"], batch["sound"]
        )
        length = len(example.input_ids)
        hidden = model.model(embeds, torch.arange(length), [length])
    text, codes, semantic = [], [], []
    layers = model.speech_heads
    for place in range(length - 1):
        label = example.text_labels[place + 1]
        if label != IGNORE_INDEX:
            text.append(F.cross_entropy(model.lm_head(hidden[place]), label))
        state = hidden[place]
        ids = example.audio_ids[place + 1]
        for head in range(4):
            target = example.audio_labels[place + 1, head]
            if target != IGNORE_INDEX:
                loss = F.cross_entropy(layers.audio_output_layers[head](state), target)
                codes.append(loss)
                semantic += [loss] if head == 0 else []
            if head < 3:
                state = state + layers.embedding[head](ids[head])
    terms = torch.stack([torch.stack(part).mean() for part in (text, codes, semantic)])
    torch.testing.assert_close(output.losses / output.counts, terms)
    torch.testing.assert_close(output.loss.detach(), (torch.tensor([1.5, 0.25, 0.1]) * terms).sum())
    assert output.counts.tolist() == [3 + 1, 4 * 4 + 1, 4 + 1]  # terminator; semantic EOS


def test_every_parameter_has_a_gradient_without_pictures_and_sound(
    model: LongcatOmniForCausalLM,
) -> None:
    """Under ZeRO-3 a process that left a module out would keep the others waiting for ever."""
    full = make_example(0, num_text=3, num_frames=4)
    bare = make_example(0, num_text=3, num_frames=4, has_media=False)
    model(**collate([full])).loss.backward()
    wanted = set(gradients(model))
    batch = collate([bare])
    assert batch["pictures"] is None
    assert batch["sound"] is None
    output = model(**batch)
    output.loss.backward()
    found = gradients(model)
    assert set(found) == wanted
    seeing = [grad for name, grad in found.items() if name.startswith(("vision", "audio_enc"))]
    assert seeing
    assert not any(grad.any() for grad in seeing)


def test_a_frozen_encoder_keeps_nothing(model: LongcatOmniForCausalLM) -> None:
    model.vision_encoder.requires_grad_(False)
    model.audio_encoder.requires_grad_(False)
    model(**collate([make_example(0, num_text=3, num_frames=4)])).loss.backward()
    found = gradients(model)
    assert not any(name.startswith(("vision_enc", "audio_encoder")) for name in found)
    assert any(name.startswith("vision_projector") for name in found)


def test_pictures_and_sound_reach_the_answer(model: LongcatOmniForCausalLM) -> None:
    example = make_example(0, num_text=3, num_frames=4)
    loss = model(**collate([example])).loss
    blank = replace(example, pixel_values=torch.zeros_like(example.pixel_values))
    silent = replace(example, features=torch.zeros_like(example.features))
    assert abs(model(**collate([blank])).loss - loss) > 1e-4
    assert abs(model(**collate([silent])).loss - loss) > 1e-4


def test_rows_of_text_give_logits(model: LongcatOmniForCausalLM) -> None:
    ids = torch.randint(150, 300, (2, 7))
    logits = model(ids).logits
    assert logits.shape == (2, 7, 300)
    torch.testing.assert_close(model(ids[1]).logits, logits[1])
